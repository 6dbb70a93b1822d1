"""The search itself: from a problem to the best choice of replicas that was found.

Pure. A small problem is solved among all its columns; a large one by column generation: columns are priced out at
the step's length that the last linear program reached, until it stops falling.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from hybrid.scheduler.search.cheapest import price_grid
from hybrid.scheduler.search.choice import Choice
from hybrid.scheduler.search.columns import Column, enumerate_columns
from hybrid.scheduler.search.exact import choose_exactly
from hybrid.scheduler.search.generate import Generator
from hybrid.scheduler.search.options import Array, Ints, OptionTable
from hybrid.scheduler.search.problem import Problem, merge_pools
from hybrid.scheduler.search.program import Program
from hybrid.scheduler.search.refuse import check_hopes, refusal

_SMALL_CHIPS, _SMALL_COLUMNS = 8, 120_000
_COARSE_CUTS = 13
_ROUNDS = 3
_ENOUGH = 0.997
"""A round that shortens the step by less than this is the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search came to."""

    choice: Choice
    method: str
    """`exact` among all columns, or `column generation`."""
    num_columns: int


def search(problem: Problem, *, method: str = "auto") -> Found:
    """Return the best choice that was found.

    Args:
        problem: what to plan.
        method: `exact`, `column generation`, or `auto`: exact where it is small.

    Raises:
        PlanError: nothing fits, or no plan meets the limits; says which number must change and by how much.
        FleetError: a link that any plan would need is not there.
    """
    problem = problem.with_pools(merge_pools(problem.pools))
    check_hopes(problem)
    tables = [OptionTable(problem, size) for size in problem.vocabulary.microbatches]
    tables = [table for table in tables if table.options]
    if method != "column generation" and (method == "exact" or _is_small(problem)):
        columns = enumerate_columns(tables, most=_SMALL_COLUMNS)
        if columns is not None:
            choice = choose_exactly(problem, columns)
            if choice is None:
                raise refusal(problem, columns)
            return Found(choice=choice, method="exact", num_columns=len(columns))
    return _generate(problem, tables)


def _is_small(problem: Problem) -> bool:
    return sum(pool.num_chips for pool in problem.pools) <= _SMALL_CHIPS and problem.table.num_layers <= 12


def _generate(problem: Problem, tables: list[OptionTable]) -> Found:
    """Return the best choice over all pools, or over those of one site where sites only hinder one another."""
    columns: list[Column] = []
    choices: list[Choice] = []
    for part in _parts(problem):
        here = tables if part is problem else [OptionTable(part, table.microbatch) for table in tables]
        here = [table for table in here if table.options]
        found, made = _best_of_part(part, here)
        columns += made
        choices += [replace(choice, problem=part) for choice in found]
    kept = [choice for choice in choices if choice.keeps_limits and np.isfinite(choice.step_s)]
    if not kept:
        raise refusal(problem, columns, choices)
    best = min(kept, key=lambda choice: choice.score)
    return Found(choice=best, method="column generation", num_columns=len(columns))


def _parts(problem: Problem) -> list[Problem]:
    """Return the problem, and each of its sites alone where there are several."""
    sites = sorted({pool.site for pool in problem.pools})
    if len(sites) == 1:
        return [problem]
    alone = [problem.with_pools(pool for pool in problem.pools if pool.site == site) for site in sites]
    pairs = [problem.with_pools(pool for pool in problem.pools if pool.site in pair) for pair in combinations(sites, 2)]
    return [problem, *alone, *(pairs if len(sites) == 3 else [])]


def _best_of_part(problem: Problem, tables: list[OptionTable]) -> tuple[list[Choice], list[Column]]:
    layers = problem.table.num_layers
    cuts = np.unique(np.linspace(0, layers, min(layers, _COARSE_CUTS) + 1).round().astype(np.intp))
    base = price_grid(problem) if len(problem.pools) <= 3 else _few_prices(problem)
    generators = [Generator(table, cuts, base) for table in tables]
    if not generators:
        return [], []
    columns: list[Column] = []
    target_s, replicas, prices = _first_guess(problem, tables), _guess_replicas(problem), base
    choices: list[Choice] = []
    for _ in range(_ROUNDS):
        fresh = _price_out(generators, problem, target_s, replicas, prices)
        while not columns and not fresh and target_s < 1e9:
            target_s *= 4
            fresh = _price_out(generators, problem, target_s, replicas, prices)
        if not fresh:
            break
        columns += fresh
        reached = _solve(problem, columns, replicas, target_s, choices)
        if reached is None:
            target_s *= 4
            continue
        step_s, duals = reached
        replicas = max(1, choices[-1].num_replicas) if choices else replicas
        if step_s > _ENOUGH * target_s and len(prices) > len(base):
            break
        target_s = step_s
        prices = np.vstack([base, *([duals / duals.max()] if duals.max() > 0 else [])])
    if len(cuts) < layers + 1 and columns:
        fine = [Generator(table, np.arange(layers + 1), prices) for table in tables]
        near = {choice_group.column.table.microbatch for choice in choices for choice_group in choice.groups}
        fine = [generator for generator in fine if generator.table.microbatch in near]
        columns += _price_out(fine, problem, target_s, replicas, prices[-3:])
        _solve(problem, columns, replicas, target_s, choices)
    return choices, columns


def _price_out(
    generators: list[Generator], problem: Problem, target_s: float, replicas: int, prices: Array
) -> list[Column]:
    return [
        column
        for generator in generators
        for column in generator.columns(target_s, replicas, _counts(problem, generator.table.microbatch), prices)
    ]


def _solve(
    problem: Problem, columns: list[Column], replicas: int, target_s: float, choices: list[Choice]
) -> tuple[float, Array] | None:
    """Add the best choices on these columns; return the linear program's step and prices."""
    program = Program(problem, columns, replicas)
    finite = program.reduce_s[np.isfinite(program.reduce_s)]
    best: tuple[float, Array] | None = None
    found: list[Choice] = []
    for limit_s in np.unique(np.quantile(finite, (0.1, 0.35, 0.7, 1.0), method="nearest")) if len(finite) else []:
        reached = program.fastest(float(limit_s), target_s)
        if reached is None or (best is not None and reached[0] > 1.05 * best[0]):
            continue
        step_s, solved = reached
        if problem.objective == "throughput":
            found += program.integers(step_s * 1.002, float(limit_s), solved)
        else:
            found += program.cheapest(step_s * 1.002, float(limit_s))
        if best is None or step_s < best[0]:
            best = step_s, solved.prices
    choices += sorted(found, key=lambda choice: -choice.score)[-4:]
    return best


def _counts(problem: Problem, microbatch: int) -> Ints:
    """Return numbers of microbatches to try, geometric."""
    most = max(1, -(-problem.global_batch // microbatch))
    return np.unique(np.geomspace(1, most, 12).round().astype(np.intp))


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


def _guess_replicas(problem: Problem) -> int:
    return max(1, min(problem.global_batch, sum(pool.num_chips for pool in problem.pools) // 4))


def _few_prices(problem: Problem) -> Array:
    """Return prices for many pools: each alone, all equal, and by memory."""
    count = len(problem.pools)
    alone = np.full((count, count), 2.0**-12) + np.eye(count) * (1 - 2.0**-12)
    memory = np.array([pool.memory_bytes for pool in problem.pools], dtype=np.float64)
    return np.vstack([1.0 / (alone * 2.0**12), alone, np.ones(count), memory / memory.max()])
