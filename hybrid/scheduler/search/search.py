"""The search itself: from a problem to the best choice of replicas that was found.

Pure. A small problem is solved among all its columns; a large one by column generation: columns are priced out at
the step's length that the last linear program reached, until it stops falling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hybrid.scheduler.search.cheapest import price_grid
from hybrid.scheduler.search.choice import Choice, share_out
from hybrid.scheduler.search.climb import climb, search_orders
from hybrid.scheduler.search.columns import Column
from hybrid.scheduler.search.exact import choose_exactly
from hybrid.scheduler.search.generate import Generator
from hybrid.scheduler.search.islands import merged
from hybrid.scheduler.search.options import Array, Ints, OptionTable
from hybrid.scheduler.search.problem import Limits, Problem
from hybrid.scheduler.search.program import FEW_CHIPS, Program
from hybrid.scheduler.search.refuse import check_hopes, limit_refusal, refusal
from hybrid.scheduler.search.shapes import enumerable, enumerate_shapes

_SMALL_SHAPES = 120_000
_COARSE_SHAPES, _FEWEST_CUTS = 50_000, 3
_CLIMB_CHIPS = 256
_COARSE_CUTS = 13
_ROUNDS = 2
_ENOUGH = 0.997
"""A round that shortens the step by less than this is the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came to."""

    choice: Choice
    method: str
    """`exact` among all shapes, or what was done instead."""
    num_columns: int


def search(problem: Problem, *, method: str = "auto") -> Found:
    """Return the best choice that was found.

    Args:
        problem: what to plan.
        method: `exact`, `coarse` (not every cut, even where that is possible), `column generation`, or `auto`: exact
            where it is small.

    Raises:
        PlanError: nothing fits, or no plan meets the limits; says which number must change and by how much.
        FleetError: a link that any plan would need is not there.
    """
    problem = merged(problem)
    check_hopes(problem)
    tables = [OptionTable(problem, size) for size in problem.vocabulary.microbatches]
    tables = [table for table in tables if table.options]
    found = None
    few = problem.num_chips <= FEW_CHIPS
    if method == "exact" or (method in ("auto", "coarse") and few):
        found = _among_all(problem, tables, every_cut=method != "coarse")
    if found is None or (found.method != "exact" and method != "exact"):
        found = _better_of(found, _generate(problem, tables, found))
    choice = found.choice
    may_climb = problem.num_chips <= _CLIMB_CHIPS or len(enumerable(problem)) > 1
    if found.method != "exact" and problem.vocabulary.step_law != "sailor" and may_climb:
        choice = climb(choice)
        if method != "column generation" and few:
            choice = _zoomed(problem, tables, choice, 0).choice
    return replace(found, choice=search_orders(choice))


def _among_all(problem: Problem, tables: list[OptionTable], *, every_cut: bool) -> Found | None:
    """Return the best choice among all shapes, or, where they are too many, among those on a coarse grid, then a finer.

    Raises:
        PlanError, FleetError: with every cut allowed there is none.
    """
    shapes = enumerate_shapes(tables, most=_SMALL_SHAPES) if every_cut else None
    if shapes is not None:
        choice = choose_exactly(problem, shapes)
        if choice is None:
            raise _refused(problem, [column for part in shapes for column in part.columns()])
        return Found(choice=choice, method="exact", num_columns=sum(map(len, shapes)))
    layers = problem.table.num_layers
    for places in range(min(layers, _COARSE_CUTS), _FEWEST_CUTS - 1, -1):
        cuts = np.unique(np.linspace(0, layers, places + 1).round().astype(np.intp))
        shapes = enumerate_shapes(tables, most=_COARSE_SHAPES, cuts=cuts)
        if shapes is not None:
            choice = choose_exactly(problem, shapes)
            return None if choice is None else _zoomed(problem, tables, choice, sum(map(len, shapes)))
    return None


def _zoomed(problem: Problem, tables: list[OptionTable], choice: Choice, num_columns: int) -> Found:
    """Return the best choice among shapes whose cuts lie next to those of the best one, until it stays the best."""
    while True:
        found = None
        for reach in (2, 1):
            cuts = {
                min(max(cut + step, 0), problem.table.num_layers)
                for group in choice.groups
                for cut in group.column.bounds
                for step in range(-reach, reach + 1)
            }
            shapes = enumerate_shapes(tables, most=_COARSE_SHAPES, cuts=np.array(sorted(cuts)))
            if shapes is not None:
                num_columns += sum(map(len, shapes))
                found = choose_exactly(problem, shapes)
                break
        if found is None or found.score >= choice.score * (1 - 1e-6):
            return Found(choice=choice, method="coarse enumeration", num_columns=num_columns)
        choice = found


def _better_of(one: Found | None, other: Found) -> Found:
    """Return the one with the better score."""
    return other if one is None or other.choice.score < one.choice.score else one


def _refused(problem: Problem, columns: list[Column]) -> Exception:
    """Return the error: without limits what is missing, with limits how far the closest plan is from them."""
    if problem.limits == Limits():
        return refusal(problem, columns)
    free = replace(problem, limits=Limits(), objective="throughput")
    choices = [search(free).choice]
    for price in ("usd_per_hour", "watts"):
        per_chip = np.array([getattr(pool, price) for pool in problem.pools])
        for column in sorted(columns, key=lambda column: float(per_chip @ np.array(column.chips)))[:8]:
            choice = share_out(problem, [(column, 1)])
            choices += [choice] if choice is not None else []
    return limit_refusal(problem, choices)


def _generate(problem: Problem, tables: list[OptionTable], known: Found | None) -> Found:
    """Return the best choice over all pools, or over those of one site where sites only hinder one another.

    Raises:
        PlanError, FleetError: nothing is found, and nothing was known.
    """
    columns: list[Column] = []
    choices: list[Choice] = []
    for part in _parts(problem):
        here = tables if part is problem else [OptionTable(part, table.microbatch) for table in tables]
        here = [table for table in here if table.options]
        # A part of a large fleet is planned as roughly as the fleet is.
        for replicas in _guesses(part, known, is_few=problem.num_chips <= FEW_CHIPS):
            found, made = _best_of_part(part, here, replicas)
            columns += made if part is problem else []
            choices += found if part is problem else [_lifted(problem, tables, choice) for choice in found]
    kept = [choice for choice in choices if choice.keeps_limits and np.isfinite(choice.step_s)]
    if not kept:
        if known is not None:
            return known
        raise _refused(problem, columns)
    best = min(kept, key=lambda choice: choice.score)
    return Found(choice=best, method="column generation", num_columns=len(columns))


def _parts(problem: Problem) -> list[Problem]:
    """Return the problem, each of its sites alone, and each pool alone whose way to others is slower than inside."""
    sites = sorted({pool.site for pool in problem.pools})
    parts = [problem]
    if len(sites) > 1:
        parts += [problem.with_pools(pool for pool in problem.pools if pool.site == site) for site in sites]
    if len(problem.pools) > 1:
        for pool in problem.pools:
            inside = problem.link(pool, pool)
            if any(problem.link(pool, other) != inside for other in problem.pools if other.site == pool.site):
                parts.append(problem.with_pools([pool]))
    return parts


def _lifted(problem: Problem, tables: list[OptionTable], choice: Choice) -> Choice:
    """Return a choice on a part of the pools as one on all of them."""
    place = {pool.name: index for index, pool in enumerate(problem.pools)}
    groups = []
    for group in choice.groups:
        column, part = group.column, group.column.table
        table = next(table for table in tables if table.microbatch == part.microbatch)
        options = [part.options[index] for index in column.chosen]
        moved = [replace(option, pool=place[choice.problem.pools[option.pool].name]) for option in options]
        chips = [0] * len(problem.pools)
        for pool, count in zip(choice.problem.pools, column.chips, strict=True):
            chips[place[pool.name]] = count
        chosen = tuple(table.options.index(option) for option in moved)
        groups.append(replace(group, column=replace(column, table=table, chosen=chosen, chips=tuple(chips))))
    return Choice(problem=problem, groups=tuple(groups))


def _best_of_part(problem: Problem, tables: list[OptionTable], replicas: int) -> tuple[list[Choice], list[Column]]:
    layers = problem.table.num_layers
    cuts = np.unique(np.linspace(0, layers, min(layers, _COARSE_CUTS) + 1).round().astype(np.intp))
    base = price_grid(problem) if len(problem.pools) <= 3 else _few_prices(problem)
    generators = [Generator(table, cuts, base) for table in tables]
    if not generators:
        return [], []
    columns: list[Column] = []
    target_s, prices = _first_guess(problem, tables), base
    for _ in range(_ROUNDS):
        fresh = _price_out(generators, problem, target_s, replicas, prices)
        while not columns and not fresh and target_s < 1e9:
            target_s *= 4
            fresh = _price_out(generators, problem, target_s, replicas, prices)
        if not fresh:
            break
        columns += fresh
        reached = _solve(problem, columns, replicas, target_s)
        if reached is None:
            target_s *= 4
            continue
        step_s, duals = reached
        if step_s > _ENOUGH * target_s and len(prices) > len(base):
            break
        target_s = step_s
        prices = np.vstack([base, *([duals / duals.max()] if duals.max() > 0 else [])])
    if not columns:
        return [], []
    if sum(pool.num_chips for pool in problem.pools) <= FEW_CHIPS:
        for stretch in (1.3, 2.0):
            columns += _price_out(generators, problem, stretch * target_s, replicas, base)
    choices = _choose(problem, columns, replicas, target_s)
    if choices and len(cuts) < layers + 1:
        best = min(choices, key=lambda choice: choice.score)
        columns += _refined(tables, best, target_s, prices[-2:])
        choices += _choose(problem, columns, best.num_replicas, target_s)
    return choices, columns


def _refined(tables: list[OptionTable], best: Choice, target_s: float, prices: Array) -> list[Column]:
    """Return columns with every cut allowed, like those of a choice in microbatch, depth and count."""
    found = []
    for table in tables:
        groups = [group for group in best.groups if group.column.samples == table.microbatch]
        if groups:
            generator = Generator(table, np.arange(table.num_layers + 1), prices)
            counts = np.unique([round(group.num_microbatches * x) for group in groups for x in (0.9, 1.0, 1.1)])
            depths = sorted({max(1, len(group.column.chosen) + x) for group in groups for x in (-1, 0, 1)})
            counts = np.maximum(counts[:: max(1, len(counts) // 6)], 1)
            found += generator.columns(target_s, best.num_replicas, counts, prices, depths)
    return found


def _price_out(
    generators: list[Generator], problem: Problem, target_s: float, replicas: int, prices: Array
) -> list[Column]:
    return [
        column
        for generator in generators
        for column in generator.columns(target_s, replicas, _counts(problem, generator.table.microbatch), prices)
    ]


def _solve(problem: Problem, columns: list[Column], replicas: int, target_s: float) -> tuple[float, Array] | None:
    """Return the least step of fractions of replicas, and what a chip of each pool is then worth."""
    program = Program(problem, columns, replicas)
    best: tuple[float, Array] | None = None
    for limit_s in program.reduction_limits((0.2, 1.0)):
        reached = program.fastest(limit_s, target_s)
        if reached is not None and (best is None or reached[0] < best[0]):
            best = reached[0], reached[1].prices
    return best


def _choose(problem: Problem, columns: list[Column], replicas: int, target_s: float) -> list[Choice]:
    """Return the choices of whole replicas on these columns, one or more for each bound on the reduction."""
    program = Program(problem, columns, replicas)
    num_chips = sum(pool.num_chips for pool in problem.pools)
    found: list[Choice] = []
    least = np.inf
    for limit_s in program.reduction_limits((0.15, 0.5, 1.0)):
        reached = program.fastest(limit_s, target_s)
        if reached is None or reached[0] > 1.05 * least:
            continue
        least = min(least, reached[0])
        if problem.objective == "throughput":
            # Whole replicas need longer than fractions of them, the longer the fewer they are.
            for stretch in (1.0, 1.1, 1.3, 1.7, 2.4) if num_chips <= FEW_CHIPS else (1.0,):
                found += program.integers(stretch * reached[0], limit_s, reached[1])
        else:
            found += program.cheapest(reached[0], limit_s)
    return found


def _counts(problem: Problem, microbatch: int) -> Ints:
    """Return numbers of microbatches to try, geometric."""
    most = max(1, -(-problem.global_batch // microbatch))
    return np.unique(np.geomspace(1, most, 9).round().astype(np.intp))


def _first_guess(problem: Problem, tables: list[OptionTable]) -> float:
    """Return three times the step of a fleet without bubbles, messages or limits of memory."""
    rate = 0.0
    for index, pool in enumerate(problem.pools):
        best = 0.0
        for table in tables:
            whole = (table.forward_s + table.backward_s)[:, 0, -1] * table.chips
            mine = whole[table.pool_of == index]
            if len(mine):
                best = max(best, table.microbatch / float(mine.min()))
        rate += pool.num_chips * best
    return 3 * problem.global_batch / rate if rate else 1.0


def _guesses(problem: Problem, known: Found | None, *, is_few: bool) -> list[int]:
    """Return about how many replicas to count on: it decides what a reduction costs, the less the more there are."""
    num_chips = sum(pool.num_chips for pool in problem.pools)
    most = min(problem.global_batch, num_chips, problem.vocabulary.max_replicas or num_chips)
    if not is_few:
        return [max(1, min(most, num_chips // 4))]
    if known is not None:
        near = known.choice.num_replicas
        return [count for count in (near, near + 1) if count <= most]
    return [count for count in range(1, most + 1) if count <= 4 or count == most or count.bit_count() <= 2]


def _few_prices(problem: Problem) -> Array:
    """Return prices for many pools: each alone, all equal, and by memory."""
    count = len(problem.pools)
    alone = np.full((count, count), 2.0**-12) + np.eye(count) * (1 - 2.0**-12)
    memory = np.array([pool.memory_bytes for pool in problem.pools], dtype=np.float64)
    return np.vstack([1.0 / (alone * 2.0**12), alone, np.ones(count), memory / memory.max()])
