"""The search: which replicas of which shape, on which chips, give the best plan of a mixed fleet.

Pure: NumPy and SciPy, no torch, no network. Cost grows with the kinds of chips, not with their number:
identical islands are one pool, identical replicas one group. `search.search` is the door, `uniform.search_uniform`
the one of Sailor's vocabulary, `worth.is_the_mix_worth_it` asks it several times, `confirm.confirm` simulates.

What it chooses: replicas and their shapes; for each its stages, layers, pool, tensor-parallel degree, width
(data-parallel degree inside a stage), recompute, microbatch and share of the batch; chips left unused. A replica is
counted on 1F1B; other named schedules are tried on what was found. What it does not choose: the codec of an edge, and
interleaved or searched schedules. What it does not overlap: the reduction and the optimizer, which start
when the slowest replica has ended. A fleet of up to 8 chips and 12 layers is planned exactly; on larger ones column
generation is a heuristic, with no proof of how far it is from the best.
"""
