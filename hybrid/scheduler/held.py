"""What a schedule makes a rank hold: activations between forward and backward, and posted receives.

Pure: no torch, no clock, no network. Needs no seconds: a rank's own order decides what it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate

from hybrid.scheduler.actions import Action, Kind, Schedule


def _one(stage: int) -> float:
    return 1.0


def _nothing(stage: int) -> float:
    return 0.0


def peak_held_of_rank(
    schedule: Schedule,
    *,
    held_by_forward: Callable[[int], float] = _one,
    kept_after_input_gradient: Callable[[int], float] | None = None,
) -> tuple[float, ...]:
    """Return the most that each rank holds at a time.

    Args:
        schedule: compute actions, with or without communication.
        held_by_forward: what one forward of a stage leaves (bytes, or a count), until its B or W.
        kept_after_input_gradient: the part of it that a stage's I does not free; default: all of it.

    Returns:
        one number a rank, in the unit of the arguments.
    """
    change = _change(held_by_forward, kept_after_input_gradient or held_by_forward)
    return tuple(_peak(map(change, actions)) for actions in schedule.actions_of_rank)


def held_of_stage_at_peak(
    schedule: Schedule, *, held_by_forward: Callable[[int], float], kept_after_input_gradient: Callable[[int], float]
) -> tuple[float, ...]:
    """Return what each stage holds at the moment when its rank holds most (the first one of equals).

    Args:
        schedule, held_by_forward, kept_after_input_gradient: as for `peak_held_of_rank`.
    """
    change = _change(held_by_forward, kept_after_input_gradient)
    found = [0.0] * schedule.num_stages
    for rank, actions in enumerate(schedule.actions_of_rank):
        own = [stage for stage, home in enumerate(schedule.rank_of_stage) if home == rank]
        now, most = dict.fromkeys(own, 0.0), 0.0
        for action in actions:
            now[action.stage] += change(action)
            if sum(now.values()) > most:
                most = sum(now.values())
                for stage in own:
                    found[stage] = now[stage]
    return tuple(found)


def _change(held: Callable[[int], float], kept: Callable[[int], float]) -> Callable[[Action], float]:
    """Return what an action adds to what its rank holds."""

    def change(action: Action) -> float:
        stage = action.stage
        match action.kind:
            case Kind.F:
                return held(stage)
            case Kind.B:
                return -held(stage)
            case Kind.I:
                return kept(stage) - held(stage)
            case Kind.W:
                return -kept(stage)
        return 0.0

    return change


def peak_in_flight_of_stage(schedule: Schedule) -> tuple[int, ...]:
    """Return the most microbatches that each stage holds between their F and their B (or W)."""
    change = {Kind.F: 1, Kind.B: -1, Kind.W: -1}
    return tuple(
        int(_peak(change.get(action.kind, 0) for action in schedule.actions_of_rank[rank] if action.stage == stage))
        for stage, rank in enumerate(schedule.rank_of_stage)
    )


def peak_posted_of_stage(lowered: Schedule) -> tuple[tuple[int, int], ...]:
    """Return the most receives that each stage has posted and not used, as (activations, gradients)."""
    forward = {Kind.RECV_F: 1, Kind.F: -1}
    backward = {Kind.RECV_B: 1, Kind.B: -1, Kind.I: -1}
    return tuple(
        (_peak_posted(lowered, stage, forward), _peak_posted(lowered, stage, backward))
        for stage in range(lowered.num_stages)
    )


def _peak_posted(lowered: Schedule, stage: int, change: dict[Kind, int]) -> int:
    actions = lowered.actions_of_rank[lowered.rank_of_stage[stage]]
    if not any(action.stage == stage and action.kind in (Kind.RECV_F, Kind.RECV_B) for action in actions):
        return 0
    mine = [change.get(action.kind, 0) for action in actions if action.stage == stage]
    return int(_peak(mine)) if 1 in mine else 0


def _peak(changes: Iterable[float]) -> float:
    return max(accumulate(changes, initial=0.0))
