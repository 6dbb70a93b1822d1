"""Exact: the best choice among all columns of a small problem.

Pure. For every number of replicas and every bound on the reduction, the least step by bisection; at a given
step a knapsack over the chips says how many samples the best replicas take.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from hybrid.scheduler.search.choice import Choice, share_out
from hybrid.scheduler.search.columns import Column
from hybrid.scheduler.search.options import Array
from hybrid.scheduler.search.problem import Problem

_ROUNDS = 30


def choose_exactly(problem: Problem, columns: list[Column]) -> Choice | None:
    """Return the choice with the best score that keeps the limits, or None where there is none."""
    best: Choice | None = None
    most = min(problem.vocabulary.max_replicas or problem.num_chips, problem.num_chips)
    for num_replicas in range(1, most + 1):
        reduce_s = np.array([column.reduce_s(num_replicas) for column in columns])
        kept = _undominated(columns, reduce_s)
        if not kept:
            continue
        knapsack = _Knapsack(problem, [columns[index] for index in kept], reduce_s[kept], num_replicas)
        for limit_s in np.unique(reduce_s[kept]):
            if np.isfinite(limit_s):
                best = knapsack.improve(best, float(limit_s))
    return best


def _undominated(columns: list[Column], reduce_s: Array) -> list[int]:
    """Return the columns that no other with the same chips and microbatch beats at everything."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index in np.argsort(reduce_s, kind="stable"):
        column = columns[index]
        groups.setdefault((column.chips, column.samples), []).append(int(index))
    kept = []
    for group in groups.values():
        least = np.full(len(columns[group[0]].seconds), np.inf)
        for index in group:
            if np.any(columns[index].seconds < least):
                kept.append(index)
                least = np.minimum(least, columns[index].seconds)
    return sorted(kept)


class _Knapsack:
    """Columns for one number of replicas."""

    def __init__(self, problem: Problem, columns: list[Column], reduce_s: Array, num_replicas: int) -> None:
        self.problem, self.columns, self.reduce_s, self.num_replicas = problem, columns, reduce_s, num_replicas
        self.samples = np.array([column.samples for column in columns], dtype=np.float64)
        width = max(len(column.seconds) for column in columns)
        self.seconds = np.full((len(columns), width), np.inf)
        for row, column in enumerate(columns):
            self.seconds[row, : len(column.seconds)] = column.seconds
        vectors: dict[tuple[int, ...], list[int]] = {}
        for row, column in enumerate(columns):
            vectors.setdefault(column.chips, []).append(row)
        self.vectors = list(vectors)
        self.rows = [np.array(rows) for rows in vectors.values()]
        self.shape = tuple(pool.num_chips + 1 for pool in problem.pools)

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
        return [(self.columns[row], count) for row, count in counts.items()]
