"""The oracle of `hybrid bench planner`: every plan of a small problem, and random small problems to try.

Pure. Shares with the search the seconds and bytes of a shape, not the way in which shapes are chosen: it
walks over every multiset of chip vectors and every bound on the reduction, and drops nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrid.scheduler.search.columns import Column
from hybrid.scheduler.search.links import LinkModel, Network
from hybrid.scheduler.search.options import OptionTable
from hybrid.scheduler.search.problem import MemoryModel, Pool, Problem, Vocabulary
from hybrid.scheduler.search.shapes import enumerate_columns
from hybrid.scheduler.search.table import Cell, ProfileTable, Sizes

_MOST_SHAPES = 400_000


def random_problem(seed: int, *, memory_binds: bool) -> Problem:
    """Return a small problem: up to 6 chips of up to 3 kinds, up to 8 layers; at random, but the same for a seed.

    Args:
        seed: which.
        memory_binds: give the chips so little memory that the whole model fits on none of them.
    """
    draw = random.Random(seed)
    layers, kinds = draw.randint(3, 8), draw.randint(1, 3)
    counts = [draw.randint(1, 6 // kinds) for _ in range(kinds)]
    speeds = [draw.uniform(0.3, 3.0) for _ in range(kinds)]
    work = [draw.uniform(0.5, 2.0) for _ in range(layers)]
    microbatches = (1, 2) if draw.random() < 0.5 else (1,)
    degrees = (1, 2) if draw.random() < 0.3 and layers <= 6 else (1,)
    parameters = [draw.randint(1, 9) * 1_000_000 for _ in range(layers)]
    saved = [draw.randint(1, 9) * 4_000_000 for _ in range(layers)]
    outputs = [draw.randint(1, 4) * 500_000 for _ in range(layers)]
    cells = {}
    for kind in range(kinds):
        for size in microbatches:
            for degree in degrees:
                scale = speeds[kind] * degree**0.8
                forward = tuple(1e-3 * x * (0.3 + 0.7 * size) / scale for x in work)
                cells[f"kind{kind}", degree, size] = Cell(
                    forward_s=forward, input_gradient_s=forward, weight_gradient_s=forward, update_s=5e-4 / scale
                )
    sizes = {
        degree: Sizes(
            num_parameters=tuple(x // degree for x in parameters),
            saved_bytes=tuple(x // degree for x in saved),
            output_bytes=tuple(outputs),
        )
        for degree in degrees
    }
    whole = 16 * sum(parameters) + sum(saved)
    largest = max(16 * p + 2 * s for p, s in zip(parameters, saved, strict=True))
    limit = max(1.2 * largest, whole * draw.uniform(0.35, 0.8)) if memory_binds else 20.0 * whole
    links = {
        (f"kind{a}", 1, f"kind{b}", 1): LinkModel(
            latency_s=draw.choice((1e-5, 1e-4)), bytes_per_s=draw.choice((2e9, 1e10, 5e10))
        )
        for a in range(kinds)
        for b in range(a, kinds)
    }
    return Problem(
        table=ProfileTable(
            model=f"random {seed}",
            source="imported",
            note="made up",
            sequence_length=128,
            precision="bf16",
            layers=tuple(f"layer.{index}" for index in range(layers)),
            sizes=sizes,
            cells=cells,
        ),
        pools=tuple(
            Pool(name=f"pool{k}", chip=f"kind{k}", num_chips=n, node_size=2, memory_bytes=int(limit))
            for k, n in enumerate(counts)
        ),
        network=Network(links=links),
        global_batch=draw.choice((4, 6, 8)),
        memory=MemoryModel(bytes_per_parameter=16, margin=0.0, counts_buffers=False),
        vocabulary=Vocabulary(degrees=degrees, microbatches=microbatches, max_stages=6, **_more_choices(seed)),
    )


def _more_choices(seed: int) -> dict[str, Any]:
    """Return what else may be chosen: schedules of every kind in two of three problems, recompute in one of four."""
    draw = random.Random(-1 - seed)
    schedules = draw.choice((("1f1b",), ("gpipe", "1f1b", "zb-h1", "zb-h2"), ("1f1b", "interleaved", "zb-v")))
    return {"schedules": schedules, "recompute": draw.random() < 0.25}


def least_step_s(problem: Problem) -> float:
    """Return the shortest step of any plan: every shape and schedule, every set of replicas, every share of the batch.

    Infinite where nothing fits.
    """
    tables = [OptionTable(problem, size) for size in problem.vocabulary.microbatches]
    columns = enumerate_columns([table for table in tables if table.options], most=_MOST_SHAPES)
    assert columns is not None, "the problem is not small"
    if not columns:
        return float("inf")
    batch, best = problem.global_batch, float("inf")
    by_vector: dict[tuple[int, ...], list[int]] = {}
    for index, column in enumerate(columns):
        by_vector.setdefault(column.chips, []).append(index)
    takes = np.stack([_samples_s(column, batch) for column in columns])
    available = tuple(pool.num_chips for pool in problem.pools)
    for replicas in _multisets(sorted(by_vector), available):
        used = tuple(pool for pool in range(len(available)) if any(vector[pool] for vector in replicas))
        reduce_s = np.array([column.reduce_s(len(replicas), used) for column in columns])
        rows = {vector: np.array(by_vector[vector]) for vector in set(replicas)}
        for limit_s in np.unique(np.concatenate([reduce_s[mine] for mine in rows.values()])):
            if limit_s >= best:
                break
            least = {vector: _least(takes[mine], reduce_s[mine] <= limit_s) for vector, mine in rows.items()}
            best = min(best, _shared(replicas, least, batch) + float(limit_s))
    return best


def _samples_s(column: Column, batch: int) -> NDArray[np.float64]:
    """Return the seconds in which the replica takes 0, 1, … samples; infinite where no whole microbatches hold them."""
    seconds = np.full(batch + 1, np.inf)
    seconds[0] = 0.0
    most = batch // column.samples
    seconds[column.samples : most * column.samples + 1 : column.samples] = column.seconds[:most]
    return seconds


def _least(takes: NDArray[np.float64], kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the least seconds in which a replica on some chips takes 0, 1, … samples."""
    return np.asarray(takes[kept].min(axis=0, initial=np.inf))


def _multisets(
    vectors: list[tuple[int, ...]], left: tuple[int, ...], start: int = 0
) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Yield every multiset of chip vectors that the chips allow, but the empty one."""
    for index in range(start, len(vectors)):
        rest = tuple(have - need for have, need in zip(left, vectors[index], strict=True))
        if min(rest) >= 0:
            yield (vectors[index],)
            for more in _multisets(vectors, rest, index):
                yield (vectors[index], *more)


def _shared(
    replicas: tuple[tuple[int, ...], ...], least: dict[tuple[int, ...], NDArray[np.float64]], batch: int
) -> float:
    """Return the least of the slowest replica's seconds over every share of the batch."""
    done = np.full(batch + 1, np.inf)
    done[0] = 0.0
    for vector in replicas:
        mine = least[vector]
        done = np.array([min(max(done[s - t], mine[t]) for t in range(s + 1)) for s in range(batch + 1)])
    return float(done[batch])
