"""The choice: how many replicas of which column, and how many microbatches each; what that comes to.

Pure facts and their arithmetic; `exact.py` and `program.py` make choices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from hybrid.scheduler.actions import Schedule
from hybrid.scheduler.schedules import build_placed_schedule, parse_order
from hybrid.scheduler.search.columns import Column
from hybrid.scheduler.search.problem import Problem

SECONDS_PER_HOUR = 3600.0
_EVENTS, _TRIES = 64, 4096


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """Identical replicas."""

    column: Column
    num_replicas: int
    num_microbatches: int
    """Of each."""
    order: tuple[str, ...] = ()
    """Of each pipeline rank its actions as text, where they were searched for (`auto`)."""
    order_s: float = 0.0
    """Seconds of forwards, backwards and messages in that order."""

    @property
    def schedule_name(self) -> str:
        """The schedule that its replicas run."""
        return "auto" if self.order else self.column.schedule

    @property
    def step_s(self) -> float:
        """Seconds of one replica's step with its optimizer, without the reduction."""
        return self.order_s + self.column.update_s if self.order else self.column.exact_step_s(self.num_microbatches)

    def build_schedule(self) -> Schedule:
        """Return one replica's compute actions."""
        home = self.column.rank_of_stage
        if self.order:
            return parse_order(self.order, "auto", home, self.num_microbatches)
        return build_placed_schedule(self.column.schedule, home, self.num_microbatches)

    @property
    def num_samples(self) -> int:
        """Of all, in a step."""
        return self.num_replicas * self.num_microbatches * self.column.samples


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """Groups that together take the global batch; a little more only where no microbatches add up to it."""

    problem: Problem
    groups: tuple[Group, ...]

    @property
    def num_replicas(self) -> int:
        """Of all groups."""
        return sum(group.num_replicas for group in self.groups)

    @property
    def is_exact(self) -> bool:
        """Whether the replicas' samples add up to the global batch, so that it can be run as it is."""
        return sum(group.num_samples for group in self.groups) == self.problem.global_batch

    @property
    def reduce_s(self) -> float:
        """The reduction after the slowest replica's last backward: nothing overlaps it."""
        if self.num_replicas == 1:
            return 0.0
        used = tuple(pool for pool, count in enumerate(self.chips) if count)
        return max(group.column.reduce_s(self.num_replicas, used) for group in self.groups)

    @cached_property
    def step_s(self) -> float:
        """Seconds of a step: the slowest replica, its optimizer, and the reduction."""
        return max(group.step_s for group in self.groups) + self.reduce_s

    @property
    def chips(self) -> tuple[int, ...]:
        """Used, by pool."""
        pools = range(len(self.problem.pools))
        return tuple(sum(g.num_replicas * g.column.chips[pool] for g in self.groups) for pool in pools)

    @property
    def usd_per_hour(self) -> float:
        """Of the chips used; egress comes with `egress_usd_per_step`."""
        return sum(n * pool.usd_per_hour for n, pool in zip(self.chips, self.problem.pools, strict=True))

    @property
    def watts(self) -> float:
        """Of the chips used, at their rated power."""
        return sum(n * pool.watts for n, pool in zip(self.chips, self.problem.pools, strict=True))

    @property
    def egress_usd_per_step(self) -> float:
        """What leaves a site: activations and gradients over edges, and gradients reduced between sites."""
        problem, usd = self.problem, 0.0
        prices = problem.network.usd_per_gb
        if not prices:
            return 0.0
        sites = sorted({problem.pools[p].site for p, n in enumerate(self.chips) if n})
        for group in self.groups:
            table, chosen = group.column.table, group.column.chosen
            for stage in range(len(chosen) - 1):
                a, b = (problem.pools[table.options[chosen[s]].pool].site for s in (stage, stage + 1))
                size = float(table.output_bytes[group.column.bounds[stage + 1]])
                each = group.num_replicas * group.num_microbatches * size / 1e9
                usd += each * (prices.get((a, b), 0.0) + prices.get((b, a), 0.0)) if a != b else 0.0
        if len(sites) > 1:
            whole = 4.0 * problem.table.num_parameters / 1e9
            mean = sum(prices.get((a, b), 0.0) for a in sites for b in sites if a != b) / (len(sites) - 1)
            usd += 2 * (len(sites) - 1) / len(sites) * whole * mean
        return usd

    @property
    def tokens_per_s(self) -> float:
        """Of the global batch; what a last microbatch holds beyond it does not count."""
        return self.problem.tokens_per_step / self.step_s

    @property
    def usd_per_token(self) -> float:
        """Chips and egress."""
        hourly = self.usd_per_hour / SECONDS_PER_HOUR * self.step_s
        return (hourly + self.egress_usd_per_step) / self.problem.tokens_per_step

    @property
    def joules_per_token(self) -> float:
        """At rated power."""
        return self.watts / self.tokens_per_s

    @property
    def score(self) -> float:
        """What the objective minimises."""
        match self.problem.objective:
            case "usd_per_token":
                return self.usd_per_token
            case "joules_per_token":
                return self.joules_per_token
        return self.step_s

    @property
    def keeps_limits(self) -> bool:
        """Whether every limit holds."""
        limits = self.problem.limits
        hourly = self.usd_per_hour + self.egress_usd_per_step / self.step_s * SECONDS_PER_HOUR
        slack = 1 + 1e-9
        return (
            self.tokens_per_s * slack >= limits.wanted_tokens_per_s
            and (limits.max_usd_per_hour is None or hourly <= limits.max_usd_per_hour * slack)
            and (limits.max_watts is None or self.watts <= limits.max_watts * slack)
        )


def share_out(problem: Problem, replicas: Iterable[tuple[Column, int]]) -> Choice | None:
    """Return the fastest way to share the global batch out over replicas: (column, how many) each.

    The least T in which the replicas take the batch, by bisection on T; None where they never can.
    """
    counted = [(column, count) for column, count in replicas if count]
    if not counted:
        return None

    known: dict[tuple[int, int], float] = {}

    def step_s(column: Column, num_microbatches: int) -> float:
        key = id(column), num_microbatches
        if key not in known:
            known[key] = column.step_s(num_microbatches)
        return known[key]

    def most(column: Column, seconds: float) -> int:
        low, high = 0, -(-problem.global_batch // column.samples)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if step_s(column, middle) <= seconds else (low, middle - 1)
        return low

    def taken(seconds: float) -> int:
        return sum(count * column.samples * most(column, seconds) for column, count in counted)

    low, high = 0.0, max(column.step_s(1) for column, _ in counted)
    while taken(high) < problem.global_batch:
        low, high = high, 2 * high
        if not math.isfinite(high) or high > 1e12:
            return None
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if taken(middle) >= problem.global_batch else (middle, high)
    choice = None
    for _ in range(_EVENTS):
        shares = [(column, count, most(column, high)) for column, count in counted]
        choice = _trimmed(problem, shares)
        if choice.is_exact:
            break
        # No microbatches of these sizes add up to the batch yet: until the next one is done.
        high = min(step_s(column, m + 1) for column, _, m in shares)
        if not math.isfinite(high):
            return None
    return choice


def _trimmed(problem: Problem, shares: list[tuple[Column, int, int]]) -> Choice:
    """Return the choice without the microbatches that nobody needs; the slowest replicas give theirs up first."""
    surplus = sum(count * m * column.samples for column, count, m in shares) - problem.global_batch
    ordered = sorted(shares, key=lambda share: -share[0].step_s(max(share[2], 1)))
    sizes = [column.samples for column, _, _ in ordered]
    most = [count * m for _, count, m in ordered]
    groups = []
    for (column, count, m), less in zip(ordered, _given_up(surplus, sizes, most), strict=True):
        rounds, fewer = divmod(less, count)
        for n, share in ((count - fewer, m - rounds), (fewer, m - rounds - 1)):
            if n > 0 and share > 0:
                groups.append(Group(column=column, num_replicas=n, num_microbatches=share))
    return Choice(problem=problem, groups=tuple(groups))


def _given_up(surplus: int, sizes: list[int], most: list[int]) -> list[int]:
    """Return how many microbatches of each size to leave out: as close to the surplus as it goes, the first ones first.

    Cost:
        a walk with at most `_TRIES` steps; sizes that divide one another need none back.
    """
    best: tuple[int, list[int]] = (surplus, [0] * len(sizes))
    left = _TRIES

    def walk(index: int, rest: int, taken: list[int]) -> bool:
        nonlocal best, left
        left -= 1
        if rest < best[0]:
            best = rest, taken + [0] * (len(sizes) - len(taken))
        if rest == 0 or left <= 0:
            return True
        if index == len(sizes):
            return False
        top = min(most[index], rest // sizes[index])
        # Where no sum of what is left hits it, the closest from above will do.
        least = max(0, top - 63) if rest % math.gcd(*sizes[index:]) == 0 else top
        return any(walk(index + 1, rest - n * sizes[index], [*taken, n]) for n in range(top, least - 1, -1))

    walk(0, max(surplus, 0), [])
    return best[1]
