"""Generate: the promising columns of a large problem, by pricing.

Pure. For a step's length, a dynamic program over layers finds, at every price of the pools, the cheapest replica
that takes m microbatches of b samples in that time.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, product

import numpy as np

from hybrid.scheduler.search.cheapest import Cheapest
from hybrid.scheduler.search.columns import Column
from hybrid.scheduler.search.options import Array, Ints, OptionTable
from hybrid.scheduler.search.orders import stages_a_rank
from hybrid.scheduler.search.pace import steady_microbatches
from hybrid.scheduler.search.shapes import enumerable, laid_out, measure_columns

_SHARES = (1.0, 0.5)
"""How long the other stages are taken to be, against the slowest."""
DEPTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32)


class Generator:
    """Columns of one microbatch size, cuts at some of the layers."""

    def __init__(self, table: OptionTable, cuts: Ints, prices: Array) -> None:
        self.table = table
        self.cheapest = Cheapest(table.problem, table, cuts, prices)
        every = np.arange(len(cuts) - 1)
        self.hardest_s = float(self.cheapest.stage_s[:, every, every + 1].min(axis=0).max())
        """No stage is shorter than the longest layer on the option that is fastest at it."""
        names = enumerable(table.problem)
        # GPipe holds all of a step: it is tried on what was found, unless it is the only one.
        self.schedules = tuple(name for name in names if name != "gpipe") or names
        self.seen: set[tuple[object, ...]] = set()

    def columns(
        self, target_s: float, num_replicas: int, counts: Ints, prices: Array, depths: Sequence[int] = DEPTHS
    ) -> list[Column]:
        """Return columns that were not returned before.

        Args:
            target_s: seconds of a step.
            num_replicas: about how many reduce together.
            counts: numbers of microbatches to try.
            prices: of the pools, one row a set.
            depths: numbers of stages to try.
        """
        kernel, table = self.cheapest, self.table
        kernel.price_at(prices)
        limit_s = target_s - table.update_s[:, None, None] - kernel.reduce_s(num_replicas)
        longest_s = float(limit_s.max())
        found: dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
        wanted = table.problem.vocabulary.num_stages
        for depth in [depth for depth in depths if depth <= kernel.depth] if wanted is None else (wanted,):
            seconds = [kernel.seconds(depth, j) for j in range(1, depth + 1)]
            for count, share in product(counts, _SHARES):
                # Few microbatches leave room for unequal stages: they fill faster than the slowest one says.
                if share < 1.0 and not 1 < depth <= count + 1 <= 2 * depth:
                    continue
                slots = count + share * (depth - 1)
                if longest_s < self.hardest_s * slots:
                    continue
                pace_s = limit_s / slots
                allowed = kernel.fits[:depth] & np.stack([stage_s <= pace_s for stage_s in seconds])
                for row, places in kernel.cheapest(kernel.chips(allowed), 0, bound=False) or ():
                    chosen = kernel.options_of(allowed, places, row)
                    bounds = tuple(int(kernel.cuts[place]) for place in places)
                    if (chosen, bounds) not in self.seen:
                        self.seen.add((chosen, bounds))
                        found.setdefault(depth, []).append((chosen, bounds))
        return [
            column
            for depth, shapes in found.items()
            for schedule in (self.schedules if depth > 1 else self.schedules[:1])
            for column in self._measured(depth, shapes, schedule)
        ]

    def _measured(
        self, num_ranks: int, shapes: list[tuple[tuple[int, ...], tuple[int, ...]]], schedule: str
    ) -> list[Column]:
        """Return the columns of some shapes with one stage a rank, laid out for a schedule."""
        problem = self.table.problem
        counts = {1, 2, num_ranks, 2 * num_ranks, steady_microbatches(schedule, num_ranks)}
        if schedule == "gpipe":  # it holds all of the step
            counts.add(-(-problem.global_batch // self.table.microbatch))
        if stages_a_rank(schedule) > 1 and num_ranks > 1:
            ranks = [(chosen, [b - a for a, b in pairwise(bounds)]) for chosen, bounds in shapes]
            laid = [laid_out(problem, chosen, held, schedule) for chosen, held in ranks]
            shapes = [shape for shape in laid if shape is not None]
        if not shapes:
            return []
        return measure_columns(
            self.table,
            np.array([chosen for chosen, _ in shapes], dtype=np.intp),
            np.array([bounds for _, bounds in shapes], dtype=np.intp),
            np.array(sorted(counts)),
            capped=False,
            schedule=schedule if num_ranks > 1 else "1f1b",
        )


class Takes:
    """How many samples each column takes in some seconds: its known steps, then their last pace."""

    def __init__(self, columns: list[Column], most: int) -> None:
        width = max((len(column.counts) for column in columns), default=1)
        self.counts, self.seconds = np.empty((len(columns), width)), np.empty((len(columns), width))
        for row, column in enumerate(columns):
            have = len(column.counts)
            self.counts[row, :have], self.counts[row, have:] = column.counts, column.counts[-1]
            self.seconds[row, :have], self.seconds[row, have:] = column.seconds, column.seconds[-1]
        last = [column.step_s(int(column.counts[-1]) + 1) - column.seconds[-1] for column in columns]
        self.pace_s = np.array(last)
        self.samples = np.array([column.samples for column in columns], dtype=np.float64)
        self.most = np.ceil(most / self.samples)

    def samples_in(self, seconds: float) -> Array:
        """Return the samples of each column.

        Shapes:
            returns: (columns,)
        """
        taken = np.where(seconds >= self.seconds[:, 0], self.counts[:, 0], 0.0)
        for at in range(self.counts.shape[1] - 1):
            low_s, high_s = self.seconds[:, at], self.seconds[:, at + 1]
            low, high = self.counts[:, at], self.counts[:, at + 1]
            share = (seconds - low_s) / np.maximum(high_s - low_s, 1e-30)
            taken = np.where((seconds >= low_s) & (high > low), low + np.minimum(share, 1.0) * (high - low), taken)
        beyond = self.counts[:, -1] + (seconds - self.seconds[:, -1]) / np.maximum(self.pace_s, 1e-30)
        taken = np.where(seconds >= self.seconds[:, -1], beyond, taken)
        return np.asarray(self.samples * np.minimum(np.floor(taken + 1e-9), self.most))
