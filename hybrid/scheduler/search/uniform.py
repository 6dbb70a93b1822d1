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
from itertools import pairwise

import numpy as np

from hybrid.scheduler.search.cheapest import Cheapest, price_grid
from hybrid.scheduler.search.links import reduce_seconds
from hybrid.scheduler.search.members import split_members
from hybrid.scheduler.search.options import GRADIENT_BYTES, Array, OptionTable
from hybrid.scheduler.search.problem import Problem

_STEPS_DOWN = (0.97, 0.995)
"""How much faster than the best plan the next one must be to be looked for: first coarse, then fine."""

_COARSE_CUTS = 13
_APART = 0.95
"""Ratio of neighbouring numbers of microbatches in the coarse pass."""
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
    layers, prices = problem.table.num_layers, price_grid(problem)
    coarse = np.unique(np.linspace(0, layers, min(layers, _COARSE_CUTS) + 1).round().astype(np.intp))
    searches = [_Search(problem, table, coarse, prices) for table in tables]
    pairs = [(search, m) for search in searches for m in search.counts(_APART)]
    # Stages of middling length first: a good plan early prunes the rest.
    pairs.sort(key=lambda pair: abs(math.log(pair[1] * pair[0].table.microbatch / math.sqrt(problem.global_batch))))
    best = _improve(None, pairs, _STEPS_DOWN[0])
    fine = [_Search(problem, table, np.arange(layers + 1), prices) for table in tables]
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


class _Search(Cheapest):
    """Uniform plans of one microbatch size."""

    def counts(self, apart: float = 1.0) -> Iterator[int]:
        """Yield the numbers of microbatches worth trying, falling, each at most `apart` times the one before."""
        most = sum(pool.num_chips for pool in self.problem.pools)
        total = math.ceil(self.problem.global_batch / self.table.microbatch)
        last = math.inf
        for replicas in range(1, min(most, total) + 1):
            count = math.ceil(total / replicas)
            if count <= last * apart and count < last:
                last = count
                yield count

    def better_than(self, target_s: float, num_microbatches: int) -> UniformPlan | None:
        """Return a plan below the target, or None."""
        replicas = math.ceil(self.problem.global_batch / (self.table.microbatch * num_microbatches))
        least_pace_s = replicas * self.pace_of_replica_s
        if target_s <= max(self.least_s, num_microbatches * least_pace_s):
            return None
        limit_s = target_s - self.table.update_s[:, None, None] - self.reduce_s(replicas)
        bound_s = limit_s / num_microbatches
        if num_microbatches > 1:
            bound_s = np.minimum(bound_s, (limit_s - self.least_s) / (num_microbatches - 1))
        chips = self.chips(self.fits & (self.stage_s <= bound_s))
        if self.cheapest(chips, replicas, bound=True) is None:
            return None
        shares = _SHARES if len(self.cuts) > self.table.num_layers else _SHARES[:1]
        for depth in range(1, self.depth + 1):
            if least_pace_s * (num_microbatches + depth - 1) + self.least_reduce_s(replicas, depth) > target_s:
                continue
            for share in shares if depth > 1 else (1.0,):
                pace_s = limit_s / (num_microbatches + share * (depth - 1))
                allowed = np.stack([self.seconds(depth, j) <= pace_s for j in range(1, depth + 1)])
                chips = self.chips(self.fits[:depth] & allowed)
                for bounds in sorted({cuts for _, cuts in self.cheapest(chips, replicas, bound=False) or ()}):
                    plan = self._place(bounds, chips, num_microbatches, replicas)
                    if plan is not None and plan.step_s < target_s:
                        return plan
        return None

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
    pairs += [(a.pool, b.pool) for a, b in pairwise(groups)]
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
