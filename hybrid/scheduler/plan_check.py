"""When a plan's parts agree: layers covered, samples shared out, ranks used once, memory that fits, an order that runs.

Pure: no torch, no clock, no network. Raises with the key that is wrong; changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from hybrid.errors import PlanError, ScheduleError
from hybrid.scheduler.check import check_schedule
from hybrid.scheduler.schedules import SCHEDULE_NAMES

if TYPE_CHECKING:
    from hybrid.scheduler.plan import Plan, ReplicaPlan, StagePlan

CODECS = ("none", "bf16", "fp8")
"""What may travel on an edge or between replicas."""
_ANEW = "make the plan anew"


def check_consistent(plan: Plan, *, where: str) -> Plan:
    """Return the plan when its parts agree with one another.

    Raises:
        PlanError: names the part that does not.
    """
    _check_numbers([replica.replica for replica in plan.replicas], f"{where}: replicas", "replica")
    if not plan.replicas:
        raise PlanError("a plan needs a replica", where=f"{where}: replicas", fix=_ANEW)
    _check_codec(plan.gradient_codec, f"{where}: gradient_codec")
    for replica in plan.replicas:
        _check_replica(replica, plan.num_layers, f"{where}: replicas[{replica.replica}]")
    _check_shares(plan, where)
    _check_ranks(plan, where)
    return plan


def _check_replica(replica: ReplicaPlan, num_layers: int, where: str) -> None:
    _check_numbers([stage.stage for stage in replica.stages], f"{where}.stages", "stage")
    _check_numbers([edge.from_stage for edge in replica.edges], f"{where}.edges", "from_stage")
    if not replica.stages:
        raise PlanError("a replica needs a stage", where=f"{where}.stages", fix=_ANEW)
    if len(replica.edges) != len(replica.stages) - 1:
        raise PlanError(
            f"{len(replica.stages)} stages need {len(replica.stages) - 1} edges",
            value=len(replica.edges),
            where=f"{where}.edges",
            fix=_ANEW,
        )
    for edge in replica.edges:
        _check_edge(edge.from_stage, edge.to_stage, f"{where}.edges[{edge.from_stage}]")
        _check_codec(edge.codec, f"{where}.edges[{edge.from_stage}].codec")
    for key in ("num_microbatches", "microbatch"):
        if (count := getattr(replica, key)) < 1:
            raise PlanError(
                "a step needs a microbatch", value=count, valid="1 or more", where=f"{where}.{key}", fix="mend it"
            )
    _check_layers(replica, num_layers, where)
    for stage in replica.stages:
        _check_degrees(stage, replica.microbatch, f"{where}.stages[{stage.stage}]")
    _check_groups(replica, where)
    _check_memory(replica, where)
    _check_order(replica, where)


def _check_edge(from_stage: int, to_stage: int, where: str) -> None:
    if to_stage != from_stage + 1:
        raise PlanError(
            "an edge leads to the next stage", value=to_stage, valid=str(from_stage + 1), where=where, fix="mend it"
        )


def _check_layers(replica: ReplicaPlan, num_layers: int, where: str) -> None:
    """Raise unless the stages hold every layer once, in order."""
    first = 0
    for stage in replica.stages:
        place = f"{where}.stages[{stage.stage}]"
        if stage.first_layer != first:
            raise PlanError(
                "first_layer must follow the stage before",
                value=stage.first_layer,
                valid=str(first),
                where=place,
                fix="let the stages hold every layer once, in order",
            )
        if stage.end_layer <= stage.first_layer:
            raise PlanError(
                "a stage needs a layer",
                value=stage.end_layer,
                valid=f"{first + 1} or more",
                where=f"{place}.end_layer",
                fix="move the cut",
            )
        first = stage.end_layer
    if first != num_layers:
        raise PlanError(
            "the stages hold another number of layers than the model",
            value=first,
            valid=str(num_layers),
            where=where,
            fix="mend end_layer of the last stage",
        )


def _check_degrees(stage: StagePlan, microbatch: int, where: str) -> None:
    for key in ("tensor_parallel", "width"):
        if (count := getattr(stage, key)) < 1:
            raise PlanError(
                "a stage needs a rank", value=count, valid="1 or more", where=f"{where}.{key}", fix="mend it"
            )
    if len(stage.ranks) != stage.tensor_parallel * stage.width:
        raise PlanError(
            f"tensor_parallel {stage.tensor_parallel} and width {stage.width} need another number of ranks",
            value=len(stage.ranks),
            valid=str(stage.tensor_parallel * stage.width),
            where=f"{where}.ranks",
            fix="name each rank of the stage once",
        )
    if microbatch % stage.width:
        raise PlanError(
            "the copies of a stage share out a microbatch's samples evenly",
            value=stage.width,
            valid=f"a divisor of {microbatch}",
            where=f"{where}.width",
            fix="change the microbatch or the width",
        )
    if stage.weight_gradient_s > stage.backward_s:
        raise PlanError(
            "weight_gradient_s is a part of backward_s",
            value=stage.weight_gradient_s,
            valid=f"at most {stage.backward_s}",
            where=f"{where}.weight_gradient_s",
            fix="mend it",
        )


def _check_groups(replica: ReplicaPlan, where: str) -> None:
    """Raise where stages share some of their ranks but not all, or describe the same ranks differently."""
    first_of: dict[int, StagePlan] = {}
    for stage in replica.stages:
        for rank in stage.ranks:
            other = first_of.setdefault(rank, stage)
            for key in ("ranks", "island", "chip", "backend", "memory_limit_bytes"):
                if getattr(other, key) != getattr(stage, key):
                    raise PlanError(
                        f"stages {other.stage} and {stage.stage} are both on rank {rank} but differ in {key}",
                        value=str(getattr(stage, key)),
                        valid=str(getattr(other, key)),
                        where=f"{where}.stages[{stage.stage}].{key}",
                        fix="let them be equal, or name other ranks",
                    )


def _check_memory(replica: ReplicaPlan, where: str) -> None:
    for group in replica.groups:
        stages = [stage for stage in replica.stages if stage.ranks == group]
        needed, limit = sum(stage.memory_bytes for stage in stages), stages[0].memory_limit_bytes
        if needed > limit:
            names = " and ".join(str(stage.stage) for stage in stages)
            raise PlanError(
                f"stage{'s' if len(stages) > 1 else ''} {names} lack{'' if len(stages) > 1 else 's'} "
                f"{needed - limit:,} bytes",
                value=needed,
                valid=f"at most {limit}",
                where=f"{where}.stages[{stages[0].stage}]",
                fix="give it fewer layers",
            )


def _check_order(replica: ReplicaPlan, where: str) -> None:
    key = f"{where}.{'order' if replica.order else 'schedule'}"
    if replica.schedule not in SCHEDULE_NAMES:
        raise PlanError(
            "no such schedule",
            value=replica.schedule,
            valid=SCHEDULE_NAMES,
            where=f"{where}.schedule",
            fix="name one of these",
        )
    try:
        check_schedule(replica.build_schedule())
    except ScheduleError as error:
        place = f"{key}, {error.where}" if error.where else key
        raise PlanError(error.fact, value=error.value, valid=error.valid, where=place, fix=error.fix or _ANEW) from None


def _check_shares(plan: Plan, where: str) -> None:
    """Raise unless the replicas' samples follow one another over the whole global batch."""
    first = 0
    for replica in plan.replicas:
        if replica.first_sample != first:
            raise PlanError(
                "first_sample must follow the replica before",
                value=replica.first_sample,
                valid=str(first),
                where=f"{where}: replicas[{replica.replica}].first_sample",
                fix="let the replicas take every sample once, in order",
            )
        first += replica.num_samples
    if first != plan.global_batch:
        raise PlanError(
            "the replicas' microbatches hold another number of samples than the global batch",
            value=first,
            valid=str(plan.global_batch),
            where=f"{where}: global_batch",
            fix="mend num_microbatches or global_batch",
        )


def _check_ranks(plan: Plan, where: str) -> None:
    """Raise unless the replicas' ranks are 0, 1, 2, … and each belongs to one replica."""
    ranks = sorted(rank for replica in plan.replicas for group in replica.groups for rank in group)
    for one, other in pairwise(ranks):
        if one == other:
            raise PlanError(
                f"rank {one} is used twice", where=f"{where}: replicas", fix="give each stage ranks of its own"
            )
    if ranks != list(range(len(ranks))):
        missing = next(number for number, rank in enumerate(ranks) if number != rank)
        raise PlanError(
            f"rank {missing} is missing",
            value=max(ranks),
            valid=f"ranks 0 to {len(ranks) - 1}, each once",
            where=f"{where}: replicas",
            fix="number the ranks 0, 1, 2, …",
        )


def _check_codec(codec: str, where: str) -> None:
    if codec not in CODECS:
        raise PlanError("no such codec", value=codec, valid=CODECS, where=where, fix="name one of these")


def _check_numbers(numbers: Sequence[int], where: str, key: str) -> None:
    for index, number in enumerate(numbers):
        if number != index:
            raise PlanError(
                f"{key} out of order",
                value=number,
                valid=str(index),
                where=f"{where}[{index}]",
                fix="number them 0, 1, 2, …",
            )
