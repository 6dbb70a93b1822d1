"""Members: how many of a stage's D members come from which pool, so that no pool runs out.

Pure. Two pools by an exchange argument; more by an integer program (HiGHS).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp

Counts = NDArray[np.int64]


def split_members(chips: NDArray[np.float64], available: Sequence[int], replicas: int) -> Counts | None:
    """Return the members of each stage by pool, or None where the chips do not suffice.

    Args:
        chips: chips of one member by (stage, pool); infinite where the pool cannot hold the stage.
        available: chips of each pool.
        replicas: members of every stage.

    Shapes:
        chips: (stages, pools).  returns: (stages, pools)
    """
    if np.any(~np.isfinite(chips).any(axis=1)):
        return None
    if len(available) == 1:
        return _checked(np.full((len(chips), 1), replicas), chips, available)
    if len(available) == 2:
        return _exchange(chips, available, replicas)
    return _program(chips, available, replicas)


def _exchange(chips: NDArray[np.float64], available: Sequence[int], replicas: int) -> Counts | None:
    """Give every stage to pool 1 where it can, then move to pool 0 where a chip of it frees most of pool 1."""
    counts = np.zeros(chips.shape, dtype=np.int64)
    only_first = ~np.isfinite(chips[:, 1])
    counts[only_first, 0], counts[~only_first, 1] = replicas, replicas
    excess = float((counts[:, 1] * np.where(only_first, 0.0, chips[:, 1])).sum()) - available[1]
    both = np.flatnonzero(np.isfinite(chips).all(axis=1))
    for stage in sorted(both, key=lambda s: -chips[s, 1] / chips[s, 0]):
        if excess <= 0:
            break
        moved = min(replicas, math.ceil(excess / chips[stage, 1]))
        counts[stage] = moved, replicas - moved
        excess -= moved * chips[stage, 1]
    return _checked(counts, chips, available)


def _program(chips: NDArray[np.float64], available: Sequence[int], replicas: int) -> Counts | None:
    stages, pools = chips.shape
    finite = np.isfinite(chips)
    cost = np.where(finite, chips, 0.0)
    per_stage = np.kron(np.eye(stages), np.ones(pools))
    per_pool = np.hstack([np.diag(cost[stage]) for stage in range(stages)])
    found = milp(
        cost.ravel(),
        integrality=np.ones(stages * pools, dtype=np.intp),
        bounds=Bounds(0, np.where(finite, float(replicas), 0.0).ravel()),
        constraints=[
            LinearConstraint(per_stage, replicas, replicas),
            LinearConstraint(per_pool, 0, np.array(available, dtype=np.float64)),
        ],
        options={"node_limit": 200},
    )
    if found.x is None:
        return None
    return _checked(np.rint(found.x).astype(np.int64).reshape(stages, pools), chips, available)


def _checked(counts: Counts, chips: NDArray[np.float64], available: Sequence[int]) -> Counts | None:
    used = (counts * np.where(counts > 0, chips, 0.0)).sum(axis=0)
    return counts if np.all(used <= np.array(available)) else None
