"""Codecs on paper: how many bytes a message takes in each, and which edges of a replica a narrower one is worth.

Pure. A codec that loses digits is taken only where it is permitted and shortens the step.
"""

from __future__ import annotations

from collections.abc import Sequence

from hybrid.scheduler.actions import Action, Kind
from hybrid.scheduler.search.choice import Group
from hybrid.scheduler.search.confirm import costs_of
from hybrid.scheduler.search.sent import BYTES_A_NUMBER
from hybrid.scheduler.simulate import simulate

_SLACK = 1.001
"""A wider codec is kept where the step is longer by no more than this factor."""


def choose_codecs(group: Group) -> tuple[str, ...]:
    """Return each edge's codec: the widest with which the step is still as short as with the narrowest everywhere.

    Cost:
        a simulated step for each edge and permitted codec.
    """
    column, table = group.column, group.column.table
    permitted = [name for name in BYTES_A_NUMBER if name in table.codecs]
    chosen = [table.codecs[-1]] * (len(column.chosen) - 1)
    if len(permitted) > 1:
        least_s = coded_step_s(group, chosen)
        for edge in range(len(chosen)):
            for name in permitted:
                tried = [*chosen[:edge], name, *chosen[edge + 1 :]]
                if name == chosen[edge] or coded_step_s(group, tried) <= least_s * _SLACK:
                    chosen = tried
                    break
    return tuple(chosen)


def coded_step_s(group: Group, codecs: Sequence[str]) -> float:
    """Return the simulated seconds of one replica's forwards, backwards and messages with these codecs on its edges."""
    column, table = group.column, group.column.table
    seconds_of, _, _ = costs_of(column)
    edges = [table.coded_edge_s(name, *column.ends_of_edge(edge)) for edge, name in enumerate(codecs)]

    def edge_of(send: Action) -> tuple[float, float]:
        return edges[send.stage if send.kind is Kind.SEND_F else send.stage - 1]

    return simulate(
        group.build_schedule(),
        seconds_of=seconds_of,
        transfer_s=lambda send: edge_of(send)[0],
        link_busy_s=lambda send: edge_of(send)[0] - edge_of(send)[1],
    ).step_s
