"""Shapes: many replicas of one depth and schedule as arrays; all of a small problem's.

Pure. What does not fit is left out; `columns` turns them into columns one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product

import numpy as np

from hybrid.scheduler.search.columns import Column
from hybrid.scheduler.search.options import Array, Ints, OptionTable
from hybrid.scheduler.search.orders import layout_of, stages_a_rank
from hybrid.scheduler.search.pace import step_seconds
from hybrid.scheduler.search.problem import Problem

_MOST_COUNTS = 256
"""Microbatches of a replica up to which each number is looked at."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shapes:
    """N replicas' shapes.

    Shapes:
        chosen: (N, stages), options of `table`.  bounds: (N, stages + 1).  chips: (N, pools).
        counts: (C,), rising.  seconds: (N, C), of a step of so many microbatches, the optimizer included; infinite
        where memory does not suffice.
    """

    table: OptionTable
    schedule: str
    chosen: Ints
    bounds: Ints
    chips: Ints
    counts: Ints
    seconds: Array

    def __len__(self) -> int:
        return len(self.chosen)

    def reduce_s(self, num_replicas: int, used: tuple[int, ...] | None = None) -> Array:
        """Return the seconds in which each one's slowest rank reduces its gradients, with replicas on the used pools.

        Shapes:
            returns: (N,)
        """
        all_s = self.table.reduce_s_cached(num_replicas, used)
        seconds = all_s[self.chosen, self.bounds[:, :-1], self.bounds[:, 1:]]
        ranks = self.chosen.shape[1] // stages_a_rank(self.schedule)
        if ranks == self.chosen.shape[1]:
            return np.asarray(seconds.max(axis=1))
        home = np.array(layout_of(self.schedule, ranks))
        return np.asarray(np.stack([seconds[:, home == rank].sum(axis=1) for rank in range(ranks)]).max(axis=0))

    def column(self, row: int) -> Column:
        """Return one of them."""
        return Column(
            table=self.table,
            chosen=tuple(self.chosen[row].tolist()),
            bounds=tuple(self.bounds[row].tolist()),
            chips=tuple(self.chips[row].tolist()),
            counts=self.counts.astype(np.float64),
            seconds=self.seconds[row],
            schedule=self.schedule,
        )

    def columns(self) -> list[Column]:
        """Return all of them."""
        return [self.column(row) for row in range(len(self))]


def measure_shapes(
    table: OptionTable, chosen: Ints, bounds: Ints, counts: Ints, *, capped: bool, schedule: str = "1f1b"
) -> Shapes:
    """Return those of N shapes of one depth that fit with one microbatch or more.

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
    most = _most_microbatches(table, chosen, bounds, counts if capped else None, home, schedule)
    kept = most > 0
    chosen, bounds, most = chosen[kept], bounds[kept], most[kept]
    law = table.problem.vocabulary.step_law
    seconds = np.empty((len(chosen), len(counts)))
    if len(chosen):
        pipelines = table.pipelines(chosen, bounds)
        update_s = table.update_s[chosen].max(axis=1)
        for place, count in enumerate(counts):
            seconds[:, place] = step_seconds(pipelines, int(count), law, schedule) + update_s
    seconds[counts[None, :] > most[:, None]] = np.inf
    seconds = np.maximum.accumulate(seconds, axis=1)  # one more never counts for less, whatever an order's rounding
    usable = np.isfinite(seconds[:, 0])
    hosts = chosen[usable][:, home]
    use = [np.where(table.pool_of[hosts] == pool, table.chips[hosts], 0).sum(axis=1) for pool in table.pools]
    return Shapes(
        table=table,
        schedule=schedule,
        chosen=chosen[usable],
        bounds=bounds[usable],
        chips=np.stack(use, axis=1).astype(np.intp),
        counts=counts,
        seconds=seconds[usable],
    )


def _most_microbatches(
    table: OptionTable, chosen: Ints, bounds: Ints, counts: Ints | None, home: Ints, schedule: str
) -> Array:
    """Return how many microbatches of a step fit: infinite where any number does, 0 where none."""
    limit = table.limit_bytes[chosen[:, home]]
    most: Array = np.zeros(len(chosen))
    fits = np.asarray(np.ones(len(chosen), dtype=bool))
    if counts is None or not table.problem.memory.capped_by_microbatches:
        fits = np.asarray((table.peak_bytes(chosen, bounds, None, schedule) <= limit).all(axis=1))
        return np.where(fits, np.inf, 0.0)
    for held in counts.tolist():
        fits = np.asarray(fits & (table.peak_bytes(chosen, bounds, held, schedule) <= limit).all(axis=1))
        most = np.where(fits, held, most)
        if schedule != "gpipe" and held > 4 * len(home):
            break  # more are never held
    return np.where(fits, np.inf, most)


def measure_columns(
    table: OptionTable, chosen: Ints, bounds: Ints, counts: Ints, *, capped: bool, schedule: str = "1f1b"
) -> list[Column]:
    """Return `measure_shapes` as columns."""
    return measure_shapes(table, chosen, bounds, counts, capped=capped, schedule=schedule).columns()


def enumerate_columns(tables: list[OptionTable], *, most: int) -> list[Column] | None:
    """Return every column of a small problem, or None where there are more than `most`."""
    shapes = enumerate_shapes(tables, most=most)
    return None if shapes is None else [column for part in shapes for column in part.columns()]


def enumerate_shapes(tables: list[OptionTable], *, most: int, cuts: Ints | None = None) -> list[Shapes] | None:
    """Return every shape of a small problem, or None where there are more than `most`.

    Args:
        tables: one a microbatch size.
        most: shapes.
        cuts: the layers before which a stage may start, and the end; default: every layer.
    """
    found: list[Shapes] = []
    num_shapes = 0
    for table in tables:
        problem = table.problem
        counts = np.arange(1, -(-problem.global_batch // table.microbatch) + 1)
        if len(counts) > _MOST_COUNTS:
            return None
        places = np.arange(table.num_layers + 1) if cuts is None else cuts
        depth_most = min(problem.vocabulary.max_stages, len(places) - 1)
        by_depth: dict[int, list[tuple[int, ...]]] = {}
        for index, chosen in enumerate(_sequences(table, depth_most)):
            if index >= most:
                return None
            by_depth.setdefault(len(chosen), []).append(chosen)
        for (depth, sequences), schedule in product(by_depth.items(), enumerable(problem)):
            layout = np.array(layout_of(schedule, depth))
            if not _is_allowed(problem, len(layout), depth, schedule) or len(layout) >= len(places):
                continue
            num_shapes += len(sequences) * math.comb(len(places) - 2, len(layout) - 1)
            if num_shapes > most:
                return None
            splits = np.array(list(combinations(places[1:-1], len(layout) - 1)), dtype=np.intp)
            ends = np.full((len(splits), 1), table.num_layers)
            splits = np.hstack([0 * ends, splits.reshape(len(ends), -1), ends])
            rows = np.repeat(np.array(sequences, dtype=np.intp)[:, layout], len(splits), axis=0)
            bounds = np.tile(splits, (len(sequences), 1))
            found.append(measure_shapes(table, rows, bounds, counts, capped=True, schedule=schedule))
    return [part for part in found if len(part)]


def laid_out(
    problem: Problem, ranks: Sequence[int], held: Sequence[int], schedule: str
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return the stages' options and cuts of ranks that hold so many layers each; None where the schedule cannot.

    Args:
        problem: its vocabulary bounds the stages.
        ranks: the option of each pipeline rank.
        held: layers of each; a rank of several stages has them halved.
        schedule: decides where the stages lie.
    """
    layout, per_rank = layout_of(schedule, len(ranks)), stages_a_rank(schedule)
    words, rest = problem.vocabulary, list(held)
    most = min(words.max_stages, problem.table.num_layers)
    if words.num_stages not in (None, len(layout)) or len(layout) > most or min(rest) < per_rank:
        return None
    left, bounds = [per_rank] * len(ranks), [0]
    for rank in layout:
        part = -(-rest[rank] // left[rank])
        rest[rank] -= part
        left[rank] -= 1
        bounds.append(bounds[-1] + part)
    return tuple(ranks[rank] for rank in layout), tuple(bounds)


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
