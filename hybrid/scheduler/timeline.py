"""Timeline: when each action of a schedule ran, on paper or for real, and what follows from that.

Pure: no torch, no clock, no network.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from hybrid.scheduler.actions import Action, Kind, Schedule
from hybrid.scheduler.held import peak_held_of_rank


class Span(NamedTuple):
    """One compute action; a tuple, since a large simulation makes millions."""

    action: Action
    start_s: float
    end_s: float


class Transfer(NamedTuple):
    """One message: from the start of its send to its arrival."""

    action: Action
    from_rank: int
    to_rank: int
    start_s: float
    end_s: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """One step of every rank; time starts at 0."""

    schedule: Schedule
    spans_of_rank: tuple[tuple[Span, ...], ...]
    """Compute actions in order of time."""
    transfers: tuple[Transfer, ...] = ()

    @cached_property
    def step_s(self) -> float:
        """Seconds from the first action's start to the last one's end."""
        return max((spans[-1].end_s for spans in self.spans_of_rank if spans), default=0.0)

    @cached_property
    def period_s(self) -> float:
        """Seconds a step where steps follow one another with no barrier: the longest span of any one rank."""
        return max((spans[-1].end_s - spans[0].start_s for spans in self.spans_of_rank if spans), default=0.0)

    @cached_property
    def busy_s_of_rank(self) -> tuple[float, ...]:
        """Seconds of compute, by rank."""
        return tuple(sum(span.end_s - span.start_s for span in spans) for spans in self.spans_of_rank)

    @property
    def idle_share_of_rank(self) -> tuple[float, ...]:
        """Share of the step in which a rank computes nothing, by rank."""
        if self.step_s == 0:
            return tuple(0.0 for _ in self.spans_of_rank)
        return tuple(max(0.0, 1.0 - busy_s / self.step_s) for busy_s in self.busy_s_of_rank)

    @property
    def idle_share(self) -> float:
        """Mean of the ranks' idle shares."""
        shares = self.idle_share_of_rank
        return sum(shares) / len(shares)

    @property
    def peak_activations_of_rank(self) -> tuple[int, ...]:
        """Most microbatches held at a time, by rank, each stage's counted apart."""
        return tuple(int(peak) for peak in peak_held_of_rank(self.schedule))

    def gantt(self, width: int = 100) -> str:
        """Return one line a rank, `width` characters wide at most: `F3===` forward, `B3###` backward, `.`
        idle.

        A split backward shows as `I3###` and `W3---`; an action narrower than its name shows its letter.
        """
        names = [f"rank {rank} " for rank in range(len(self.spans_of_rank))]
        indent = max(len(name) for name in names)
        columns = max(width - indent, 1)
        per_s = columns / self.step_s if self.step_s > 0 else 0.0
        rows = [
            name.ljust(indent) + _gantt_row(spans, columns, per_s)
            for name, spans in zip(names, self.spans_of_rank, strict=True)
        ]
        return "\n".join(rows)


_FILL_OF_KIND = {Kind.F: "=", Kind.B: "#", Kind.I: "#", Kind.W: "-"}


def _gantt_row(spans: tuple[Span, ...], columns: int, per_s: float) -> str:
    cells = ["."] * columns
    for span in spans:
        first, end = round(span.start_s * per_s), round(span.end_s * per_s)
        letter, width = span.action.kind.value, end - first
        label = f"{letter}{span.action.microbatch}"
        # A number that is cut short would be another microbatch's.
        label = label if len(label) <= width else letter[:width]
        cells[first:end] = label.ljust(width, _FILL_OF_KIND[span.action.kind])
    return "".join(cells)
