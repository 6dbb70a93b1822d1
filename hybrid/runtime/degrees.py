"""Which degrees of a plan's stages its job can have: refused before a device is taken. No torch.

A rank's stages share its groups, so they share their degrees; what is cut must divide.
"""

from __future__ import annotations

from hybrid.config import JobConfig
from hybrid.errors import ConfigError, PlanError
from hybrid.models.shards import check_degree
from hybrid.scheduler.plan import Plan, ReplicaPlan, StagePlan


def check_degrees(job: JobConfig, plan: Plan) -> None:
    """Refuse a plan whose stages cannot be shared out as it says.

    Raises:
        PlanError: names the number that would have to change.
        ConfigError: the job asks for what only stages of one rank do.
    """
    for replica in plan.replicas:
        for stage in replica.stages:
            where = f"plan: replicas[{replica.replica}].stages[{stage.stage}]"
            _check_stage(job, replica, stage, where)
    if job.runtime.compile and any(len(stage.ranks) > 1 for stage in plan.stages):
        raise ConfigError(
            "a stage of several ranks is not compiled: its collectives are no part of a graph",
            value="true",
            valid=["false"],
            where="runtime.compile",
            fix="set runtime.compile to false, or plan one rank a stage",
        )


def _check_stage(job: JobConfig, replica: ReplicaPlan, stage: StagePlan, where: str) -> None:
    first = next(one for one in replica.stages if one.ranks == stage.ranks)
    for key in ("tensor_parallel", "width"):
        if getattr(stage, key) != getattr(first, key):
            raise PlanError(
                f"stages {first.stage} and {stage.stage} are on the same ranks but differ in {key}",
                value=getattr(stage, key),
                valid=str(getattr(first, key)),
                where=f"{where}.{key}",
                fix="let them be equal",
            )
    if list(stage.ranks) != sorted(stage.ranks):
        raise PlanError(
            "the ranks of a stage ascend",
            value=list(stage.ranks),
            valid=str(sorted(stage.ranks)),
            where=f"{where}.ranks",
            fix="number them in order",
        )
    if job.batch.microbatch % stage.width:
        raise PlanError(
            f"batch.microbatch {job.batch.microbatch}, by which the model is evaluated, is not a multiple of the width",
            value=stage.width,
            valid=f"a divisor of {job.batch.microbatch}",
            where=f"{where}.width",
            fix="change batch.microbatch or the width",
        )
    if stage.tensor_parallel > 1:
        check_degree(
            job.model,
            stage.tensor_parallel,
            stage.layers,
            sequence_parallel=job.runtime.sequence_parallel,
            where=f"{where}.tensor_parallel",
        )
