"""A whole training step on paper: pipelines of any shape, messages, reductions, the optimizer, memory, money.

Pure: no torch, no clock, no network, no file. `facts` says what a step is made of, `build` makes it from a plan,
`engine` runs it, `result` says what follows, `replay` strings steps along a trace of device availability.
"""
