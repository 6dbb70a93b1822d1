"""From the search's written plan (`hybrid-fleet-plan`) to a training step, or to the replicas that `build_step` takes.

Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.errors import PlanError
from hybrid.scheduler.step.build import ReplicaSpec, StageSpec, schedule_of
from hybrid.scheduler.step.facts import (
    EdgeCost,
    Message,
    Pipeline,
    Reduction,
    StageCost,
    StageMemory,
    TrainingStep,
)

_FIX = "see docs/formats.md, Plan"


def read_replicas(raw: Mapping[str, Any], *, schedule: str = "1f1b") -> tuple[ReplicaSpec, ...]:
    """Return the replicas of a plan that the search wrote, a kind a group.

    Args:
        raw: the parsed JSON.
        schedule: what the pipelines run, where a group names none.

    Raises:
        PlanError: another format, or a key that is missing.
    """
    if raw.get("format") != "hybrid-fleet-plan" or raw.get("version") != 1:
        found = f"{raw.get('format')} version {raw.get('version')}"
        raise PlanError("not a fleet's plan", value=found, valid="hybrid-fleet-plan version 1", fix=_FIX)
    try:
        return tuple(_replica(index, group, schedule) for index, group in enumerate(raw["groups"]))
    except KeyError as error:
        raise PlanError("a key of the plan is missing", value=error.args[0], fix=_FIX) from None


def read_step(raw: Mapping[str, Any]) -> TrainingStep:
    """Return the training step that a fleet's plan holds: a pipeline a group, the reduction after the last of them.

    Like `step_of_plan` it knows each stage's peak memory and not what it consists of.

    Raises:
        PlanError: another format, or a key that is missing.
    """
    replicas = read_replicas(raw)
    try:
        pipelines = tuple(_pipeline(*pair) for pair in zip(raw["groups"], replicas, strict=True))
        seconds = float(raw["predicted"]["reduce_s"])
        members = tuple((index, stage) for index, one in enumerate(pipelines) for stage in range(len(one.stages)))
        reduction = Reduction(name="gradients", members=members, seconds=seconds)
        return TrainingStep(
            pipelines=pipelines,
            reductions=(reduction,) if seconds > 0 else (),
            tokens_per_sample=raw.get("sequence_length", 1),
            source=raw["source"],
        )
    except KeyError as error:
        raise PlanError("a key of the plan is missing", value=error.args[0], fix=_FIX) from None


def chips_of_fleet_plan(raw: Mapping[str, Any]) -> dict[str, int]:
    """Return how many chips of each kind the plan runs on; a rank of several stages counts once."""
    chips: dict[str, int] = {}
    for group in raw["groups"]:
        ranks = {stage.get("rank", index): stage for index, stage in enumerate(group["stages"])}
        for stage in ranks.values():
            number = stage["tensor_parallel"] * stage["width"] * group["num_replicas"]
            chips[stage["chip"]] = chips.get(stage["chip"], 0) + number
    return chips


def _pipeline(group: Mapping[str, Any], replica: ReplicaSpec) -> Pipeline:
    stages = tuple(
        StageCost(
            name=f"{stage['pool']} {stage['chip']}",
            forward_s=stage["forward_s"],
            input_gradient_s=stage["backward_s"] - stage["weight_gradient_s"],
            weight_gradient_s=stage["weight_gradient_s"],
            update_s=stage["update_s"],
            num_ranks=stage["tensor_parallel"] * stage["width"],
            memory=StageMemory(state_bytes=stage["memory_bytes"], limit_bytes=stage["memory_limit_bytes"]),
            usd_per_hour=stage["usd_per_hour"],
            watts=stage["watts"],
        )
        for stage in group["stages"]
    )
    messages = [Message(transfer_s=edge["transfer_s"], latency_s=edge["latency_s"]) for edge in group["edges"]]
    return Pipeline(
        name=replica.name,
        schedule=schedule_of(replica),
        stages=stages,
        edges=tuple(EdgeCost(activation=message, gradient=message) for message in messages),
        samples=replica.microbatch,
        count=replica.count,
    )


def _replica(index: int, group: Mapping[str, Any], schedule: str) -> ReplicaSpec:
    return ReplicaSpec(
        name=f"group {index}",
        stages=tuple(
            StageSpec(
                pool=stage["pool"],
                first_layer=stage["first_layer"],
                end_layer=stage["end_layer"],
                degree=stage["tensor_parallel"],
                width=stage["width"],
                recompute=stage["recompute"],
            )
            for stage in group["stages"]
        ),
        microbatch=group["microbatch"],
        num_microbatches=group["num_microbatches"],
        schedule=group.get("schedule", schedule),
        count=group["num_replicas"],
        rank_of_stage=tuple(stage.get("rank", index) for index, stage in enumerate(group["stages"])),
        order=tuple(group.get("order", ())),
    )
