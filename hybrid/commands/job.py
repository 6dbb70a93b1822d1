"""From the words of a command to a job, its fleet and its plan: what `plan`, `train` and `submit` share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid.complaints import Key, close_to
from hybrid.config import FleetConfig, JobConfig, parse_job
from hybrid.errors import ConfigError, FleetError, PlanError
from hybrid.hardware.catalog import load_catalog
from hybrid.hardware.fleet import Fleet, build_fleet
from hybrid.job_file import load_job
from hybrid.marked_yaml import read_yaml
from hybrid.models.profile import build_profile
from hybrid.runtime.stage_numerics import check_numerics
from hybrid.scheduler.plan import Plan
from hybrid.scheduler.planner import plan as make_plan


def read_job(path: Path, overrides: Sequence[str]) -> JobConfig:
    """Return the job in a file with `key.key=value` laid over it; values are YAML, paths are taken from here.

    Raises:
        ConfigError: the file or an override is wrong.
    """
    job = load_job(path)
    raw: dict[str, Any] = job.model_dump(mode="json")
    text_of_key = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        keys = tuple(key.split("."))
        if not equals or not all(keys):
            raise ConfigError(
                "an override is KEY=VALUE",
                value=override,
                where="--set",
                fix="write, for example, `--set batch.microbatch=2`",
            )
        _lay(raw, keys, override, read_yaml(text, what="an override's value", where=f"--set {override}").value)
        text_of_key[keys] = override

    def place(key: Key) -> str:
        # The file was right before the overrides were laid over it.
        met = [text for keys, text in text_of_key.items() if all(a == b for a, b in zip(keys, key, strict=False))]
        words = " ".join(f"--set {text}" for text in met or text_of_key.values())
        return f"{words}: {'.'.join(map(str, key)) or 'job'}"

    return parse_job(raw, where=place) if overrides else job


def _lay(raw: dict[str, Any], keys: tuple[str, ...], override: str, value: object) -> None:
    """Set the value of a key in nested mappings."""
    where = raw
    for depth, key in enumerate(keys[:-1]):
        if key == "planner" and where is raw and raw.get(key) is None:
            raw[key] = {}  # a job without the section gets it by an override
        inner = where.get(key)
        if not isinstance(inner, dict):
            mappings = [name for name, held in where.items() if isinstance(held, dict)]
            fact = f"the job has no mapping {'.'.join(keys[: depth + 1])}"
            raise ConfigError(fact, value=key, valid=mappings, where=f"--set {override}", fix=close_to(key, mappings))
        where = inner
    where[keys[-1]] = value


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
        ConfigError, UnsupportedFormat: `emulation.numerics` does not fit the plan's chips.
    """
    if plan_file is not None:
        plan = _read_plan(plan_file, job, fleet)
    else:
        plan = _make_plan(job, fleet) if job.planner is None else searched_plan(job, fleet)
    check_numerics(job, fleet, plan)
    return plan


def _make_plan(job: JobConfig, fleet: Fleet) -> Plan:
    profile = build_profile(job.model, microbatch=job.batch.microbatch, precision=job.precision)
    return make_plan(
        profile,
        fleet,
        schedule=job.schedule,
        num_microbatches=job.batch.num_microbatches,
        precision=job.precision,
        num_stages=job.num_stages,
        stages_per_rank=job.stages_per_rank,
        efficiency=job.emulation.efficiency,
        job=job.name,
    )


def searched_plan(job: JobConfig, fleet: Fleet) -> Plan:
    """Return the best plan that the search finds for the job's `planner` section.

    Raises:
        PlanError: nothing fits, no plan keeps to the limits, or the profile is of another model.
    """
    from hybrid.commands.problem import misfit_of, problem_of
    from hybrid.scheduler.search.emit import places_of_fleet, plan_of_choice
    from hybrid.scheduler.search.search import search

    problem = problem_of(job, fleet)
    misfit = misfit_of(job, problem.table)
    if misfit is not None:
        raise PlanError(misfit, where="planner.profile", fix="bring a profile of the job's model, or leave it out")
    return plan_of_choice(problem, search(problem).choice, places_of_fleet(fleet), job=job.name)


def _read_plan(path: Path, job: JobConfig, fleet: Fleet) -> Plan:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise PlanError("no such plan file", value=str(path), fix=_PLAN_FIX) from None
    except UnicodeDecodeError as error:
        raise PlanError(f"plan file is not UTF-8 text at byte {error.start}", where=str(path), fix=_PLAN_FIX) from None
    except OSError as error:
        raise PlanError(f"plan file cannot be read: {error.strerror}", value=str(path), fix=_PLAN_FIX) from None
    plan = Plan.from_yaml(text, where=str(path))
    _check_job(plan, job, str(path))
    _check_fleet(plan, fleet, str(path))
    return plan


_PLAN_FIX = "write one with `hybrid plan JOB --out plan.yaml`, or leave --plan out"


def _check_job(plan: Plan, job: JobConfig, where: str) -> None:
    """Refuse a plan of another job."""
    profile = build_profile(job.model, microbatch=job.batch.microbatch, precision=job.precision)
    facts: list[tuple[str, object, object]] = [
        ("model", plan.model, profile.model),
        ("num_layers", plan.num_layers, job.model.num_layers),
        ("precision", plan.precision, job.precision),
        ("global_batch", plan.global_batch, job.batch.global_batch),
    ]
    for replica in plan.replicas if job.planner is None else ():
        facts.append(("schedule", replica.schedule, job.schedule))
        # Replicas may take microbatches of their own sizes.
        if len(plan.replicas) == 1:
            facts.append(("microbatch", replica.microbatch, job.batch.microbatch))
    for name, found, wanted in facts:
        if found != wanted:
            raise PlanError(
                f"the plan is of another job: its {name} is {found}, the job's is {wanted}",
                value=found,
                valid=str(wanted),
                where=where,
                fix="plan the job again, or change the job",
            )


def _check_fleet(plan: Plan, fleet: Fleet, where: str) -> None:
    """Refuse a plan that puts a stage where the fleet has no such device."""
    fix = "plan the job again on this fleet"
    island_of_name = {island.name: island for island in fleet.islands}
    taken: defaultdict[str, set[int]] = defaultdict(set)
    for place, stage in (
        (f"{where}: replicas[{replica.replica}].stages[{stage.stage}]", stage)
        for replica in plan.replicas
        for stage in replica.stages
    ):
        island = island_of_name.get(stage.island)
        if island is None:
            raise PlanError(
                "the fleet has no such island", value=stage.island, valid=island_of_name, where=place, fix=fix
            )
        taken[island.name].update(stage.ranks)
        for name, found, wanted in (
            ("chip", stage.chip, island.chip.name),
            ("backend", stage.backend, island.backend),
        ):
            if found != wanted:
                raise PlanError(
                    f"{name} of island {island.name}'s stage is another",
                    value=found,
                    valid=str(wanted),
                    where=place,
                    fix=fix,
                )
        if stage.memory_limit_bytes > island.memory_bytes:
            raise PlanError(
                f"a chip of island {island.name} holds less than the plan counts on",
                value=stage.memory_limit_bytes,
                valid=f"at most {island.memory_bytes} bytes",
                where=f"{place}.memory_limit_bytes",
                fix=fix,
            )
        if len(taken[island.name]) > island.num_chips:
            raise PlanError(
                f"the plan takes more chips of island {island.name} than it has",
                value=len(taken[island.name]),
                valid=f"at most {island.num_chips}",
                where=place,
                fix=fix,
            )
