"""The search: which replicas of which shape, on which chips, give the best plan of a mixed fleet.

Pure: NumPy and SciPy, no torch, no network. Cost grows with the kinds of chips, not with their number:
identical islands are one pool, identical replicas one group.
"""
