"""Islands: which pools are planned as one, and which chips of which island a found stage then takes.

Pure. Ranks are numbered so that a stage's ranks lie next to one another in one node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hybrid.errors import PlanError
from hybrid.scheduler.search.problem import Pool, Problem


def group_pools(problem: Problem) -> tuple[tuple[Pool, ...], ...]:
    """Return the pools with those together that differ in nothing but name and number: the search costs a kind.

    Two pools are one only if their links are: to every other pool, and between the two as inside each.
    """
    named = {name for a, _, b, _ in problem.network.links for name in (a, b)}
    groups: list[list[Pool]] = []
    for pool in problem.pools:
        for group in groups:
            if _alike(problem, group[0], pool, named):
                group.append(pool)
                break
        else:
            groups.append([pool])
    return tuple(map(tuple, groups))


def merged(problem: Problem) -> Problem:
    """Return the problem with each group of like pools as one, under the name of its first."""
    groups = group_pools(problem)
    return problem.with_pools(replace(group[0], num_chips=sum(pool.num_chips for pool in group)) for group in groups)


def _alike(problem: Problem, one: Pool, other: Pool, named: set[str]) -> bool:
    if replace(one, name="", num_chips=1) != replace(other, name="", num_chips=1):
        return False
    if one.name not in named and other.name not in named:
        return True  # the links know both by their chip alone
    inside = problem.link(one, one)
    if problem.link(other, other) != inside or problem.link(one, other) != inside:
        return False
    third = (pool for pool in problem.pools if pool is not one and pool is not other)
    return all(problem.link(one, pool) == problem.link(other, pool) for pool in third)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Chips that a stage asks for: `width` copies of `degree` chips, each copy inside one node."""

    degree: int
    width: int

    @property
    def num_chips(self) -> int:
        """Of the whole stage."""
        return self.degree * self.width


def place_stages(pools: Sequence[Pool], wanted: Sequence[Wanted]) -> list[tuple[int, tuple[int, ...]]]:
    """Return for each stage the pool (its place in `pools`) and the numbers of its chips there.

    Largest first, each into the first pool and nodes that have room: no gap is left where degrees divide nodes.

    Raises:
        PlanError: the stages' copies do not pack into the nodes.
    """
    free = [_nodes(pool) for pool in pools]
    found: list[tuple[int, tuple[int, ...]]] = [(0, ())] * len(wanted)
    order = sorted(range(len(wanted)), key=lambda i: (-wanted[i].degree, -wanted[i].num_chips, i))
    for index in order:
        for place, nodes in enumerate(free):
            chips = _take(nodes, wanted[index])
            if chips is not None:
                found[index] = place, chips
                break
        else:
            stage, names = wanted[index], ", ".join(pool.name for pool in pools)
            raise PlanError(
                f"a stage of {stage.width} times {stage.degree} chips finds no nodes in {names} that have them free",
                value=[pool.node_size for pool in pools],
                fix=f"take degrees that divide the nodes' sizes, or add {stage.num_chips} chips",
            )
    return found


def _nodes(pool: Pool) -> list[list[int]]:
    """Return the free chips of each node."""
    size = pool.node_size
    return [list(range(first, min(first + size, pool.num_chips))) for first in range(0, pool.num_chips, size)]


def _take(nodes: list[list[int]], stage: Wanted) -> tuple[int, ...] | None:
    """Take a stage's chips, or none."""
    room = sum(len(node) // stage.degree for node in nodes)
    if room < stage.width:
        return None
    chips: list[int] = []
    for node in nodes:
        while len(node) >= stage.degree and len(chips) < stage.num_chips:
            chips += node[: stage.degree]
            del node[: stage.degree]
        if len(chips) == stage.num_chips:
            break
    return tuple(chips)
