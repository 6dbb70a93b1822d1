"""Confirm: simulate the groups of a choice action by action, and try other schedules on them.

Pure. The search counts on 1F1B; what it found is executed on paper by `hybrid.scheduler.simulate`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.held import peak_in_flight_of_stage
from hybrid.scheduler.schedules import build_schedule
from hybrid.scheduler.search.choice import Choice, Group
from hybrid.scheduler.simulate import simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """What the simulator says of a choice."""

    step_s: float
    schedule_of_group: tuple[str, ...]


def confirm(choice: Choice) -> Confirmed:
    """Return the step with each group on the fastest schedule of the vocabulary that fits; never worse than 1F1B.

    Cost:
        O(actions) a group and schedule; identical replicas once.
    """
    names, slowest = [], 0.0
    for group in choice.groups:
        timed = [
            (seconds, name != "1f1b", name)
            for name in {"1f1b", *choice.problem.vocabulary.schedules}
            if (seconds := group_step_s(group, name)) is not None
        ]
        seconds, _, name = min(timed)
        names.append(name)
        slowest = max(slowest, seconds + group.column.update_s)
    return Confirmed(step_s=slowest + choice.reduce_s, schedule_of_group=tuple(names))


def group_step_s(group: Group, schedule_name: str) -> float | None:
    """Return the simulated seconds of one replica's forwards and backwards, or None where memory does not suffice."""
    column = group.column
    schedule = build_schedule(schedule_name, len(column.chosen), group.num_microbatches)
    if schedule_name != "1f1b" and not _fits(group, schedule):
        return None
    lines = column.pipelines()
    forward_s, backward_s = lines.forward_s[0], lines.backward_s[0]
    activation_s, gradient_s, busy_s = lines.activation_s[0], lines.gradient_s[0], lines.busy_s[0]

    def seconds_of(action: Action) -> float:
        if action.kind is Kind.F:
            return float(forward_s[action.stage])
        return float(backward_s[action.stage]) / (1 if action.kind is Kind.B else 2)

    def transfer_s(send: Action) -> float:
        return float(activation_s[send.stage] if send.kind is Kind.SEND_F else gradient_s[send.stage - 1])

    def link_busy_s(send: Action) -> float:
        return float(busy_s[send.stage if send.kind is Kind.SEND_F else send.stage - 1])

    return simulate(schedule, seconds_of=seconds_of, transfer_s=transfer_s, link_busy_s=link_busy_s).step_s


def _fits(group: Group, schedule: Schedule) -> bool:
    column, table = group.column, group.column.table
    for stage, in_flight in enumerate(peak_in_flight_of_stage(schedule)):
        place = column.chosen[stage], column.bounds[stage], column.bounds[stage + 1]
        needed = table.base_bytes[place] + in_flight * table.held_bytes[place]
        if needed > table.limit_bytes[column.chosen[stage]]:
            return False
    return True
