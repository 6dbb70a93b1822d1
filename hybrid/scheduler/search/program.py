"""The program: how many replicas of each column, by linear and integer programs (HiGHS).

Pure. At a step's length T each column takes a number of samples; chips, prices and watts are rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from hybrid.scheduler.search.choice import Choice, share_out
from hybrid.scheduler.search.columns import Column
from hybrid.scheduler.search.generate import Takes
from hybrid.scheduler.search.options import Array
from hybrid.scheduler.search.problem import Problem

_INTEGER_UP_TO = 8192
"""Chips up to which replicas are counted by an integer program; beyond, rounding costs next to nothing."""
FEW_CHIPS = 64
"""Chips up to which each number of replicas is planned for by itself."""
_NODES = 40
"""Of an integer program's tree: a count, not a time, so that a plan is the same on a busy machine."""
_STEPS = 16
_STRETCHES = tuple(float(x) for x in np.geomspace(1.0, 64.0, 19))
"""Steps tried where cost counts, as multiples of the fastest."""


@dataclass(frozen=True, slots=True)
class Solved:
    """A linear program's answer."""

    value: float
    counts: Array
    prices: Array
    """What one more chip of each pool is worth."""


class Program:
    """Counts of columns."""

    def __init__(self, problem: Problem, columns: list[Column], num_replicas: int) -> None:
        self.problem, self.columns = problem, columns
        self.use = np.array([column.chips for column in columns], dtype=np.float64).reshape(len(columns), -1)
        self.reduce_s = np.array([column.reduce_s(num_replicas) for column in columns])
        self.takes = Takes(columns, problem.global_batch)
        pools = problem.pools
        self.usd = self.use @ np.array([pool.usd_per_hour for pool in pools])
        self.watts = self.use @ np.array([pool.watts for pool in pools])
        rows, limits = [self.use.T], [np.array([pool.num_chips for pool in pools], dtype=np.float64)]
        for weights, limit in ((self.usd, problem.limits.max_usd_per_hour), (self.watts, problem.limits.max_watts)):
            if limit is not None:
                rows.append(weights[None, :])
                limits.append(np.array([limit]))
        most = problem.vocabulary.max_replicas
        if problem.num_chips <= FEW_CHIPS:
            # Here a replica more or less decides what a reduction costs.
            most = min(num_replicas, most or num_replicas)
        if most is not None:
            rows.append(np.ones((1, len(columns))))
            limits.append(np.array([float(most)]))
        self.rows, self.limits = np.vstack(rows), np.concatenate(limits)
        self.cost = self.watts if problem.objective == "joules_per_token" else self.usd

    def reduction_limits(self, shares: tuple[float, ...]) -> list[float]:
        """Return bounds on the reduction that these shares of the columns keep to."""
        finite = self.reduce_s[np.isfinite(self.reduce_s)]
        return [float(x) for x in np.unique(np.quantile(finite, shares, method="nearest"))] if len(finite) else []

    def values(self, step_s: float, limit_s: float) -> Array:
        """Return the samples of each column in a step whose reduction takes `limit_s`."""
        taken = self.takes.samples_in(step_s - limit_s)
        taken[self.reduce_s > limit_s * (1 + 1e-12)] = 0
        return taken

    def most_samples(self, values: Array) -> Solved:
        """Return the most samples that fractions of replicas take."""
        used = np.flatnonzero(values > 0)
        counts = np.zeros(len(values))
        pools = len(self.problem.pools)
        if not len(used):
            return Solved(0.0, counts, np.zeros(pools))
        scale = float(values.max())
        found = linprog(-values[used] / scale, A_ub=self.rows[:, used], b_ub=self.limits, method="highs")
        if found.x is None or found.fun is None:
            return Solved(0.0, counts, np.zeros(pools))
        counts[used] = found.x
        return Solved(-float(found.fun) * scale, counts, np.maximum(-found.ineqlin.marginals[:pools], 0.0))

    def fastest(self, limit_s: float, start_s: float) -> tuple[float, Solved] | None:
        """Return the least step in which fractions of replicas take the batch, within a thousandth."""
        batch, low, high = self.problem.global_batch, limit_s, np.inf
        step_s, best = max(start_s, limit_s), None
        for _ in range(_STEPS):
            solved = self.most_samples(self.values(step_s, limit_s))
            if solved.value >= batch:
                high, best = step_s, solved
            else:
                low = step_s
            if high - low < 1e-3 * high:
                break
            # Samples grow about in proportion to the time beyond the reduction.
            aim = limit_s + (step_s - limit_s) * batch / solved.value * 1.0005 if solved.value > 0 else 4 * step_s
            inside = low + 0.02 * (min(high, 8 * low + 1e-9) - low) < aim < high - 0.02 * (high - low)
            step_s = aim if inside and aim > low else ((low + high) / 2 if np.isfinite(high) else max(2 * low, aim))
        return None if best is None else (float(high), best)

    def integers(self, step_s: float, limit_s: float, solved: Solved) -> list[Choice]:
        """Return choices with whole replicas near a linear program's answer."""
        values = self.values(step_s, limit_s)
        drafts = [self._filled(np.floor(solved.counts + 1e-6), values)]
        if sum(pool.num_chips for pool in self.problem.pools) <= _INTEGER_UP_TO:
            whole = self._whole(values, cost=None)
            if whole is not None:
                drafts.append(whole)
        return self._shared(drafts)

    def cheapest(self, fastest_s: float, limit_s: float) -> list[Choice]:
        """Return choices of least cost at several lengths of the step."""
        choices: list[Choice] = []
        cap = self.problem.limits.wanted_tokens_per_s
        longest = self.problem.tokens_per_step / cap if cap else np.inf
        steps = [fastest_s * stretch for stretch in _STRETCHES if fastest_s * stretch <= longest]
        for step_s in [*steps, *([longest] if np.isfinite(longest) else [])]:
            whole = self._whole(self.values(step_s, limit_s), cost=self.cost)
            if whole is not None:
                choices += self._shared([whole])
        return choices

    def _whole(self, values: Array, cost: Array | None) -> Array | None:
        """Return whole replicas: the most samples, or, with a cost, the cheapest that take the batch."""
        used = np.flatnonzero(values > 0)
        if not len(used):
            return None
        constraints = [LinearConstraint(self.rows[:, used], -np.inf, self.limits)]
        aim = -values[used]
        if cost is not None:
            batch = float(self.problem.global_batch)
            constraints.append(LinearConstraint(values[used][None, :], batch, np.inf))
            aim = cost[used]
        found = milp(
            aim,
            integrality=np.ones(len(used), dtype=np.intp),
            bounds=Bounds(0, np.inf),
            constraints=constraints,
            options={"node_limit": _NODES, "mip_rel_gap": 2e-3},
        )
        if found.x is None:
            return None
        counts = np.zeros(len(values))
        counts[used] = np.rint(found.x)
        return counts

    def _filled(self, counts: Array, values: Array) -> Array:
        """Add whole replicas where chips are left, those that take most of what is left first."""
        left = self.limits - self.rows @ counts
        share = self.rows.T / np.maximum(self.limits, 1e-9)
        order = np.argsort(-values / np.maximum(share.max(axis=1), 1e-12))
        for row in order[:64]:
            need = self.rows[:, row]
            if values[row] > 0:
                more = np.floor(np.min(np.where(need > 0, left / np.maximum(need, 1e-12), np.inf)) + 1e-9)
                if more > 0:
                    counts[row] += more
                    left = left - more * need
        return counts

    def _shared(self, drafts: list[Array]) -> list[Choice]:
        found = []
        for counts in drafts:
            replicas = [(self.columns[row], int(counts[row])) for row in np.flatnonzero(counts > 0.5)]
            choice = share_out(self.problem, replicas)
            if choice is not None:
                found.append(choice)
        return found
