"""Partition: which contiguous run of layers each stage holds. Exact, by dynamic programming.

Pure: no torch, no clock, no network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hybrid.errors import PlanError

Matrix = NDArray[np.float64]


def partition_min_max(
    layer_seconds_of_stage: Sequence[Sequence[float]],
    *,
    layer_bytes_of_stage: Sequence[Sequence[float]] | None = None,
    cut_bytes_of_stage: Sequence[Sequence[float]] | None = None,
    limit_bytes_of_stage: Sequence[float] | None = None,
) -> tuple[range, ...]:
    """Return the layers of each stage such that the slowest stage is as fast as it can be.

    Every stage gets at least one layer. Among the splits with the same slowest stage the one with the
    smallest sum over the stages is returned (the time to fill and drain the pipeline), then the one whose
    early stages are short.

    Args:
        layer_seconds_of_stage: seconds of each layer on each stage's device.
        layer_bytes_of_stage: bytes that each layer needs on each stage.
        cut_bytes_of_stage: bytes that a stage needs where a cut before layer 0, 1, …, num_layers bounds it,
            on either side: buffers of the edge.
        limit_bytes_of_stage: bytes that each stage has; without it memory is not looked at.

    Shapes:
        layer_seconds_of_stage, layer_bytes_of_stage: (stages, layers).  cut_bytes_of_stage: (stages, layers +
        1).
        limit_bytes_of_stage: (stages,).

    Raises:
        PlanError: fewer layers than stages, or no split fits; says how many bytes the best one misses.

    Cost:
        O(stages * layers²), vectorised over one layers axis.
    """
    seconds = np.asarray(layer_seconds_of_stage, dtype=np.float64)
    num_stages, num_layers = seconds.shape
    if num_layers < num_stages:
        raise PlanError(
            f"{num_stages} stages but only {num_layers} layers",
            value=num_stages,
            valid=f"1 to {num_layers} stages",
            fix="use fewer stages",
        )
    allowed = np.zeros((num_stages, num_layers + 1, num_layers + 1), dtype=bool)
    allowed[:] = np.tri(num_layers + 1, k=-1, dtype=bool).T  # at least one layer: first < end
    if limit_bytes_of_stage is not None:
        over = stage_bytes(layer_bytes_of_stage or np.zeros_like(seconds), cut_bytes_of_stage)
        over -= np.asarray(limit_bytes_of_stage, dtype=np.float64)[:, None, None]
        fits = over <= 0
        if _best_bottleneck(np.where(allowed, over, np.inf)) > 0:
            raise _misfit(over, allowed)
        allowed &= fits
    cost = np.where(allowed, _interval_sums(seconds), np.inf)
    bottleneck = _best_bottleneck(cost)
    # Sums of the same numbers in another order may differ in the last bit.
    slack = bottleneck * (1 + 1e-12)
    return _smallest_sum(np.where(cost <= slack, cost, np.inf))


def even_out_ranks(
    split: Sequence[range],
    layer_seconds_of_stage: Sequence[Sequence[float]],
    rank_of_stage: Sequence[int],
    *,
    fits: Callable[[int, range], bool],
) -> tuple[range, ...]:
    """Return the split with its cuts moved, a layer at a time, as long as that evens out the ranks' seconds.

    A rank of several stages works on each in turn, so that an even split over stages, whole layers each, can be far
    from even over ranks. Greedy: of all moves of one cut by one layer the best one is made (the slowest rank counts
    first, then the next one), until none helps.

    Args:
        split: each stage's layers, in order.
        fits: (stage, layers): whether they fit its memory.

    Cost:
        O(stages²) a move.
    """
    prefix = np.cumsum(np.pad(np.asarray(layer_seconds_of_stage, dtype=np.float64), ((0, 0), (1, 0))), axis=1)

    def unevenness(bounds: list[int]) -> list[float]:
        work = [0.0] * (max(rank_of_stage) + 1)
        for stage, rank in enumerate(rank_of_stage):
            work[rank] += float(prefix[stage, bounds[stage + 1]] - prefix[stage, bounds[stage]])
        return sorted(work, reverse=True)

    bounds = [split[0].start, *(run.stop for run in split)]
    best = unevenness(bounds)
    while True:
        found = None
        for cut in range(1, len(split)):
            for step in (-1, 1):
                moved = bounds.copy()
                moved[cut] += step
                before, after = range(moved[cut - 1], moved[cut]), range(moved[cut], moved[cut + 1])
                if before and after and fits(cut - 1, before) and fits(cut, after) and unevenness(moved) < best:
                    best, found = unevenness(moved), moved
        if found is None:
            return tuple(range(first, end) for first, end in pairwise(bounds))
        bounds = found


def stage_bytes(
    layer_bytes_of_stage: Sequence[Sequence[float]] | Matrix,
    cut_bytes_of_stage: Sequence[Sequence[float]] | None,
) -> Matrix:
    """Return the bytes of every stage for every run of layers.

    Shapes:
        returns: (stages, layers + 1, layers + 1), indexed [stage, first, end].
    """
    total = _interval_sums(np.asarray(layer_bytes_of_stage, dtype=np.float64))
    if cut_bytes_of_stage is not None:
        cuts = np.asarray(cut_bytes_of_stage, dtype=np.float64)
        total = total + cuts[:, :, None] + cuts[:, None, :]
    return total


def _interval_sums(values: Matrix) -> Matrix:
    """Return sums over layers first..end-1.

    Shapes:
        values: (stages, layers).  returns: (stages, layers + 1, layers + 1).
    """
    prefix = np.concatenate([np.zeros((values.shape[0], 1)), np.cumsum(values, axis=1)], axis=1)
    return np.asarray(prefix[:, None, :] - prefix[:, :, None])


def _best_bottleneck(cost: Matrix) -> float:
    """Return the smallest possible largest cost over the stages."""
    best = cost[0, 0]  # best[end]: the first stages hold layers 0..end-1
    for stage_cost in cost[1:]:
        best = np.maximum(best[:, None], stage_cost).min(axis=0)
    return float(best[-1])


def _smallest_sum(cost: Matrix) -> tuple[range, ...]:
    """Return the split with the smallest sum of costs."""
    best = cost[0, 0]
    choices: list[NDArray[np.intp]] = []
    for stage_cost in cost[1:]:
        totals = best[:, None] + stage_cost
        first = totals.argmin(axis=0)
        choices.append(first)
        best = totals[first, np.arange(totals.shape[1])]
    bounds = [cost.shape[1] - 1]
    for choice in reversed(choices):
        bounds.append(int(choice[bounds[-1]]))
    bounds.append(0)
    bounds.reverse()
    return tuple(range(first, end) for first, end in pairwise(bounds))


def _misfit(over: Matrix, allowed: NDArray[np.bool_]) -> PlanError:
    """Return the error that names the worst stage of the split that comes closest to fitting."""
    over = np.where(allowed, over, np.inf)
    worst = _best_bottleneck(over)
    split = _smallest_sum(np.where(over <= worst, np.maximum(over, 0.0), np.inf))
    lacks = [over[stage, layers.start, layers.stop] for stage, layers in enumerate(split)]
    stage = int(np.argmax(lacks))
    missing = round(float(lacks[stage]))
    layers = split[stage]
    return PlanError(
        f"the model does not fit: in the best split stage {stage} "
        f"(layers {layers.start} to {layers.stop - 1}) misses {missing:,} bytes ({missing / 2**30:.3f} GiB)",
        fix=f"give its device {missing:,} bytes more, or use more stages, a smaller microbatch or model",
    )
