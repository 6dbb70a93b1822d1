"""Columns: replicas of one shape, with the seconds of a step by their number of microbatches.

Pure. A column of the planner's linear program; `enumerate_columns` makes all of a small problem,
`generate.py` the promising ones of a large one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from hybrid.scheduler.search.options import Array, Ints, OptionTable
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

    @property
    def key(self) -> tuple[object, ...]:
        """What makes two columns the same."""
        return self.table.microbatch, self.chosen, self.bounds

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
        return float(seconds_of(self.pipelines(), num_microbatches, law)[0]) + self.update_s

    def reduce_s(self, num_replicas: int) -> float:
        """Return the seconds in which its slowest stage reduces its gradients."""
        first, end = list(self.bounds[:-1]), list(self.bounds[1:])
        return float(self.table.reduce_s_cached(num_replicas)[list(self.chosen), first, end].max())


def measure_columns(table: OptionTable, chosen: Ints, bounds: Ints, counts: Ints, *, capped: bool) -> list[Column]:
    """Return the columns of N shapes of one depth, those that fit with one microbatch or more.

    Args:
        table: of the microbatch size.
        chosen: options.
        bounds: first layers and the end.
        counts: numbers of microbatches at which to compute the step.
        capped: look up how many microbatches fit; without, every number must.

    Shapes:
        chosen: (N, P).  bounds: (N, P + 1).
    """
    depth = chosen.shape[1]
    limit = table.limit_bytes[chosen]
    steps = [depth] if not (capped and table.problem.memory.capped_by_microbatches) else range(1, depth + 1)
    most = np.zeros(len(chosen))
    for held in steps:
        fits = (table.peak_bytes(chosen, bounds, held) <= limit).all(axis=1)
        most = np.where(fits, np.inf if held == depth else held, most)
    kept = most > 0
    chosen, bounds, most = chosen[kept], bounds[kept], most[kept]
    if not len(chosen):
        return []
    pipelines = table.pipelines(chosen, bounds)
    law = table.problem.vocabulary.step_law
    update_s = table.update_s[chosen].max(axis=1)
    seconds = np.stack([step_seconds(pipelines, int(m), law) + update_s for m in counts], axis=1)
    seconds[counts[None, :] > most[:, None]] = np.inf
    usable = np.isfinite(seconds[:, 0])
    pools = len(table.problem.pools)
    return [
        Column(
            table=table,
            chosen=tuple(map(int, chosen[row])),
            bounds=tuple(map(int, bounds[row])),
            chips=tuple(
                int(table.chips[chosen[row]][table.pool_of[chosen[row]] == pool].sum()) for pool in range(pools)
            ),
            counts=counts.astype(np.float64),
            seconds=seconds[row],
        )
        for row in np.flatnonzero(usable)
    ]


def enumerate_columns(tables: list[OptionTable], *, most: int) -> list[Column] | None:
    """Return every column of a small problem, or None where there are more than `most`."""
    columns: list[Column] = []
    shapes = 0
    for table in tables:
        problem = table.problem
        counts = np.arange(1, -(-problem.global_batch // table.microbatch) + 1)
        if len(counts) > 64:
            return None
        depth_most = min(problem.vocabulary.max_stages, table.num_layers)
        by_depth: dict[int, list[tuple[int, ...]]] = {}
        for chosen in _sequences(table, depth_most):
            by_depth.setdefault(len(chosen), []).append(chosen)
            if sum(map(len, by_depth.values())) > most:
                return None
        for depth, sequences in by_depth.items():
            cuts = np.array(
                [(0, *inner, table.num_layers) for inner in combinations(range(1, table.num_layers), depth - 1)],
                dtype=np.intp,
            )
            shapes += len(sequences) * len(cuts)
            if shapes > most:
                return None
            chosen_rows = np.repeat(np.array(sequences, dtype=np.intp), len(cuts), axis=0)
            bounds = np.tile(cuts, (len(sequences), 1))
            columns += measure_columns(table, chosen_rows, bounds, counts, capped=True)
    return columns


def _sequences(table: OptionTable, depth_most: int) -> Iterator[tuple[int, ...]]:
    """Yield every sequence of options that the chips allow."""
    left = [pool.num_chips for pool in table.problem.pools]

    def extend(chosen: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if chosen:
            yield chosen
        if len(chosen) == depth_most:
            return
        for index, option in enumerate(table.options):
            if left[option.pool] >= option.num_chips:
                left[option.pool] -= option.num_chips
                yield from extend((*chosen, index))
                left[option.pool] += option.num_chips

    yield from extend(())
