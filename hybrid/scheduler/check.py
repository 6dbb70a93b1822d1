"""What makes a schedule right: complete, in order on each rank, matched between ranks.

Pure: no torch, no clock, no network. Deadlocks *between* ranks need an execution: `simulate` finds those.
"""

from __future__ import annotations

from collections import defaultdict

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import COMPUTE, Action, Kind, Schedule
from hybrid.scheduler.messages import local_needs, peer_action, receive_of, send_of

SENDS = frozenset({Kind.SEND_F, Kind.SEND_B})
RECEIVES = frozenset({Kind.RECV_F, Kind.RECV_B})


def check_schedule(schedule: Schedule) -> None:
    """Raise unless every rank's actions are complete, in order, and matched by its peers'.

    Checked: sizes; each action on its stage's rank, once; for each stage and microbatch one F and either one
    B or one I and one W; on each rank an action after what it needs from that rank; and, where the schedule
    has communication, each message sent after it was made, its receive posted before it is used, both ends
    there, nothing sent within a rank, and each edge's receives posted in the order of its sends.

    Raises:
        ScheduleError: names the rank and the action.
    """
    _check_shape(schedule)
    position = _positions(schedule)
    _check_complete(schedule, position)
    for rank, actions in enumerate(schedule.actions_of_rank):
        for action in actions:
            if action.kind in COMPUTE:
                _check_local_order(schedule, rank, action, position)
    if any(action.kind not in COMPUTE for action in position):
        _check_messages(schedule, position)
        _check_message_order(schedule)


def _check_shape(schedule: Schedule) -> None:
    if schedule.num_microbatches < 1:
        raise ScheduleError("a schedule needs a microbatch", value=schedule.num_microbatches, valid="1 or more")
    if not schedule.rank_of_stage:
        raise ScheduleError("a schedule needs a stage", value=schedule.name)
    for stage, rank in enumerate(schedule.rank_of_stage):
        if not 0 <= rank < schedule.num_ranks:
            raise ScheduleError(f"stage {stage} is on no rank", value=rank, valid=f"0 to {schedule.num_ranks - 1}")


def _positions(schedule: Schedule) -> dict[Action, int]:
    """Return each action's place in its rank's list."""
    position: dict[Action, int] = {}
    for rank, actions in enumerate(schedule.actions_of_rank):
        for index, action in enumerate(actions):
            where = f"rank {rank}, action {index}"
            if not 0 <= action.stage < schedule.num_stages:
                raise ScheduleError(f"no stage {action.stage}", value=str(action), where=where)
            if schedule.rank_of_stage[action.stage] != rank:
                home = schedule.rank_of_stage[action.stage]
                raise ScheduleError(f"stage {action.stage} is on rank {home}", value=str(action), where=where)
            if not 0 <= action.microbatch < schedule.num_microbatches:
                raise ScheduleError(f"no microbatch {action.microbatch}", value=str(action), where=where)
            if action in position:
                raise ScheduleError("the action stands twice", value=str(action), where=where)
            position[action] = index
    return position


def _check_complete(schedule: Schedule, position: dict[Action, int]) -> None:
    for stage, rank in enumerate(schedule.rank_of_stage):
        for microbatch in range(schedule.num_microbatches):
            has = {kind for kind in COMPUTE if Action(stage, kind, microbatch) in position}
            if has not in ({Kind.F, Kind.B}, {Kind.F, Kind.I, Kind.W}):
                raise ScheduleError(
                    f"stage {stage} does not compute microbatch {microbatch} once",
                    value=" ".join(sorted(has)) or "nothing",
                    valid="F B, or F I W",
                    where=f"rank {rank}",
                )


def _check_local_order(schedule: Schedule, rank: int, action: Action, position: dict[Action, int]) -> None:
    here = position[action]
    for alternatives in local_needs(schedule, action):
        if not any(position.get(need, here) < here for need in alternatives):
            need = " or ".join(map(str, alternatives))
            raise ScheduleError(f"{action} stands before {need}, which it needs", where=f"rank {rank}, action {here}")


def _check_messages(schedule: Schedule, position: dict[Action, int]) -> None:
    expected: set[Action] = set()
    for action, here in position.items():
        if action.kind not in COMPUTE:
            continue
        where = f"rank {schedule.rank_of_stage[action.stage]}, action {here}"
        receive, send = receive_of(schedule, action), send_of(schedule, action)
        if receive is not None:
            expected.add(receive)
            if position.get(receive, here) >= here:
                raise ScheduleError(f"{action} has no {receive} posted before it", where=where)
        if send is not None:
            expected.add(send)
            if position.get(send, -1) <= here:
                raise ScheduleError(f"{action} has no {send} after it", where=where)
    for action, here in position.items():
        if action.kind not in COMPUTE and action not in expected:
            where = f"rank {schedule.rank_of_stage[action.stage]}, action {here}"
            raise ScheduleError("a message that nobody needs", value=str(action), where=where)


def _check_message_order(schedule: Schedule) -> None:
    """Compare, for each edge and direction, the order of sends with the order of posted receives."""
    sent: dict[tuple[int, Kind], list[Action]] = defaultdict(list)
    posted: dict[tuple[int, Kind], list[Action]] = defaultdict(list)
    for actions in schedule.actions_of_rank:
        for action in actions:
            if action.kind in SENDS:
                sent[action.stage, action.kind].append(action)
            elif action.kind in RECEIVES:
                send = peer_action(action)
                posted[send.stage, send.kind].append(send)
    for edge, sends in sent.items():
        for send, expected in zip(sends, posted[edge], strict=True):
            if send != expected:
                rank = schedule.rank_of_stage[send.stage]
                raise ScheduleError(
                    f"rank {rank} sends {send} where its peer has posted {peer_action(expected)}",
                    where=f"edge of stage {edge[0]}, {edge[1].value}",
                )
