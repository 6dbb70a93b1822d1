"""A pipeline whose ranks share one machine's cores: what a rehearsal on fewer cores than ranks takes.

Pure. Processor sharing: while more ranks compute than there are cores, each moves at the same share of its pace.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hybrid.errors import ScheduleError
from hybrid.scheduler.actions import COMPUTE, Action, Kind, Schedule
from hybrid.scheduler.timeline import Span, Timeline

_DONE = 1e-12


def simulate_on_cores(
    schedule: Schedule,
    *,
    seconds_of: Callable[[Action], float],
    paces: Sequence[float],
    transfer_s: Callable[[Action], float] = lambda action: 0.0,
) -> Timeline:
    """Return when each action runs where the ranks share the cores of one machine.

    Args:
        schedule: compute actions only.
        seconds_of: core seconds of a compute action.
        paces: share of its pace at which each rank moves while 1, 2, … ranks compute; see `fair_paces`.
        transfer_s: seconds from the end of the action that makes a message to its arrival, by that action; takes
            no core.

    Raises:
        ScheduleError: the ranks wait for one another.

    Cost:
        O(actions * ranks).
    """
    if any(action.kind not in COMPUTE for row in schedule.actions_of_rank for action in row):
        raise ScheduleError("compute actions only", value=schedule.name)
    place = [0] * schedule.num_ranks
    done_s: dict[Action, float] = {}
    running: dict[int, tuple[Action, float]] = {}
    left: dict[int, float] = {}
    spans: list[list[Span]] = [[] for _ in place]
    now_s = 0.0
    while True:
        wake_s = float("inf")
        for rank, actions in enumerate(schedule.actions_of_rank):
            if rank in running or place[rank] == len(actions):
                continue
            ready_s = _ready_s(schedule, actions[place[rank]], done_s, transfer_s)
            if ready_s is not None and ready_s <= now_s:
                running[rank] = (actions[place[rank]], now_s)
                left[rank] = seconds_of(actions[place[rank]])
            elif ready_s is not None:
                wake_s = min(wake_s, ready_s)
        if not running and wake_s == float("inf"):
            break
        pace = paces[len(running) - 1] if running else 1.0
        until_s = min([wake_s, *(now_s + seconds / pace for seconds in left.values())])
        for rank in left:
            left[rank] -= (until_s - now_s) * pace
        now_s = until_s
        for rank in [rank for rank, seconds in left.items() if seconds <= _DONE * max(1.0, now_s)]:
            action, start_s = running.pop(rank)
            del left[rank]
            spans[rank].append(Span(action, start_s, now_s))
            done_s[action] = now_s
            place[rank] += 1
    waiting = [str(row[place[rank]]) for rank, row in enumerate(schedule.actions_of_rank) if place[rank] < len(row)]
    if waiting:
        raise ScheduleError("the ranks wait for one another at " + ", ".join(waiting), value=schedule.name)
    return Timeline(schedule=schedule, spans_of_rank=tuple(map(tuple, spans)))


def fair_paces(num_cores: float, num_ranks: int) -> tuple[float, ...]:
    """Return the paces on a quiet machine: a core each, and a fair share where there are more ranks than cores."""
    return tuple(min(1.0, num_cores / count) for count in range(1, num_ranks + 1))


def _ready_s(
    schedule: Schedule, action: Action, done_s: dict[Action, float], transfer_s: Callable[[Action], float]
) -> float | None:
    """Return when an action has all that it needs; None where that isn't known yet."""
    stage, microbatch = action.stage, action.microbatch
    if action.kind is Kind.W:
        return done_s.get(Action(stage, Kind.I, microbatch))
    if action.kind is Kind.F:
        return (
            0.0
            if stage == 0
            else _arrival_s(schedule, Action(stage - 1, Kind.F, microbatch), stage, done_s, transfer_s)
        )
    own_s = done_s.get(Action(stage, Kind.F, microbatch))
    if own_s is None or stage == schedule.num_stages - 1:
        return own_s
    for kind in (Kind.B, Kind.I):
        found = _arrival_s(schedule, Action(stage + 1, kind, microbatch), stage, done_s, transfer_s)
        if found is not None:
            return max(own_s, found)
    return None


def _arrival_s(
    schedule: Schedule, source: Action, stage: int, done_s: dict[Action, float], transfer_s: Callable[[Action], float]
) -> float | None:
    end_s = done_s.get(source)
    if end_s is None:
        return None
    crosses = schedule.rank_of_stage[source.stage] != schedule.rank_of_stage[stage]
    return end_s + (transfer_s(source) if crosses else 0.0)
