"""Which action needs which: the messages between stages, and what must have happened on a rank before.

Pure: no torch, no clock, no network. The one place that knows the data flow of a pipeline; lowering, check
and simulator ask it.
"""

from __future__ import annotations

from hybrid.scheduler.actions import Action, Kind, Schedule

INPUT_GRADIENT = frozenset({Kind.B, Kind.I})
"""The kinds that produce the gradient of a stage's input."""
WEIGHT_GRADIENT = frozenset({Kind.B, Kind.W})
"""The kinds that produce the gradients of a stage's weights."""


def receive_of(schedule: Schedule, action: Action) -> Action | None:
    """Return the receive that must be posted before a compute action, or None when its input is at hand."""
    source = _source_stage(schedule, action)
    if source is None or schedule.rank_of_stage[source] == schedule.rank_of_stage[action.stage]:
        return None
    return Action(action.stage, Kind.RECV_F if action.kind is Kind.F else Kind.RECV_B, action.microbatch)


def send_of(schedule: Schedule, action: Action) -> Action | None:
    """Return the send that follows a compute action, or None when nobody elsewhere needs what it made."""
    if action.kind is Kind.F:
        kind, target = Kind.SEND_F, action.stage + 1
    elif action.kind in INPUT_GRADIENT:
        kind, target = Kind.SEND_B, action.stage - 1
    else:
        return None
    if not 0 <= target < schedule.num_stages:
        return None
    if schedule.rank_of_stage[target] == schedule.rank_of_stage[action.stage]:
        return None
    return Action(action.stage, kind, action.microbatch)


def peer_action(action: Action) -> Action:
    """Return the other end of a message: the receive of a send, the send of a receive."""
    if action.kind is Kind.SEND_F:
        return Action(action.stage + 1, Kind.RECV_F, action.microbatch)
    if action.kind is Kind.SEND_B:
        return Action(action.stage - 1, Kind.RECV_B, action.microbatch)
    if action.kind is Kind.RECV_F:
        return Action(action.stage - 1, Kind.SEND_F, action.microbatch)
    return Action(action.stage + 1, Kind.SEND_B, action.microbatch)


def _source_stage(schedule: Schedule, action: Action) -> int | None:
    """Return the stage whose output a compute action consumes, or None at the pipeline's ends."""
    if action.kind is Kind.F:
        return action.stage - 1 if action.stage > 0 else None
    if action.kind in INPUT_GRADIENT:
        return action.stage + 1 if action.stage + 1 < schedule.num_stages else None
    return None


def local_needs(schedule: Schedule, action: Action) -> tuple[tuple[Action, ...], ...]:
    """Return what must stand before a compute action on its own rank: of each group of alternatives, one."""
    stage, microbatch = action.stage, action.microbatch
    needs: list[tuple[Action, ...]] = []
    if action.kind in INPUT_GRADIENT:
        needs.append((Action(stage, Kind.F, microbatch),))
    if action.kind is Kind.W:
        return ((Action(stage, Kind.I, microbatch),),)
    source = _source_stage(schedule, action)
    if source is not None and schedule.rank_of_stage[source] == schedule.rank_of_stage[stage]:
        kinds = (Kind.F,) if action.kind is Kind.F else (Kind.B, Kind.I)
        needs.append(tuple(Action(source, kind, microbatch) for kind in kinds))
    return tuple(needs)
