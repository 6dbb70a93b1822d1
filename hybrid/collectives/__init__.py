"""Collectives: operations among several ranks, of one vendor or of several, over transports or shared memory."""
