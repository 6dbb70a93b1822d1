"""From the words of a command to a job, its fleet and its plan: what `plan`, `train` and `submit` share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hybrid.config import FleetConfig, JobConfig, dump_job, load_job, parse_job
from hybrid.errors import ConfigError, FleetError, PlanError
from hybrid.hardware.catalog import load_catalog
from hybrid.hardware.fleet import Fleet, build_fleet
from hybrid.models.profile import build_profile
from hybrid.scheduler.plan import Plan
from hybrid.scheduler.planner import plan as make_plan


def read_job(path: Path, overrides: Sequence[str]) -> JobConfig:
    """Return the job in a file with `key.key=value` laid over it; values are YAML.

    Raises:
        ConfigError: the file or an override is wrong.
    """
    job = load_job(path)
    if not overrides:
        return job
    raw: dict[str, Any] = yaml.safe_load(dump_job(job))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ConfigError("an override is KEY=VALUE", value=override, fix="write `--set batch.microbatch=2`")
        *parents, last = key.split(".")
        where = raw
        for parent in parents:
            inner = where.get(parent)
            if not isinstance(inner, dict):
                raise ConfigError(
                    "an override names no mapping of the job", value=parent, valid=where, where=f"--set {override}"
                )
            where = inner
        try:
            where[last] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError("an override's value is not YAML", value=text, where=f"--set {override}") from None
    return parse_job(raw, where=f"{path} with --set")


def fleet_of(job: JobConfig, address: str | None) -> tuple[JobConfig, Fleet]:
    """Return the job with its fleet spelled out, and the fleet; joins the cluster where the fleet is `ray`.

    Raises:
        FleetError: an unknown chip, a wrong catalog, or a cluster with no device that is known.
        MachineError: no cluster answers at the address.
    """
    if isinstance(job.fleet, FleetConfig):
        return job, build_fleet(job.fleet, load_catalog(job.fleet.catalog))
    if address is None:
        raise FleetError(
            "`fleet: ray` needs a cluster", fix="give --address HOST:PORT, or write the fleet's islands into the job"
        )
    from hybrid.hardware.discovery import fleet_of_nodes
    from hybrid.runtime.launcher import join_cluster, nodes_of_cluster

    join_cluster(address, job.runtime.placement_timeout_s)
    catalog = load_catalog(None)
    config = fleet_of_nodes(nodes_of_cluster(), catalog)
    return job.model_copy(update={"fleet": config}), build_fleet(config, catalog)


def plan_of(job: JobConfig, fleet: Fleet, plan_file: Path | None = None) -> Plan:
    """Return the planner's plan, or the one in a file if it fits the job and the fleet.

    Raises:
        PlanError: nothing fits, or the file's plan is of another job.
    """
    if plan_file is not None:
        return _read_plan(plan_file, job, fleet)
    profile = build_profile(job.model, microbatch=job.batch.microbatch, precision=job.precision)
    return make_plan(
        profile,
        fleet,
        schedule=job.schedule,
        num_microbatches=job.batch.num_microbatches,
        precision=job.precision,
        num_stages=job.num_stages,
        efficiency=job.emulation.efficiency,
        job=job.name,
    )


def _read_plan(path: Path, job: JobConfig, fleet: Fleet) -> Plan:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise PlanError(
            "no such plan file", value=str(path), fix="write one with `hybrid plan JOB --json`, or leave --plan out"
        ) from None
    plan = Plan.from_yaml(text, where=str(path))
    for name, found, wanted in (
        ("num_layers", plan.num_layers, job.model.num_layers),
        ("num_microbatches", plan.num_microbatches, job.batch.num_microbatches),
        ("microbatch", plan.microbatch, job.batch.microbatch),
        ("precision", plan.precision, job.precision),
    ):
        if found != wanted:
            raise PlanError(
                f"plan is of another job: {name} is {found!r}, the job's is {wanted!r}",
                where=str(path),
                fix="plan the job again",
            )
    chips = {rank: island for rank, island, _ in fleet.chips()}
    for stage in plan.stages:
        island = chips.get(stage.rank)
        if island is None or island.name != stage.island or island.chip.name != stage.chip:
            valid = ", ".join(f"{i.name} ({i.num_chips} x {i.chip.name})" for i in fleet.islands)
            raise PlanError(
                f"plan puts stage {stage.stage} on rank {stage.rank} ({stage.chip} of {stage.island}), which the fleet lacks",
                valid=valid,
                where=str(path),
                fix="plan the job again on this fleet",
            )
    return plan
