"""Lowering: from a schedule of compute actions to one that also says when to send and to post receives.

Pure: no torch, no clock, no network. `check.py` judges what comes out.
"""

from __future__ import annotations

from dataclasses import replace

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import COMPUTE, Action, Schedule
from hybrid.scheduler.check import check_schedule as check_schedule
from hybrid.scheduler.messages import receive_of, send_of

RECEIVES_AHEAD = 2
"""Receives are posted this many compute actions before the one that needs them."""


def lower_communication(schedule: Schedule, *, receives_ahead: int = RECEIVES_AHEAD) -> Schedule:
    """Return the schedule with its sends and receives; two stages of one rank exchange nothing.

    A receive is posted `receives_ahead` compute actions before the action that consumes it (at the rank's
    start for the first ones), so that a rank holds at most `receives_ahead + 1` posted receives. A send
    starts directly after the action that made its data.

    Args:
        schedule: compute actions only.
        receives_ahead: 0 posts a receive just before its consumer.

    Raises:
        ScheduleError: the schedule already has communication, is wrong in itself, two ranks use an edge's
            messages in different orders, or receives_ahead is negative.
    """
    if receives_ahead < 0:
        raise ScheduleError("receives_ahead is negative", value=receives_ahead, valid="0 or more")
    if any(action.kind not in COMPUTE for actions in schedule.actions_of_rank for action in actions):
        raise ScheduleError("the schedule already has communication", value=schedule.name)
    check_schedule(schedule)
    lowered = replace(
        schedule,
        actions_of_rank=tuple(_lower_rank(schedule, actions, receives_ahead) for actions in schedule.actions_of_rank),
    )
    check_schedule(lowered)
    return lowered


def _lower_rank(schedule: Schedule, actions: tuple[Action, ...], receives_ahead: int) -> tuple[Action, ...]:
    receives = [receive_of(schedule, action) for action in actions]
    lowered: list[Action] = []
    posted = 0
    for index, action in enumerate(actions):
        until = min(index + receives_ahead + 1, len(actions))
        lowered += [receive for receive in receives[posted:until] if receive is not None]
        posted = until
        lowered.append(action)
        send = send_of(schedule, action)
        if send is not None:
            lowered.append(send)
    return tuple(lowered)
