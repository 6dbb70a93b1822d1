"""Columns: replicas of one shape, with the seconds of a step by their number of microbatches.

Pure. A column of the planner's linear program; `shapes.py` makes all of a small problem, `generate.py` the promising
ones of a large one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hybrid.scheduler.search.options import Array, Option, OptionTable
from hybrid.scheduler.search.orders import layout_of, order_of, stages_a_rank
from hybrid.scheduler.search.pace import Pipelines, exact_step_seconds, step_seconds

_EXACT_UP_TO = 1024
"""Actions a rank up to which a step is computed action by action rather than continued at its pace."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Column:
    """One shape of replica."""

    table: OptionTable
    chosen: tuple[int, ...]
    """Options of `table`, by stage."""
    bounds: tuple[int, ...]
    """First layer of every stage, and the end."""
    chips: tuple[int, ...]
    """By pool."""
    counts: Array
    """Numbers of microbatches at which the step is known, rising."""
    seconds: Array
    """Of the step there, the optimizer included; infinite where memory does not suffice."""
    schedule: str = "1f1b"

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two columns the same."""
        return self.table.microbatch, self.chosen, self.bounds, self.schedule

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline; a rank is one or several chips, and holds one or several stages."""
        return len(self.chosen) // stages_a_rank(self.schedule)

    @property
    def rank_of_stage(self) -> tuple[int, ...]:
        """Which pipeline rank holds each stage."""
        return layout_of(self.schedule, self.num_ranks)

    def option_of_rank(self, rank: int) -> Option:
        """Return where and how a rank runs."""
        return self.table.options[self.chosen[self.rank_of_stage.index(rank)]]

    def ends_of_edge(self, edge: int) -> tuple[int, int, int]:
        """Return the options on both sides of an edge, and the layer behind it."""
        return self.chosen[edge], self.chosen[edge + 1], self.bounds[edge + 1]

    def peak_bytes_of_stage(self, stage: int, num_microbatches: int) -> float:
        """Return a stage's part of what its rank holds at its peak, fixed bytes left out."""
        if not self.table.problem.memory.capped_by_microbatches:
            num_microbatches = max(num_microbatches, 4 * self.num_ranks + 2)
        order, rank = order_of(self.schedule, self.num_ranks, num_microbatches), self.rank_of_stage[stage]
        mine = [s for s, home in enumerate(order.rank_of_stage) if home == rank]
        held = np.array([self.table.held_bytes[self.chosen[s], self.bounds[s], self.bounds[s + 1]] for s in mine])
        moments = order.held_of_rank[rank]
        peak = moments[int((moments @ held).argmax())]
        base = self.table.base_bytes[self.chosen[stage], self.bounds[stage], self.bounds[stage + 1]]
        return float(base + peak[mine.index(stage)] * held[mine.index(stage)])

    @property
    def samples(self) -> int:
        """Of one microbatch."""
        return self.table.microbatch

    def pipelines(self) -> Pipelines:
        """Return the column's own seconds, N = 1."""
        return self.table.pipelines(np.array([self.chosen], dtype=np.intp), np.array([self.bounds], dtype=np.intp))

    @property
    def update_s(self) -> float:
        """Of the optimizer."""
        return float(self.table.update_s[list(self.chosen)].max())

    def step_s(self, num_microbatches: int) -> float:
        """Return the seconds of a step from those known, beyond them at their last pace; no reduction."""
        counts, seconds = self.counts, self.seconds
        if num_microbatches <= counts[-1] or len(counts) == 1:
            place = int(np.searchsorted(counts, num_microbatches))
            if place < len(counts) and counts[place] == num_microbatches:
                return float(seconds[place])
            if len(counts) == 1:
                return float(seconds[0] * num_microbatches / counts[0])
            return float(np.interp(num_microbatches, counts, seconds))
        pace = (seconds[-1] - seconds[-2]) / (counts[-1] - counts[-2])
        return float(seconds[-1] + (num_microbatches - counts[-1]) * pace)

    def exact_step_s(self, num_microbatches: int) -> float:
        """Return the seconds of a step action by action (of a long one: its start, then its pace); no reduction."""
        if num_microbatches in self.counts:
            return self.step_s(num_microbatches)
        law = self.table.problem.vocabulary.step_law
        seconds_of = exact_step_seconds if num_microbatches * len(self.chosen) <= _EXACT_UP_TO else step_seconds
        return float(seconds_of(self.pipelines(), num_microbatches, law, self.schedule)[0]) + self.update_s

    def reduce_s(self, num_replicas: int, used: tuple[int, ...] | None = None) -> float:
        """Return the seconds in which its slowest rank reduces its gradients, with replicas on the used pools."""
        first, end = list(self.bounds[:-1]), list(self.bounds[1:])
        seconds = self.table.reduce_s_cached(num_replicas, used)[list(self.chosen), first, end]
        if self.num_ranks == len(self.chosen):
            return float(seconds.max())
        return float(np.bincount(self.rank_of_stage, weights=seconds).max())
