"""Uniform plans: every replica has the same cuts, microbatch and share; the members of a stage may differ in kind.

Pure. This is the vocabulary of Sailor's planner: one pipeline whose stages are each held by D members, any
mix of kinds, each with its own tensor-parallel degree; its cost is Sailor's closed form.

Search: for every microbatch size b and number of microbatches m (so that D = ceil(batch / (b m))), a dynamic
program over layers finds, for a grid of prices of the kinds, the cheapest stages that keep to a target time;
a target is given up when at some price D replicas cost more than the fleet is worth (weak duality).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from hybrid.scheduler.search.links import reduce_seconds
from hybrid.scheduler.search.members import split_members
from hybrid.scheduler.search.options import GRADIENT_BYTES, Array, OptionTable
from hybrid.scheduler.search.problem import Problem

_STEPS_DOWN = (0.97, 0.995)
"""How much faster than the best plan the next one must be to be looked for: first coarse, then fine."""

_COARSE_CUTS = 13
_NEAR = 0.25
"""Largest difference of log(number of microbatches) from the best plan's in the fine pass."""
_SHARES = (1.0, 0.8)
"""How long the other stages are taken to be, against the slowest; the second in the fine pass alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Members:
    """Chips of one kind that hold a stage: `count` members of `degree` chips each."""

    pool: int
    degree: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformPlan:
    """D replicas with the same cuts."""

    microbatch: int
    num_microbatches: int
    num_replicas: int
    bounds: tuple[int, ...]
    """First layer of every stage, and the end."""
    members: tuple[tuple[Members, ...], ...]
    """By stage; counts add up to `num_replicas`."""
    step_s: float

    @property
    def num_stages(self) -> int:
        """Stages of every replica."""
        return len(self.members)

    def chips_of_pool(self, num_pools: int) -> tuple[int, ...]:
        """Return the chips used of each pool."""
        used = [0] * num_pools
        for stage in self.members:
            for group in stage:
                used[group.pool] += group.degree * group.count
        return tuple(used)


def search_uniform(problem: Problem) -> UniformPlan | None:
    """Return the fastest uniform plan that was found, or None where none fits.

    First over every batch split with cuts on a coarse grid of layers, then with every cut around the best.
    """
    tables = [OptionTable(problem, size) for size in problem.vocabulary.microbatches]
    tables = [table for table in tables if table.options]
    layers = problem.table.num_layers
    coarse = np.unique(np.linspace(0, layers, min(layers, _COARSE_CUTS) + 1).round().astype(np.intp))
    searches = [_Search(problem, table, coarse) for table in tables]
    pairs = [(search, m) for search in searches for m in search.counts()]
    # Stages of middling length first: a good plan early prunes the rest.
    pairs.sort(key=lambda pair: abs(math.log(pair[1] * pair[0].table.microbatch / math.sqrt(problem.global_batch))))
    best = _improve(None, pairs, _STEPS_DOWN[0])
    fine = [_Search(problem, table, np.arange(layers + 1)) for table in tables]
    if best is None:
        return _improve(None, [(search, m) for search in fine for m in search.counts()], _STEPS_DOWN[0])
    near = [
        (search, m)
        for search in fine
        for m in search.counts()
        if abs(math.log(m / best.num_microbatches)) <= _NEAR and search.table.microbatch == best.microbatch
    ]
    return _improve(best, near, _STEPS_DOWN[1])


def _improve(best: UniformPlan | None, pairs: list[tuple[_Search, int]], step_down: float) -> UniformPlan | None:
    for search, num_microbatches in pairs:
        while True:
            target_s = math.inf if best is None else best.step_s * step_down
            found = search.better_than(target_s, num_microbatches)
            if found is None:
                break
            best = found
    return best


class _Search:
    """One microbatch size, cuts at some of the layers."""

    def __init__(self, problem: Problem, table: OptionTable, cuts: NDArray[np.intp]) -> None:
        self.problem, self.table, self.cuts = problem, table, cuts
        self.shares = _SHARES if len(cuts) > table.num_layers else _SHARES[:1]
        self.reductions: dict[int, Array] = {}
        layers, runs = len(cuts) - 1, np.ix_(range(len(table.options)), cuts, cuts)
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
        self.prices = _price_grid(problem)
        self.worth = self.prices @ np.array([pool.num_chips for pool in problem.pools], dtype=np.float64)
        # Chip-seconds of a sample at each price: what D replicas need, whatever their cuts.
        layers_s = self.stage_s[:, np.arange(layers), np.arange(layers) + 1]
        work = (self.prices[:, table.pool_of] * table.chips)[:, :, None] * layers_s
        self.pace_of_replica_s = float((work.min(axis=1).sum(axis=1) / self.worth).max())
        self.of_pool = [np.flatnonzero(table.pool_of == pool) for pool in range(len(problem.pools))]

    def counts(self) -> Iterator[int]:
        """Yield the numbers of microbatches worth trying: one for each number of replicas that differs."""
        most = sum(pool.num_chips for pool in self.problem.pools)
        total = math.ceil(self.problem.global_batch / self.table.microbatch)
        seen = set()
        for replicas in range(1, min(most, total) + 1):
            count = math.ceil(total / replicas)
            if count not in seen:
                seen.add(count)
                yield count

    def better_than(self, target_s: float, num_microbatches: int) -> UniformPlan | None:
        """Return a plan below the target, or None."""
        replicas = math.ceil(self.problem.global_batch / (self.table.microbatch * num_microbatches))
        least_pace_s = replicas * self.pace_of_replica_s
        if target_s <= max(self.least_s, num_microbatches * least_pace_s):
            return None
        limit_s = target_s - self.table.update_s[:, None, None] - self._reduce_s(replicas)
        bound_s = limit_s / num_microbatches
        if num_microbatches > 1:
            bound_s = np.minimum(bound_s, (limit_s - self.least_s) / (num_microbatches - 1))
        chips = self._chips(self.fits & (self.stage_s <= bound_s))
        if self._cheapest(chips, replicas, bound=True) is None:
            return None
        for depth in range(1, self.depth + 1):
            if least_pace_s * (num_microbatches + depth - 1) + self._least_reduce_s(replicas, depth) > target_s:
                continue
            for share in self.shares if depth > 1 else (1.0,):
                pace_s = limit_s / (num_microbatches + share * (depth - 1))
                allowed = np.stack([self._seconds(depth, j) <= pace_s for j in range(1, depth + 1)])
                chips = self._chips(self.fits[:depth] & allowed)
                for bounds in self._cheapest(chips, replicas, bound=False) or ():
                    plan = self._place(bounds, chips, num_microbatches, replicas)
                    if plan is not None and plan.step_s < target_s:
                        return plan
        return None

    def _reduce_s(self, replicas: int) -> Array:
        if replicas not in self.reductions:
            size = np.ix_(range(len(self.table.options)), self.cuts, self.cuts)
            self.reductions[replicas] = self.table.reduce_s(replicas)[size]
        return self.reductions[replicas]

    def _least_reduce_s(self, replicas: int, depth: int) -> float:
        """Return a bound: some stage has its share of the model or more, on no more than the most lanes."""
        whole = self._reduce_s(replicas)[:, 0, -1]
        return float(whole.min()) / depth

    def _seconds(self, depth: int, position: int) -> Array:
        """Return compute plus communication with equals, of a stage `position` from the end of `depth`."""
        if depth == 1:
            return self.ends_s["only"]
        if position == depth:
            return self.ends_s["first" if depth <= 3 else "first of many"]
        return self.ends_s["last" if position == 1 else "inner"]

    def _chips(self, allowed: NDArray[np.bool_]) -> Array:
        """Return the fewest chips of each pool that hold a run of layers at each position from the end.

        Shapes:
            allowed: (positions, options, layers + 1, layers + 1).  returns: (positions, pools, …)
        """
        fewest = np.full((len(allowed), len(self.of_pool), *allowed.shape[2:]), np.inf, dtype=np.float32)
        for pool, options in enumerate(self.of_pool):
            for index in options[np.argsort(-self.table.chips[options])]:
                fewest[:, pool][allowed[:, index]] = self.table.chips[index]
        return fewest

    def _cheapest(self, chips: Array, replicas: int, *, bound: bool) -> list[tuple[int, ...]] | None:
        """Return the cheapest cuts at every price, or None where some price shows that there are none.

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
        if np.any(final * replicas > self.worth * (1 + 1e-6)):
            return None
        if bound:
            return []
        return sorted({_bounds(priced, values, row) for row in range(num_prices)})

    def _place(
        self, bounds: tuple[int, ...], fewest: Array, num_microbatches: int, replicas: int
    ) -> UniformPlan | None:
        """Return the plan with these cuts, its members shared out over the pools; None where they do not fit."""
        depth, table = len(bounds) - 1, self.table
        chips = np.stack([fewest[depth - stage - 1, :, bounds[stage], bounds[stage + 1]] for stage in range(depth)])
        counts = split_members(chips, [pool.num_chips for pool in self.problem.pools], replicas)
        if counts is None:
            return None
        members = tuple(
            tuple(
                Members(pool=pool, degree=int(chips[stage, pool]), count=int(count))
                for pool, count in enumerate(row)
                if count
            )
            for stage, row in enumerate(counts)
        )
        draft = UniformPlan(
            microbatch=table.microbatch,
            num_microbatches=num_microbatches,
            num_replicas=replicas,
            bounds=tuple(int(self.cuts[place]) for place in bounds),
            members=members,
            step_s=0.0,
        )
        return UniformPlan(
            **{name: getattr(draft, name) for name in draft.__slots__ if name != "step_s"},
            step_s=uniform_step_seconds(self.problem, draft),
        )


def uniform_step_seconds(problem: Problem, plan: UniformPlan) -> float:
    """Return the plan's step by Sailor's closed form, every stage as slow as its slowest member.

    (m - 1) max x + sum x + reduction + update, where x is compute plus communication of a stage. Counted as its
    simulator counts: the reduction is a ring over neighbours on single-lane links, in buckets, of the unsplit
    stage over its smallest degree; the update that of one layer; the slowest pair of members sets an edge.

    Source:
        eth-easl/sailor, commit cf2c8e3 (read for its rules).
    """
    table, depth = problem.table, plan.num_stages
    sizes = table.sizes[min(table.sizes)]
    compute, update_s, sync_s = [], 0.0, 0.0
    for stage, groups in enumerate(plan.members):
        run = slice(plan.bounds[stage], plan.bounds[stage + 1])
        cells = [table.cells[problem.pools[g.pool].chip, g.degree, plan.microbatch] for g in groups]
        compute.append(max(sum(c.forward_s[run]) + sum(c.backward_s[run]) for c in cells))
        update_s = max(update_s, *(cell.update_s for cell in cells))
        shard = sum(sizes.num_parameters[run]) * GRADIENT_BYTES / min(4, *(g.degree for g in groups))
        sync_s = max(sync_s, _ring_seconds(problem, groups, shard, plan.num_replicas))
    forward = [_edge_seconds(problem, plan, s, s + 1, plan.bounds[s + 1] - 1) for s in range(depth - 1)]
    back = [_edge_seconds(problem, plan, s, s - 1, plan.bounds[s]) for s in range(1, depth)]
    stage_s = list(compute)
    if depth > 1:
        stage_s[0] += (1 if depth <= 3 else 2) * forward[0]
        stage_s[-1] += 2 * back[-1]
        for s in range(1, depth - 1):
            stage_s[s] += forward[s] + back[s - 1]
    return (plan.num_microbatches - 1) * max(stage_s) + sum(stage_s) + update_s + sync_s


def _ring_seconds(problem: Problem, groups: tuple[Members, ...], shard: float, replicas: int) -> float:
    pools = problem.pools
    pairs = [(g.pool, g.pool) for g in groups if g.count > 1]
    pairs += [(a.pool, b.pool) for a, b in zip(groups, groups[1:], strict=False)]
    slowest = 0.0
    for a, b in pairs:
        link = problem.link(pools[a], pools[b])
        if link is None:
            return math.inf
        seconds = reduce_seconds(link, np.array([shard]), replicas, bucket_bytes=problem.reduce_bucket_bytes)
        slowest = max(slowest, float(seconds[0]))
    return slowest


def _edge_seconds(problem: Problem, plan: UniformPlan, stage: int, peer: int, layer: int) -> float:
    """Return the seconds of the slowest pair of members; member j of a stage talks to member j of the next."""
    size = problem.table.sizes[min(problem.table.sizes)].output_bytes[layer] * plan.microbatch
    slowest, place, other_place = 0.0, 0, 0
    here, there = list(plan.members[stage]), list(plan.members[peer])
    left, other_left = here[0].count, there[0].count
    while True:
        a, b = here[place], there[other_place]
        link = problem.link(problem.pools[a.pool], problem.pools[b.pool], a.degree, b.degree)
        slowest = max(slowest, math.inf if link is None else link.seconds(size))
        step = min(left, other_left)
        left, other_left = left - step, other_left - step
        if not left:
            place += 1
            if place == len(here):
                return slowest
            left = here[place].count
        if not other_left:
            other_place += 1
            other_left = there[other_place].count


def _price_grid(problem: Problem) -> Array:
    """Return price vectors of the pools, scaled to the largest being 1: mixes of powers of two, and each pool alone."""
    count = len(problem.pools)
    powers = (-3.0, -2.0, -1.5, -1.0, -0.5, 0.0) if count <= 2 else (-3.0, -1.5, 0.0)
    grid = {mix for mix in product(powers, repeat=count) if max(mix) == 0.0}
    if count == 2:
        grid -= {mix for mix in grid if mix[0] in (-3.0, -1.5, -0.5) or mix[1] == -0.5}
    grid |= {tuple(0.0 if i == j else -12.0 for j in range(count)) for i in range(count)}
    return np.asarray(2.0 ** np.array(sorted(grid), dtype=np.float64)).astype(np.float32)


def _bounds(priced: list[Array], values: Array, row: int) -> tuple[int, ...]:
    """Return the cheapest cuts at one price."""
    bounds = [0]
    for position in range(len(priced), 0, -1):
        bounds.append(int(np.argmin(priced[position - 1][row, bounds[-1]] + values[position - 1, row])))
    return tuple(bounds)


def _least_seconds(stage_s: Array, num_layers: int) -> float:
    """Return the least compute of one microbatch: every layer on the option that is fastest at it."""
    layers = np.arange(num_layers)
    return float(stage_s[:, layers, layers + 1].min(axis=0).sum())
