"""Exact: the best choice among all shapes of a small problem.

Pure. For every number of replicas and every bound on the reduction, the least step by bisection; at a given
step a knapsack over the chips says how many samples the best replicas take.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from hybrid.scheduler.search.choice import Choice, share_out
from hybrid.scheduler.search.columns import Column
from hybrid.scheduler.search.options import Array, Ints
from hybrid.scheduler.search.problem import Problem
from hybrid.scheduler.search.shapes import Shapes

_ROUNDS = 30
_MOST_POOLS = 4
"""Pools up to which every set of them is tried."""


def choose_exactly(problem: Problem, shapes: list[Shapes]) -> Choice | None:
    """Return the choice with the best score that keeps the limits, or None where there is none."""
    best: Choice | None = None
    most = min(problem.vocabulary.max_replicas or problem.num_chips, problem.num_chips)
    if not shapes:
        return None
    every = _All(shapes)
    for num_replicas in range(1, most + 1):
        for used in _sets(problem, alone=num_replicas == 1):
            reduce_s = np.concatenate([part.reduce_s(num_replicas, used) for part in shapes])
            reduce_s[every.leaves(used)] = np.inf
            best = _improved(problem, every, reduce_s, num_replicas, best)
    return best


def _improved(problem: Problem, every: _All, reduce_s: Array, num_replicas: int, best: Choice | None) -> Choice | None:
    """Return a better choice of so many replicas with these reductions, or the one given."""
    kept = every.undominated(reduce_s)
    if not len(kept):
        return best
    knapsack = _Knapsack(problem, every, kept, reduce_s[kept], num_replicas)
    for limit_s in np.unique(reduce_s[kept]):
        if best is not None and problem.objective == "throughput" and limit_s >= best.step_s:
            break
        best = knapsack.improve(best, float(limit_s))
    return best


def _sets(problem: Problem, *, alone: bool) -> Iterable[tuple[int, ...]]:
    """Yield sets of pools that replicas may be on together: a slow link counts only where both its ends are used."""
    pools = tuple(range(len(problem.pools)))
    if alone:  # nothing is reduced
        return [pools]
    sizes = range(1, len(pools) + 1) if len(pools) <= _MOST_POOLS else (1, len(pools))
    return [chosen for size in sizes for chosen in combinations(pools, size)]


class _All:
    """Shapes of every kind in one row of arrays."""

    def __init__(self, shapes: list[Shapes]) -> None:
        self.shapes = shapes
        width = max((part.seconds.shape[1] for part in shapes), default=1)
        padded = [np.pad(p.seconds, ((0, 0), (0, width - p.seconds.shape[1])), constant_values=np.inf) for p in shapes]
        self.seconds = np.concatenate(padded) if padded else np.empty((0, width))
        self.samples = np.array([float(part.table.microbatch) for part in shapes for _ in range(len(part))])
        self.chips = np.concatenate([part.chips for part in shapes]) if shapes else np.empty((0, 1), dtype=np.intp)
        keys = np.column_stack([self.chips, self.samples.astype(np.intp)])
        self.kind = np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)
        self.starts = np.cumsum([0, *(len(part) for part in shapes)])

    def leaves(self, used: tuple[int, ...]) -> NDArray[np.bool_]:
        """Return which of them use another pool."""
        others = [pool for pool in range(self.chips.shape[1]) if pool not in used]
        return np.asarray(self.chips[:, others].any(axis=1))

    def undominated(self, reduce_s: Array) -> Ints:
        """Return those with a finite reduction that no other with the same chips and microbatch beats at everything."""
        order = np.lexsort((reduce_s, self.kind))
        order = order[np.isfinite(reduce_s[order])]
        ends = np.flatnonzero(np.diff(self.kind[order], append=-1)) + 1
        kept, first = [], 0
        for end in map(int, ends):
            rows = order[first:end]
            seconds = self.seconds[rows]
            before = np.minimum.accumulate(seconds, axis=0)
            better = np.ones(len(rows), dtype=bool)
            better[1:] = (seconds[1:] < before[:-1]).any(axis=1)
            kept.append(rows[better])
            first = end
        return np.sort(np.concatenate(kept)) if kept else np.empty(0, dtype=np.intp)

    def column(self, row: int) -> Column:
        """Return one of them."""
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.shapes[part].column(row - int(self.starts[part]))


class _Knapsack:
    """Shapes for one number of replicas."""

    def __init__(self, problem: Problem, every: _All, kept: Ints, reduce_s: Array, num_replicas: int) -> None:
        self.problem, self.every, self.kept = problem, every, kept
        self.reduce_s, self.num_replicas = reduce_s, num_replicas
        self.samples, self.seconds = every.samples[kept], every.seconds[kept]
        found, place = np.unique(every.chips[kept], axis=0, return_inverse=True)
        self.vectors = [tuple(map(int, vector)) for vector in found]
        self.rows = [np.flatnonzero(place.reshape(-1) == index) for index in range(len(found))]
        self.shape = tuple(pool.num_chips + 1 for pool in problem.pools)
        # Chips at any prices bound what replicas take: all alike, and each pool by itself.
        count = len(problem.pools)
        prices = np.vstack([np.ones(count), 1.0 / np.array([n.num_chips for n in problem.pools]), np.eye(count) + 1e-3])
        self.prices = prices
        self.worth = prices @ found.T.astype(np.float64)  # (prices, vectors)

    def improve(self, best: Choice | None, limit_s: float) -> Choice | None:
        """Return a better choice whose reduction takes `limit_s` at most, or the one given."""
        for corner in self._corners():
            high = self._ceiling_s(best, corner, limit_s)
            if not self._takes(high - limit_s, limit_s, corner):
                continue
            low = limit_s
            for _ in range(_ROUNDS):
                middle = (low + high) / 2
                low, high = (low, middle) if self._takes(middle - limit_s, limit_s, corner) else (middle, high)
            found = share_out(self.problem, self._replicas(high - limit_s, limit_s, corner))
            if found is not None and found.keeps_limits and (best is None or found.score < best.score):
                best = found
        return best

    def _corners(self) -> Iterable[tuple[int, ...]]:
        """Yield the numbers of chips to plan with: all, or, where chips cost, every smaller fleet too."""
        limits = self.problem.limits
        if self.problem.objective == "throughput" and limits.max_usd_per_hour is None and limits.max_watts is None:
            return [tuple(size - 1 for size in self.shape)]
        return (tuple(map(int, corner)) for corner in np.ndindex(*self.shape) if any(corner))

    def _ceiling_s(self, best: Choice | None, corner: tuple[int, ...], limit_s: float) -> float:
        """Return the step above which a choice on so many chips is of no use."""
        slowest = float(self.seconds[np.isfinite(self.seconds)].max()) + limit_s
        if best is None or self.problem.objective != "throughput":
            return slowest
        return min(slowest, best.step_s * (1 - 1e-9))

    def _values(self, seconds: float, limit_s: float) -> tuple[list[float], list[int]]:
        """Return, by vector of chips, the most samples in so many seconds and the row that takes them."""
        taken = (self.seconds <= seconds).sum(axis=1) * self.samples
        taken[self.reduce_s > limit_s] = 0
        best = [int(rows[np.argmax(taken[rows])]) for rows in self.rows]
        return [float(taken[row]) for row in best], best

    def _layers(self, values: list[float]) -> list[Array]:
        """Return the most samples of 0, 1, … replicas on every number of chips."""
        most = [np.where(np.ones(self.shape, dtype=bool), 0.0, 0.0)]
        for _ in range(self.num_replicas):
            before, after = most[-1], np.full(self.shape, -np.inf)
            for vector, value in zip(self.vectors, values, strict=True):
                if value <= 0:
                    continue
                target = tuple(slice(n, None) for n in vector)
                source = tuple(slice(0, size - n) for n, size in zip(vector, self.shape, strict=True))
                np.maximum(after[target], before[source] + value, out=after[target])
            most.append(after)
        return most

    def _takes(self, seconds: float, limit_s: float, corner: tuple[int, ...]) -> bool:
        values, _ = self._values(seconds, limit_s)
        most = (np.array(values) / self.worth).max(axis=1) * (self.prices @ np.array(corner))
        if min(float(most.min()), self.num_replicas * max(values)) < self.problem.global_batch * (1 - 1e-9):
            return False
        return bool(self._layers(values)[-1][corner] >= self.problem.global_batch)

    def _replicas(self, seconds: float, limit_s: float, corner: tuple[int, ...]) -> list[tuple[Column, int]]:
        values, rows = self._values(seconds, limit_s)
        layers = self._layers(values)
        counts: dict[int, int] = {}
        for depth in range(self.num_replicas, 0, -1):
            for vector, value, row in zip(self.vectors, values, rows, strict=True):
                before = tuple(c - n for c, n in zip(corner, vector, strict=True))
                if value > 0 and min(before) >= 0 and layers[depth - 1][before] + value == layers[depth][corner]:
                    counts[row] = counts.get(row, 0) + 1
                    corner = before
                    break
        return [(self.every.column(int(self.kept[row])), count) for row, count in counts.items()]
