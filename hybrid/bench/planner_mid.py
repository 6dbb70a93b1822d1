"""Middle-sized problems: fleets too large for the oracle, searched coarsely and among every shape. Pure."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TypeVar

from hybrid.bench.planner_oracle import random_problem
from hybrid.errors import PlanError
from hybrid.scheduler.search.problem import Problem
from hybrid.scheduler.search.search import search

_Number = TypeVar("_Number", int, float)
_CHIPS, _LAYERS, _STAGES = (9, 32), (14, 18), 4


def middle_problem(seed: int) -> Problem:
    """Return a problem of 9 to 32 chips and 14 to 18 layers, on 1F1B, up to four stages; memory binds in each second.

    Few enough stages that every shape can be looked at.
    """
    small = random_problem(seed, memory_binds=seed % 2 == 1)
    draw = random.Random(-1000 - seed)
    table, num_layers = small.table, draw.randint(*_LAYERS)
    picked = [draw.randrange(table.num_layers) for _ in range(num_layers)]

    def of(values: tuple[_Number, ...]) -> tuple[_Number, ...]:
        return tuple(values[index] for index in picked)

    table = replace(
        table,
        layers=tuple(f"layer.{index}" for index in range(num_layers)),
        sizes={
            degree: replace(
                sizes,
                num_parameters=of(sizes.num_parameters),
                saved_bytes=of(sizes.saved_bytes),
                output_bytes=of(sizes.output_bytes),
            )
            for degree, sizes in table.sizes.items()
        },
        cells={
            key: replace(
                cell,
                forward_s=of(cell.forward_s),
                input_gradient_s=of(cell.input_gradient_s),
                weight_gradient_s=of(cell.weight_gradient_s),
            )
            for key, cell in table.cells.items()
        },
    )
    counts = [1] * len(small.pools)
    for _ in range(draw.randint(*_CHIPS) - len(counts)):
        counts[draw.randrange(len(counts))] += 1
    grown = num_layers / small.table.num_layers
    pools = [
        replace(pool, num_chips=count, memory_bytes=int(pool.memory_bytes * grown))
        for pool, count in zip(small.pools, counts, strict=True)
    ]
    words = replace(small.vocabulary, max_stages=_STAGES, degrees=(1,), schedules=("1f1b",), recompute=False)
    batch = draw.choice((8, 16, 32))
    return replace(small, table=table, pools=tuple(pools), global_batch=batch, vocabulary=words)


def middle_gaps(count: int) -> list[float]:
    """Return by which share coarse searches are behind the search among every shape, for so many problems."""
    gaps: list[float] = []
    seed = 0
    while len(gaps) < count:
        problem = middle_problem(seed)
        seed += 1
        try:
            best = search(problem, method="exact")
        except PlanError:
            continue
        if best.method == "exact":
            gaps.append(search(problem, method="coarse").choice.step_s / best.choice.step_s - 1.0)
    return gaps
