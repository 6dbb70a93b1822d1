"""The scheduler: pure functions that decide which rank does what, when, and how long it will take.

Pure: no torch, no clock, no network, no environment. Imports `errors`, `config`, `wire` and `hardware` only.
"""
