"""Orders: a named schedule's actions in an order that keeps every dependency, and what its ranks hold meanwhile.

Pure. What the vectorised pace walks through; made once for each name, number of ranks and number of microbatches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.interleaved import round_layout
from hybrid.scheduler.schedules import build_placed_schedule
from hybrid.scheduler.zero_bubble import v_layout

LAYERED = {"interleaved": 2, "zb-v": 2}
"""Stages a rank, where a schedule puts several on one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Order:
    """One schedule of so many ranks and microbatches."""

    rank_of_stage: tuple[int, ...]
    actions: tuple[tuple[int, Kind, int], ...]
    """(stage, kind, microbatch), each after all that it needs."""
    held_of_rank: tuple[NDArray[np.float64], ...]
    """By rank: microbatches that each of its stages holds, one row a moment; only moments that none exceeds in all.

    Shapes:
        each (moments, stages of the rank)
    """


def stages_a_rank(schedule: str) -> int:
    """Return how many stages the schedule puts on each rank."""
    return LAYERED.get(schedule, 1)


def layout_of(schedule: str, num_ranks: int) -> tuple[int, ...]:
    """Return the rank of each stage."""
    if schedule == "interleaved":
        return round_layout([LAYERED[schedule]] * num_ranks)
    return v_layout(num_ranks) if schedule == "zb-v" else tuple(range(num_ranks))


@lru_cache(maxsize=2048)
def order_of(schedule: str, num_ranks: int, num_microbatches: int) -> Order:
    """Return the order of a named schedule.

    Cost:
        O(actions).
    """
    built = build_placed_schedule(schedule, layout_of(schedule, num_ranks), num_microbatches)
    return Order(
        rank_of_stage=built.rank_of_stage,
        actions=_in_order(built),
        held_of_rank=tuple(_moments(built, rank) for rank in range(built.num_ranks)),
    )


def _in_order(schedule: Schedule) -> tuple[tuple[int, Kind, int], ...]:
    rows, last = schedule.actions_of_rank, schedule.num_stages - 1
    done: set[tuple[int, bool, int]] = set()
    place = [0] * len(rows)
    order: list[tuple[int, Kind, int]] = []
    total = sum(map(len, rows))
    while len(order) < total:
        before = len(order)
        for rank, row in enumerate(rows):
            while place[rank] < len(row) and _is_ready(row[place[rank]], last, done):
                action = row[place[rank]]
                if action.kind is not Kind.W:
                    done.add((action.stage, action.kind is Kind.F, action.microbatch))
                order.append((action.stage, action.kind, action.microbatch))
                place[rank] += 1
        assert len(order) > before, f"{schedule.name} waits for itself"
    return tuple(order)


def _is_ready(action: Action, last: int, done: set[tuple[int, bool, int]]) -> bool:
    match action.kind:
        case Kind.F:
            return action.stage == 0 or (action.stage - 1, True, action.microbatch) in done
        case Kind.W:
            return True  # its I stands before it in the same row
    return action.stage == last or (action.stage + 1, False, action.microbatch) in done


def _moments(schedule: Schedule, rank: int) -> NDArray[np.float64]:
    """Return what a rank's stages hold, at the moments that no other exceeds in every stage."""
    mine = [stage for stage, home in enumerate(schedule.rank_of_stage) if home == rank]
    held = dict.fromkeys(mine, 0)
    seen: set[tuple[int, ...]] = set()
    for action in schedule.actions_of_rank[rank]:
        if action.kind is Kind.F:
            held[action.stage] += 1
            seen.add(tuple(held.values()))
        elif action.kind in (Kind.B, Kind.W):
            held[action.stage] -= 1
    kept = [one for one in seen if not any(one != other and all(map(int.__le__, one, other)) for other in seen)]
    return np.array(sorted(kept), dtype=np.float64)
