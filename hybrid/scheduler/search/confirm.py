"""Confirm: simulate the groups of a choice action by action, by the simulator that runs plans.

Pure. The search counts many pipelines at once; what it found is executed on paper by `hybrid.scheduler.simulate`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hybrid.scheduler.actions import Action, Kind
from hybrid.scheduler.search.choice import Choice, Group
from hybrid.scheduler.search.columns import Column
from hybrid.scheduler.simulate import simulate


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmed:
    """What the simulator says of a choice."""

    step_s: float
    schedule_of_group: tuple[str, ...]


def confirm(choice: Choice) -> Confirmed:
    """Return the simulated step, optimizer and reduction included.

    Cost:
        O(actions) a group; identical replicas once.
    """
    slowest = max(group_step_s(group) + group.column.update_s for group in choice.groups)
    return Confirmed(
        step_s=slowest + choice.reduce_s, schedule_of_group=tuple(group.schedule_name for group in choice.groups)
    )


def group_step_s(group: Group) -> float:
    """Return the simulated seconds of one replica's forwards and backwards."""
    seconds_of, transfer_s, link_busy_s = costs_of(group.column)
    return simulate(
        group.build_schedule(), seconds_of=seconds_of, transfer_s=transfer_s, link_busy_s=link_busy_s
    ).step_s


_Seconds = Callable[[Action], float]


def costs_of(column: Column) -> tuple[_Seconds, _Seconds, _Seconds]:
    """Return what `simulate` asks for: seconds of an action, of a message, and of the link that it keeps busy."""
    lines = column.pipelines()
    forward_s, backward_s, weight_s = lines.forward_s[0], lines.backward_s[0], lines.weight_s[0]
    activation_s, gradient_s, busy_s = lines.activation_s[0], lines.gradient_s[0], lines.busy_s[0]

    def seconds_of(action: Action) -> float:
        match action.kind:
            case Kind.F:
                return float(forward_s[action.stage])
            case Kind.I:
                return float(backward_s[action.stage] - weight_s[action.stage])
            case Kind.W:
                return float(weight_s[action.stage])
        return float(backward_s[action.stage])

    def transfer_s(send: Action) -> float:
        return float(activation_s[send.stage] if send.kind is Kind.SEND_F else gradient_s[send.stage - 1])

    def link_busy_s(send: Action) -> float:
        return float(busy_s[send.stage if send.kind is Kind.SEND_F else send.stage - 1])

    return seconds_of, transfer_s, link_busy_s
