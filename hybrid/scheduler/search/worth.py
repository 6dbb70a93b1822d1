"""Worth: is the mix worth it? Each kind alone, the uniform split, and what each pool adds.

Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from hybrid.errors import HybridError
from hybrid.scheduler.search.choice import Choice, share_out
from hybrid.scheduler.search.islands import merged
from hybrid.scheduler.search.options import OptionTable
from hybrid.scheduler.search.problem import Pool, Problem
from hybrid.scheduler.search.search import Found, search
from hybrid.scheduler.search.shapes import measure_columns

_WORTH_IT = 0.01
"""A pool that improves the objective by less is recommended to be left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """One other plan, or why there is none."""

    name: str
    choice: Choice | None
    refusal: str = ""

    @property
    def step_s(self) -> float | None:
        """Seconds of its step."""
        return None if self.choice is None else self.choice.step_s

    @property
    def score(self) -> float | None:
        """What the objective minimises."""
        return None if self.choice is None else self.choice.score


@dataclass(frozen=True, slots=True, kw_only=True)
class Worth:
    """The answer."""

    mix: Found
    alone: tuple[Alternative, ...]
    """Each kind of chip alone."""
    uniform: Alternative
    """All chips, one a stage, replicas alike, layers split evenly."""
    without: tuple[Alternative, ...]
    """All but one pool: the difference to the mix is the pool's marginal value."""
    leave_out: tuple[str, ...]
    """Pools recommended to be left out: they don't help by a hundredth."""

    @property
    def recommendation(self) -> str:
        """One sentence."""
        if self.leave_out:
            return f"leave out {', '.join(self.leave_out)}: without, the objective is no worse by 1%"
        if len(self.without) == 1:
            return "there is one pool: nothing is mixed"
        return "the mix is worth it: every pool improves the objective by 1% or more"


def is_the_mix_worth_it(problem: Problem, mix: Found | None = None) -> Worth:
    """Return the best plan on all pools beside those on fewer.

    Args:
        problem: with all pools.
        mix: what the search found on it, where it was asked already.

    Raises:
        PlanError: nothing fits even on all pools.
    """
    problem = merged(problem)
    mix = mix or search(problem)
    best = mix.choice.score
    kinds = dict.fromkeys(pool.chip for pool in problem.pools)
    known: dict[tuple[str, ...], Alternative] = {tuple(pool.name for pool in problem.pools): _found("all", mix)}

    def of(name: str, pools: list[Pool]) -> Alternative:
        key = tuple(pool.name for pool in pools)
        if key not in known:
            known[key] = _of(name, problem, pools)
        return replace(known[key], name=name)

    alone = tuple(of(f"{kind} alone", [pool for pool in problem.pools if pool.chip == kind]) for kind in kinds)
    without = tuple(of(pool.name, [other for other in problem.pools if other is not pool]) for pool in problem.pools)
    helps = [entry.score is None or entry.score > best * (1 + _WORTH_IT) for entry in without]
    leave_out = tuple(entry.name for entry, help_ in zip(without, helps, strict=True) if not help_)
    # Two pools may each be dispensable and not both: one at a time, the least useful.
    leave_out = leave_out if len(leave_out) <= 1 else (min(without, key=lambda e: e.score or np.inf).name,)
    return Worth(mix=mix, alone=alone, uniform=_uniform(problem), without=without, leave_out=leave_out)


def _of(name: str, problem: Problem, pools: list[Pool]) -> Alternative:
    if not pools:
        return Alternative(name=name, choice=None, refusal="no pool is left")
    try:
        found = search(replace(problem, pools=tuple(pools)))
    except HybridError as error:
        return Alternative(name=name, choice=None, refusal=str(error))
    return _found(name, found)


def _found(name: str, found: Found) -> Alternative:
    return Alternative(name=name, choice=found.choice)


def _uniform(problem: Problem) -> Alternative:
    """Return the best of the even splits: replicas of one stage a kind, an even number of layers each."""
    best: Choice | None = None
    layers = problem.table.num_layers
    for size in problem.vocabulary.microbatches:
        table = OptionTable(problem, size)
        for per_pool in range(1, layers // len(problem.pools) + 1):
            for degree in problem.vocabulary.degrees:
                chosen = [
                    index
                    for pool in range(len(problem.pools))
                    for index, option in enumerate(table.options)
                    if (option.pool, option.degree, option.width, option.recompute) == (pool, degree, 1, False)
                    for _ in range(per_pool)
                ]
                if len(chosen) != per_pool * len(problem.pools) or len(chosen) > problem.vocabulary.max_stages:
                    continue
                bounds = np.linspace(0, layers, len(chosen) + 1).round().astype(np.intp)
                columns = measure_columns(
                    table, np.array([chosen]), bounds[None, :], np.arange(1, 3 * len(chosen) + 3), capped=False
                )
                for column in columns:
                    count = min(p.num_chips // n for p, n in zip(problem.pools, column.chips, strict=True) if n)
                    count = min(count, problem.vocabulary.max_replicas or count)
                    choice = share_out(problem, [(column, count)]) if count else None
                    if choice is not None and (best is None or choice.score < best.score):
                        best = choice
    if best is None:
        return Alternative(name="uniform split", choice=None, refusal="no even split fits")
    return Alternative(name="uniform split", choice=best)
