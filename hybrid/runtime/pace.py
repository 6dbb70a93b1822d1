"""The emulation's time scale: how many wall seconds one second of a real chip takes.

Pure: decides from what the ranks measured; see `EmulatedBackend` for what it is used for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from hybrid.scheduler.actions import Action
from hybrid.scheduler.plan import Plan

_SHARE_OF_ACTION = 0.75
"""Of an action's paced time, what the CPU may take when the rank has a core for itself."""
_SHARE_OF_CORES = 0.7
"""Of all cores' time, what the ranks' arithmetic may take together; the rest is Python, wires and the system."""


def time_scale(
    plan: Plan,
    seconds_of_rank: Sequence[Mapping[str, float]],
    *,
    wanted: float | Literal["auto"],
    pace: bool,
    num_cores: int,
) -> float:
    """Return the job's time scale; 0 where nothing is paced.

    `auto` is the smallest scale at which this machine keeps up: every action's arithmetic fits its paced time, and all
    ranks' arithmetic together fits the cores. Two significant digits, rounded up.

    Args:
        seconds_of_rank: by rank, what each kind of action (`2F`: stage 2's forward) costs a core of this machine.
    """
    emulated = [rank for rank in range(plan.num_ranks) if plan.stages_of_rank(rank)[0].backend == "emulated"]
    if not pace or not emulated:
        return 0.0
    if wanted != "auto":
        return wanted
    # An edited plan may say that an action takes no time: nothing paces it.
    least, slowest_s = 0.0, 0.0
    for rank in emulated:
        paced_s = {words: plan.replica_of_rank(rank).seconds_of(_action(words)) for words in seconds_of_rank[rank]}
        slowest_s = max(slowest_s, sum(paced_s.values()))
        shares = (cpu_s / paced_s[words] for words, cpu_s in seconds_of_rank[rank].items() if paced_s[words] > 0)
        least = max(least, *(share / _SHARE_OF_ACTION for share in shares), 0.0)
    if slowest_s == 0:
        return 0.0
    total_s = sum(sum(seconds.values()) for seconds in seconds_of_rank)
    crowded = total_s / num_cores / _SHARE_OF_CORES / slowest_s
    return _round_up(max(least, crowded))


def _action(words: str) -> Action:
    return Action.parse(f"{words}0")


def _round_up(value: float) -> float:
    """Round up to two significant digits."""
    rounded = float(f"{value:.1e}")
    if rounded >= value:
        return rounded
    step = float("0.1e" + f"{value:.1e}".partition("e")[2])
    return float(f"{rounded + step:.1e}")
