"""From the search's written plan (`hybrid-fleet-plan`) to the replicas that `build_step` takes. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hybrid.errors import PlanError
from hybrid.scheduler.step.build import ReplicaSpec, StageSpec

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
    )
