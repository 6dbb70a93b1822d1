"""Columns: replicas of one shape, with the seconds of a step by their number of microbatches.

Pure. A column of the planner's linear program; `enumerate_columns` makes all of a small problem,
`generate.py` the promising ones of a large one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from hybrid.scheduler.search.options import Array, Ints, Option, OptionTable
from hybrid.scheduler.search.orders import layout_of, order_of, stages_a_rank
from hybrid.scheduler.search.pace import Pipelines, exact_step_seconds, step_seconds
from hybrid.scheduler.search.problem import Problem

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

    def reduce_s(self, num_replicas: int) -> float:
        """Return the seconds in which its slowest rank reduces its gradients."""
        first, end = list(self.bounds[:-1]), list(self.bounds[1:])
        seconds = self.table.reduce_s_cached(num_replicas)[list(self.chosen), first, end]
        if self.num_ranks == len(self.chosen):
            return float(seconds.max())
        return float(np.bincount(self.rank_of_stage, weights=seconds).max())


def measure_columns(
    table: OptionTable, chosen: Ints, bounds: Ints, counts: Ints, *, capped: bool, schedule: str = "1f1b"
) -> list[Column]:
    """Return the columns of N shapes of one depth, those that fit with one microbatch or more.

    Args:
        table: of the microbatch size.
        chosen: options.
        bounds: first layers and the end.
        counts: numbers of microbatches at which to compute the step.
        capped: look up how many microbatches fit; without, every number must.
        schedule: of all.

    Shapes:
        chosen: (N, P).  bounds: (N, P + 1).
    """
    ranks = chosen.shape[1] // stages_a_rank(schedule)
    home = np.array([layout_of(schedule, ranks).index(rank) for rank in range(ranks)])
    limit = table.limit_bytes[chosen[:, home]]
    most, fits = np.zeros(len(chosen)), np.ones(len(chosen), dtype=bool)
    for held in counts if capped and table.problem.memory.capped_by_microbatches else [None]:
        fits = fits & (table.peak_bytes(chosen, bounds, held, schedule) <= limit).all(axis=1)
        most = np.where(fits, np.inf if held is None else held, most)
        if held is not None and schedule != "gpipe" and held > 4 * ranks:
            break  # more are never held
    most = np.where(fits, np.inf, most)
    kept = most > 0
    chosen, bounds, most = chosen[kept], bounds[kept], most[kept]
    if not len(chosen):
        return []
    pipelines = table.pipelines(chosen, bounds)
    law = table.problem.vocabulary.step_law
    update_s = table.update_s[chosen].max(axis=1)
    seconds = np.stack([step_seconds(pipelines, int(m), law, schedule) + update_s for m in counts], axis=1)
    seconds[counts[None, :] > most[:, None]] = np.inf
    seconds = np.maximum.accumulate(seconds, axis=1)  # one more never counts for less, whatever an order's rounding
    usable = np.isfinite(seconds[:, 0])
    pools, hosts = len(table.problem.pools), chosen[:, home]
    return [
        Column(
            table=table,
            chosen=tuple(map(int, chosen[row])),
            bounds=tuple(map(int, bounds[row])),
            chips=tuple(int(table.chips[hosts[row]][table.pool_of[hosts[row]] == pool].sum()) for pool in range(pools)),
            counts=counts.astype(np.float64),
            seconds=seconds[row],
            schedule=schedule,
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
        for (depth, sequences), schedule in product(by_depth.items(), enumerable(problem)):
            layout = np.array(layout_of(schedule, depth))
            if not _is_allowed(problem, len(layout), depth, schedule):
                continue
            cuts = np.array(
                [(0, *inner, table.num_layers) for inner in combinations(range(1, table.num_layers), len(layout) - 1)],
                dtype=np.intp,
            )
            shapes += len(sequences) * len(cuts)
            if shapes > most:
                return None
            chosen_rows = np.repeat(np.array(sequences, dtype=np.intp)[:, layout], len(cuts), axis=0)
            bounds = np.tile(cuts, (len(sequences), 1))
            columns += measure_columns(table, chosen_rows, bounds, counts, capped=True, schedule=schedule)
    return columns


def enumerable(problem: Problem) -> tuple[str, ...]:
    """Return the schedules whose columns are enumerated: all named ones of the vocabulary; `auto` follows 1F1B."""
    names = tuple(dict.fromkeys("1f1b" if name == "auto" else name for name in problem.vocabulary.schedules))
    return ("1f1b",) if problem.vocabulary.step_law == "sailor" else names


def _is_allowed(problem: Problem, num_stages: int, num_ranks: int, schedule: str) -> bool:
    """Return whether a pipeline may have so many stages; one rank needs no more than one schedule."""
    words = problem.vocabulary
    if num_ranks == 1:
        names = enumerable(problem)
        if schedule != ("1f1b" if "1f1b" in names else names[0]):
            return False
    fits = num_stages <= min(words.max_stages, problem.table.num_layers)
    return fits and words.num_stages in (None, num_stages)


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
