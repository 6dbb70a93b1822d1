"""The emulation's time scale: how many wall seconds one second of a real chip takes.

Pure: decides from what the ranks measured; see `EmulatedBackend` for what it is used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from hybrid.scheduler.plan import Plan

_SHARE_OF_ACTION = 0.75
"""Of an action's paced time, what the CPU may take when the rank has a core for itself."""
_SHARE_OF_CORES = 0.7
"""Of all cores' time, what the ranks' arithmetic may take together; the rest is Python, wires and the system."""


def time_scale(
    plan: Plan,
    forward_s_of_rank: Sequence[float],
    backward_s_of_rank: Sequence[float],
    *,
    wanted: float | Literal["auto"],
    pace: bool,
    num_cores: int,
) -> float:
    """Return the job's time scale; 0 where nothing is paced.

    `auto` is the smallest scale at which this machine keeps up: every action's arithmetic fits its paced time, and all
    ranks' arithmetic together fits the cores. Two significant digits, rounded up.
    """
    emulated = [stage for stage in plan.stages if stage.backend == "emulated"]
    if not pace or not emulated:
        return 0.0
    if wanted != "auto":
        return wanted
    least = max(
        (
            cpu_s / paced_s / _SHARE_OF_ACTION
            for stage in emulated
            for rank in stage.ranks
            for cpu_s, paced_s in (
                (forward_s_of_rank[rank], stage.forward_s),
                (backward_s_of_rank[rank], stage.backward_s),
            )
            # An edited plan may say that an action takes no time: nothing paces it.
            if paced_s > 0
        ),
        default=0.0,
    )
    slowest_s = max(stage.forward_s + stage.backward_s for stage in emulated)
    if slowest_s == 0:
        return 0.0
    total_s = sum(forward_s_of_rank) + sum(backward_s_of_rank)
    crowded = total_s / num_cores / _SHARE_OF_CORES / slowest_s
    return _round_up(max(least, crowded))


def _round_up(value: float) -> float:
    """Round up to two significant digits."""
    rounded = float(f"{value:.1e}")
    if rounded >= value:
        return rounded
    step = float("0.1e" + f"{value:.1e}".partition("e")[2])
    return float(f"{rounded + step:.1e}")
