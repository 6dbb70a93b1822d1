"""What this machine's part of the simulator's benchmark runs: every schedule on 1, 2, 4 and 8 ranks. Pure data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from hybrid.bench.workload import COMPUTE_HEAVY, TINY, Pace, Workload
from hybrid.scheduler.auto import auto_schedule
from hybrid.scheduler.interleaved import round_layout
from hybrid.scheduler.pipeline_costs import PipelineCosts
from hybrid.scheduler.schedules import SCHEDULES
from hybrid.scheduler.zero_bubble import v_layout

_CUTS = {1: (0,), 2: (0, 4), 4: (0, 2, 4, 6)}
_FINER_CUTS = {2: (0, 2, 4, 6), 4: tuple(range(8))}
"""Of the same eight layers, for two stages a rank."""
_NUM_TRIES = 120


def cpu_workloads(num_ranks: int) -> Iterator[Workload]:
    """Yield a workload for each schedule; `auto` without its order, which depends on what the stages cost."""
    model = COMPUTE_HEAVY.model.model_copy(update={"num_blocks": 6})
    base = replace(COMPUTE_HEAVY, name=f"cpu_{num_ranks}", model=model, first_layer_of_stage=_CUTS[num_ranks])
    if num_ranks == 1:
        # One order is as good as another: whole backwards and split ones.
        yield base
        yield replace(base, schedule="zb-h1")
        return
    for schedule in SCHEDULES:
        yield replace(base, schedule=schedule)
    finer = replace(base, first_layer_of_stage=_FINER_CUTS[num_ranks])
    yield replace(finer, schedule="interleaved", rank_of_stage=round_layout((2,) * num_ranks))
    yield replace(finer, schedule="zb-v", rank_of_stage=v_layout(num_ranks))
    yield replace(base, schedule="auto")


def chip_workloads(pace: Pace) -> Iterator[tuple[Workload, Pace]]:
    """Yield a workload for each schedule on emulated chips, and the stages' paces; a rank's stages share its pace."""
    num_ranks = len(pace.forward_s)
    for schedule in SCHEDULES:
        yield replace(TINY, schedule=schedule), pace
    seconds = [
        {"F": forward_s, "I": backward_s / 2, "W": backward_s / 2}
        for forward_s, backward_s in zip(pace.forward_s, pace.backward_s, strict=True)
    ]
    yield with_order(replace(TINY, schedule="auto"), seconds), pace
    model = TINY.model.model_copy(update={"num_blocks": 2 * num_ranks - 2})
    finer = replace(TINY, model=model, first_layer_of_stage=tuple(range(2 * num_ranks)))
    for schedule, layout in (("interleaved", round_layout((2,) * num_ranks)), ("zb-v", v_layout(num_ranks))):
        halves = Pace(
            forward_s=tuple(pace.forward_s[rank] / 2 for rank in layout),
            backward_s=tuple(pace.backward_s[rank] / 2 for rank in layout),
        )
        yield replace(finer, schedule=schedule, rank_of_stage=layout), halves


def with_order(workload: Workload, seconds: Sequence[Mapping[str, float]]) -> Workload:
    """Return the workload with the order that `auto` finds for what the stages cost, each rank on a core of its own.

    Args:
        seconds: by stage, seconds of F, I and W.
    """
    num_stages, num_ranks = workload.num_stages, workload.num_ranks
    costs = PipelineCosts(
        rank_of_stage=workload.layout,
        forward_s=tuple(stage["F"] for stage in seconds),
        input_gradient_s=tuple(stage["I"] for stage in seconds),
        weight_gradient_s=tuple(stage["W"] for stage in seconds),
        transfer_s=(0.0,) * (num_stages - 1),
        held_bytes=(1.0,) * num_stages,
        kept_bytes=(1.0,) * num_stages,
        limit_bytes=(math.inf,) * num_ranks,
    )
    found = auto_schedule(costs, workload.num_microbatches, num_tries=_NUM_TRIES)
    return replace(workload, order=tuple(" ".join(map(str, row)) for row in found.actions_of_rank))
