"""Explain: why a plan is as it is: what it waits for, which limits bind, what more of something would bring.

Pure. A what-if is the same search on a problem with one thing changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hybrid.errors import HybridError
from hybrid.scheduler.schedules import SCHEDULE_NAMES
from hybrid.scheduler.search.choice import Choice, Group
from hybrid.scheduler.search.confirm import costs_of
from hybrid.scheduler.search.islands import merged
from hybrid.scheduler.search.links import Network
from hybrid.scheduler.search.problem import Limits, Pool, Problem
from hybrid.scheduler.search.search import Found, search
from hybrid.scheduler.simulate import no_seconds, simulate

_BINDS = 1e-3
"""What improves the objective by less is said to change nothing."""
_FEW_CHIPS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """One thing changed, and what the best plan then comes to."""

    what: str
    kind: str
    """`chips`, `memory`, `links`, `limits` or `vocabulary`."""
    gain: float | None
    """By which share the objective improves; None where nothing is found even so."""

    @property
    def binds(self) -> bool:
        """Whether it holds the plan back."""
        return self.gain is not None and self.gain > _BINDS


@dataclass(frozen=True, slots=True, kw_only=True)
class Bottleneck:
    """Of identical replicas: the rank that the others wait for."""

    group: int
    rank: int
    stages: tuple[int, ...]
    pool: str
    busy_share: float
    """Share of the replica's step in which it computes."""
    message_share: float
    """By which share the step would be shorter if messages took no time."""
    memory_share: float
    """Of the fullest rank's memory, margin and fixed bytes taken off, that is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """The answers."""

    bottlenecks: tuple[Bottleneck, ...]
    effects: tuple[Effect, ...]
    left_out: tuple[str, ...]
    """One sentence for each pool of which chips stay unused."""

    @property
    def binding(self) -> tuple[Effect, ...]:
        """What holds the plan back, the most first."""
        found = [effect for effect in self.effects if effect.binds]
        return tuple(sorted(found, key=lambda effect: -(effect.gain or 0.0)))


def explain(problem: Problem, found: Found) -> Explanation:
    """Return why the plan is as it is.

    Cost:
        a search for each what-if: about three a kind of chip, and five.
    """
    problem = merged(problem)
    choice = found.choice
    effects = tuple(_effect(*change, choice.score) for change in _changes(problem))
    return Explanation(
        bottlenecks=tuple(_bottleneck(index, group) for index, group in enumerate(choice.groups)),
        effects=effects,
        left_out=tuple(_left_out(problem, choice)),
    )


def _effect(what: str, kind: str, changed: Problem, score: float) -> Effect:
    try:
        other = search(changed).choice.score
    except HybridError:
        return Effect(what=what, kind=kind, gain=None)
    return Effect(what=what, kind=kind, gain=1.0 - other / score)


def _changes(problem: Problem) -> Iterator[tuple[str, str, Problem]]:
    pools = problem.pools

    def with_pool(pool: Pool, other: Pool) -> Problem:
        return problem.with_pools(other if p is pool else p for p in pools)

    for pool in pools:
        more = 1 if pool.num_chips <= _FEW_CHIPS else max(1, pool.num_chips // 100)
        word = "one more chip" if more == 1 else f"{more:,} more chips"
        yield f"{word} of {pool.name}", "chips", with_pool(pool, replace(pool, num_chips=pool.num_chips + more))
    for pool in pools:
        larger = replace(pool, memory_bytes=round(pool.memory_bytes * 1.25))
        yield f"a quarter more memory on {pool.name}", "memory", with_pool(pool, larger)
    yield "links twice as fast", "links", replace(problem, network=_faster(problem.network))
    if problem.limits != Limits():
        for name in ("min_tokens_per_s", "max_usd_per_hour", "max_watts", "deadline_s"):
            if getattr(problem.limits, name) is not None:
                drop = {name: None} if name != "deadline_s" else {name: None, "total_tokens": None}
                yield f"no {name}", "limits", replace(problem, limits=replace(problem.limits, **drop))
    yield from _wider(problem)


def _wider(problem: Problem) -> Iterator[tuple[str, str, Problem]]:
    words = problem.vocabulary
    if words.step_law == "sailor":
        return
    if set(words.schedules) != set(SCHEDULE_NAMES):
        yield "any schedule", "vocabulary", replace(problem, vocabulary=replace(words, schedules=SCHEDULE_NAMES))
    if words.max_replicas is not None:
        yield "any number of replicas", "vocabulary", replace(problem, vocabulary=replace(words, max_replicas=None))
    if words.num_stages is not None:
        yield "any number of stages", "vocabulary", replace(problem, vocabulary=replace(words, num_stages=None))
    if not words.recompute:
        yield "recompute where it helps", "vocabulary", replace(problem, vocabulary=replace(words, recompute=True))


def _faster(network: Network) -> Network:
    def twice(rate: float | None) -> float | None:
        return None if rate is None else 2 * rate

    links = {
        key: replace(
            link,
            latency_s=link.latency_s / 2,
            bytes_per_s=twice(link.bytes_per_s),
            points=tuple((size, 2 * rate) for size, rate in link.points),
            polynomial=tuple(2 * x for x in link.polynomial),
        )
        for key, link in network.links.items()
    }
    return replace(network, links=links)


def _bottleneck(index: int, group: Group) -> Bottleneck:
    column, table = group.column, group.column.table
    seconds_of, transfer_s, link_busy_s = costs_of(column)
    schedule = group.build_schedule()
    line = simulate(schedule, seconds_of=seconds_of, transfer_s=transfer_s, link_busy_s=link_busy_s)
    free = simulate(schedule, seconds_of=seconds_of, transfer_s=no_seconds)
    busy = [sum(span.end_s - span.start_s for span in spans) for spans in line.spans_of_rank]
    rank = max(range(len(busy)), key=busy.__getitem__)
    stages = tuple(stage for stage, home in enumerate(column.rank_of_stage) if home == rank)
    shares = []
    for other in range(column.num_ranks):
        mine = [stage for stage, home in enumerate(column.rank_of_stage) if home == other]
        held = sum(column.peak_bytes_of_stage(stage, group.num_microbatches) for stage in mine)
        shares.append(held / float(table.limit_bytes[column.chosen[mine[0]]]))
    return Bottleneck(
        group=index,
        rank=rank,
        stages=stages,
        pool=table.problem.pools[column.option_of_rank(rank).pool].name,
        busy_share=busy[rank] / line.step_s,
        message_share=max(0.0, 1.0 - free.step_s / line.step_s),
        memory_share=max(shares),
    )


def _left_out(problem: Problem, choice: Choice) -> Iterator[str]:
    used_kinds = [pool.chip for pool, used in zip(problem.pools, choice.chips, strict=True) if used]
    for pool, used in zip(problem.pools, choice.chips, strict=True):
        if used == pool.num_chips:
            continue
        share = f"{pool.num_chips - used:,} of {pool.num_chips:,} chips of {pool.name} stay unused"
        if pool.chip not in used_kinds and used_kinds:
            mine, best = _model_s(problem, pool.chip), min(_model_s(problem, chip) for chip in used_kinds)
            share += f": a sample takes {mine / best:.3g} times as long on one as on the fastest chip that is used"
            largest = max(problem.table.sizes[min(problem.table.sizes)].output_bytes)
            links = [(problem.link(pool, other), other.name) for other in problem.pools if other is not pool]
            ways = [(link.seconds(largest), name) for link, name in links if link is not None]
            if ways:
                share += f", and the largest activation takes {min(ways)[0] * 1e3:.3g} ms to {min(ways)[1]}"
        elif not choice.chips[problem.pools.index(pool)]:
            share += ": another pool of the same chip is enough"
        else:
            share += ": no further stage or replica of them shortens the step enough to pay for its messages"
        yield share


def _model_s(problem: Problem, chip: str) -> float:
    """Return the seconds of one sample through the whole model on one chip, at its best microbatch."""
    cells = problem.table.cells.items()
    return min(
        (sum(cell.forward_s) + sum(cell.backward_s)) * degree / size
        for (name, degree, size), cell in cells
        if name == chip
    )
