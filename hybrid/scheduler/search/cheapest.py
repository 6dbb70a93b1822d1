"""Cheapest: the cheapest stages that keep to a pace, at every price of the pools, by a dynamic program over layers.

Pure. What both searches stand on: a replica is worth its price; a pace that no replica keeps at some price is
out of reach (weak duality).
"""

from __future__ import annotations

from itertools import product

import numpy as np
from numpy.typing import NDArray

from hybrid.scheduler.search.options import Array, Ints, OptionTable
from hybrid.scheduler.search.problem import Problem


class Cheapest:
    """One microbatch size, cuts at some of the layers."""

    def __init__(self, problem: Problem, table: OptionTable, cuts: Ints, prices: Array) -> None:
        self.problem, self.table, self.cuts = problem, table, cuts
        self.reductions: dict[int, Array] = {}
        layers, runs = len(cuts) - 1, np.ix_(np.arange(len(table.options)), cuts, cuts)
        self.depth = min(problem.vocabulary.max_stages, layers)
        valid = np.tri(layers + 1, k=-1, dtype=bool).T
        self.fits = np.stack([table.fits(j)[runs] & valid for j in range(1, self.depth + 1)])
        own = np.arange(len(table.options))
        every = table.edge_s[own, own]  # (options, layers + 1)
        edge, back = every[:, cuts], every[:, np.minimum(cuts + 1, table.num_layers)]
        self.stage_s = (table.forward_s + table.backward_s)[runs]
        send_s, return_s = edge[:, None, :], back[:, :, None]
        self.ends_s = {
            "only": self.stage_s,
            "last": self.stage_s + 2 * return_s,
            "inner": self.stage_s + send_s + return_s,
            "first": self.stage_s + send_s,
            "first of many": self.stage_s + 2 * send_s,
        }
        self.least_s = _least_seconds(self.stage_s, layers)
        self.of_pool = [np.flatnonzero(table.pool_of == pool) for pool in range(len(problem.pools))]
        self.is_recompute = np.array([option.recompute for option in table.options], dtype=np.float64)
        self.price_at(prices)

    def price_at(self, prices: Array) -> None:
        """Take other prices of the pools.

        Shapes:
            prices: (prices, pools)
        """
        self.prices = np.maximum(prices, 2.0**-12).astype(np.float32)  # no pool is free
        self.worth = self.prices @ np.array([pool.num_chips for pool in self.problem.pools], dtype=np.float64)
        # Chip-seconds of a sample at each price: what D replicas need, whatever their cuts.
        every = np.arange(len(self.cuts) - 1)
        layers_s = self.stage_s[:, every, every + 1]
        work = (self.prices[:, self.table.pool_of] * self.table.chips)[:, :, None] * layers_s
        self.pace_of_replica_s = float((work.min(axis=1).sum(axis=1) / self.worth).max())

    def reduce_s(self, replicas: int) -> Array:
        if replicas not in self.reductions:
            size = np.ix_(np.arange(len(self.table.options)), self.cuts, self.cuts)
            self.reductions[replicas] = self.table.reduce_s(replicas)[size]
        return self.reductions[replicas]

    def least_reduce_s(self, replicas: int, depth: int) -> float:
        """Return a bound: some stage has its share of the model or more, on no more than the most lanes."""
        whole = self.reduce_s(replicas)[:, 0, -1]
        return float(whole.min()) / depth

    def seconds(self, depth: int, position: int) -> Array:
        """Return compute plus communication with equals, of a stage `position` from the end of `depth`."""
        if depth == 1:
            return self.ends_s["only"]
        if position == depth:
            return self.ends_s["first" if depth <= 3 else "first of many"]
        return self.ends_s["last" if position == 1 else "inner"]

    def chips(self, allowed: NDArray[np.bool_]) -> Array:
        """Return the fewest chips of each pool that hold a run of layers at each position from the end.

        Shapes:
            allowed: (positions, options, layers + 1, layers + 1).  returns: (positions, pools, …)
        """
        fewest = np.full((len(allowed), len(self.of_pool), *allowed.shape[2:]), np.inf, dtype=np.float32)
        for pool, options in enumerate(self.of_pool):
            for index in options[np.argsort(-self.table.chips[options])]:
                fewest[:, pool][allowed[:, index]] = self.table.chips[index]
        return fewest

    def options_of(self, allowed: NDArray[np.bool_], bounds: tuple[int, ...], row: int) -> tuple[int, ...]:
        """Return the option of each stage at one price: the cheapest that is allowed, without recompute if it can be.

        Shapes:
            allowed: (positions, options, layers + 1, layers + 1).
        """
        first, end = np.array(bounds[:-1]), np.array(bounds[1:])
        places = np.arange(len(first), 0, -1) - 1
        may = allowed[places, :, first, end]  # (stages, options)
        seconds = self.stage_s[:, first, end].T
        # Cost decides; recompute and seconds part options that cost the same.
        tie = self.is_recompute + seconds / (seconds.max() or 1.0)
        cost = self.prices[row, self.table.pool_of] * self.table.chips
        score = np.where(may, cost * (1.0 + 1e-4 * tie), np.inf)
        return tuple(score.argmin(axis=1).tolist())

    def cheapest(self, chips: Array, replicas: int, *, bound: bool) -> list[tuple[int, tuple[int, ...]]] | None:
        """Return (price's row, cheapest cuts) at every price, or None where some price shows that there are none.

        As a bound, any depth up to the last will do and no cuts are returned.
        """
        num_prices, size = len(self.prices), len(self.cuts)
        values = np.full((len(chips) + 1, num_prices, size), np.inf, dtype=np.float32)
        values[0, :, -1] = 0.0
        priced = []
        for position, fewest in enumerate(chips):
            price = self.prices[:, 0, None, None] * fewest[0]
            for pool in range(1, len(fewest)):
                price = np.minimum(price, self.prices[:, pool, None, None] * fewest[pool])
            priced.append(price)
            values[position + 1] = (price + values[position, :, None, :]).min(axis=2)
        final = values[1:, :, 0].min(axis=0) if bound else values[-1, :, 0]
        if replicas and np.any(final * replicas > self.worth * (1 + 1e-6)):
            return None
        if bound:
            return []
        return [(row, _bounds(priced, values, row)) for row in range(num_prices) if np.isfinite(final[row])]


def price_grid(problem: Problem) -> Array:
    """Return price vectors of the pools, scaled to the largest being 1: mixes of powers of two, and each pool alone."""
    count = len(problem.pools)
    powers = (-3.0, -2.0, -1.5, -1.0, -0.5, 0.0) if count <= 2 else (-2.0, 0.0)
    grid = {mix for mix in product(powers, repeat=count) if max(mix) == 0.0}
    if count == 2:
        grid -= {mix for mix in grid if mix[0] in (-3.0, -1.5, -0.5) or mix[1] == -0.5}
    grid |= {tuple(0.0 if i == j else -12.0 for j in range(count)) for i in range(count)}
    return np.asarray(2.0 ** np.array(sorted(grid), dtype=np.float64)).astype(np.float32)


def _bounds(priced: list[Array], values: NDArray[np.float32], row: int) -> tuple[int, ...]:
    """Return the cheapest cuts at one price."""
    bounds = [0]
    for position in range(len(priced), 0, -1):
        bounds.append(int(np.argmin(priced[position - 1][row, bounds[-1]] + values[position - 1, row])))
    return tuple(bounds)


def _least_seconds(stage_s: Array, num_layers: int) -> float:
    """Return the least compute of one microbatch: every layer on the option that is fastest at it."""
    layers = np.arange(num_layers)
    return float(stage_s[:, layers, layers + 1].min(axis=0).sum())
