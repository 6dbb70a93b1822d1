"""Fleet plans: a choice as JSON data, groups of identical replicas however many; described in docs/formats.md.

Pure: no file. `hybrid.scheduler.step.fleet_plan` reads them.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from hybrid.scheduler.search.choice import Choice, Group
from hybrid.scheduler.search.codecs import choose_codecs
from hybrid.scheduler.search.sent import narrowing

VERSION = 1


def write_fleet_plan(choice: Choice) -> dict[str, Any]:
    """Return a found plan as JSON data: groups of identical replicas, and what is predicted."""
    problem = choice.problem
    return {
        "format": "hybrid-fleet-plan",
        "version": VERSION,
        "model": problem.table.model,
        "source": problem.table.label,
        "sequence_length": problem.table.sequence_length,
        "objective": problem.objective,
        "global_batch": problem.global_batch,
        "predicted": {
            "step_s": choice.step_s,
            "reduce_s": choice.reduce_s,
            "tokens_per_s": choice.tokens_per_s,
            "usd_per_hour": choice.usd_per_hour,
            "egress_usd_per_step": choice.egress_usd_per_step,
            "usd_per_token": choice.usd_per_token,
            "watts": choice.watts,
            "joules_per_token": choice.joules_per_token,
        },
        "chips": {pool.name: used for pool, used in zip(problem.pools, choice.chips, strict=True)},
        "groups": [_group(group) for group in choice.groups],
    }


def _group(group: Group) -> dict[str, Any]:
    column = group.column
    return {
        "num_replicas": group.num_replicas,
        "num_microbatches": group.num_microbatches,
        "microbatch": column.samples,
        "schedule": group.schedule_name,
        "order": list(group.order),
        "step_s": group.step_s,
        "stages": [_stage(group, stage) for stage in range(len(column.chosen))],
        "edges": [_edge(group, stage, codec) for stage, codec in enumerate(choose_codecs(group))],
    }


def _stage(group: Group, stage: int) -> dict[str, Any]:
    column, table = group.column, group.column.table
    index, run = column.chosen[stage], list(pairwise(column.bounds))[stage]
    option = table.options[index]
    pool = table.problem.pools[option.pool]
    return {
        "rank": column.rank_of_stage[stage],
        "pool": pool.name,
        "chip": pool.chip,
        "usd_per_hour": pool.usd_per_hour,
        "watts": pool.watts,
        "tensor_parallel": option.degree,
        "width": option.width,
        "recompute": option.recompute,
        "first_layer": run[0],
        "end_layer": run[1],
        "forward_s": float(table.forward_s[(index, *run)]),
        "backward_s": float(table.backward_s[(index, *run)]),
        "weight_gradient_s": float(table.weight_s[(index, *run)]),
        "update_s": column.update_s,
        "memory_bytes": round(column.peak_bytes_of_stage(stage, group.num_microbatches)),
        "memory_limit_bytes": round(float(table.limit_bytes[index])),
    }


def _edge(group: Group, stage: int, codec: str) -> dict[str, Any]:
    column, table = group.column, group.column.table
    ends = column.ends_of_edge(stage)
    transfer_s, latency_s = table.coded_edge_s(codec, *ends)
    share = narrowing(table.problem.table.precision, codec)
    return {
        "size_bytes": round(float(table.output_bytes[ends[2]]) * share),
        "transfer_s": transfer_s,
        "latency_s": latency_s,
        "codec": codec,
    }
