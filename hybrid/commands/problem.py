"""From a job, its fleet and what was brought from elsewhere (profile, links, pools) to the planner's problem."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid.config import JobConfig
from hybrid.config_planner import PlannerConfig
from hybrid.errors import PlanError, UnsupportedFormat
from hybrid.hardware.catalog import load_catalog
from hybrid.hardware.fleet import Fleet
from hybrid.models.profile import build_profile, bytes_per_parameter
from hybrid.scheduler.schedules import SCHEDULE_NAMES
from hybrid.scheduler.search.analytic import analytic_table, network_of_fleet, pools_of_fleet, with_speeds
from hybrid.scheduler.search.formats import read_links, read_pools, read_profile
from hybrid.scheduler.search.problem import Limits, MemoryModel, Pool, Problem, Vocabulary
from hybrid.scheduler.search.table import ProfileTable

_MOST_SAMPLES = 64
"""The largest microbatch that `microbatches: any` tries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Brought:
    """Files that stand in for what the job and the catalog say."""

    profile: Path | None = None
    links: Path | None = None
    pools: Path | None = None


def problem_of(job: JobConfig, fleet: Fleet | None, brought: Brought | None = None) -> Problem:
    """Return the job's problem on a fleet, or on the pools that were brought.

    Args:
        job: its `planner` section says what to choose and for what; without one, the section's defaults.
        fleet: None where pools were brought.
        brought: go before the files that the `planner` section names.

    Raises:
        PlanError: a file that cannot be read, or whose parts don't fit the job or the fleet.
        FleetError: a pool without a number that the objective needs.
        UnsupportedFormat: a chip lacks the precision; names the island.
    """
    words, brought = job.planner or PlannerConfig(), brought or Brought()
    if job.stages_per_rank is not None:
        raise PlanError(
            "the search puts one stage on a rank, or two where the schedule does",
            value=str(job.stages_per_rank),
            where="stages_per_rank",
            fix="leave it out, or plan without the search",
        )
    pools = _pools(job, fleet, brought)
    sizes = _microbatches(job, words)
    profile = brought.profile or words.profile
    table = _analytic(job, fleet, words, sizes) if profile is None else read_profile(read_json(profile, "profile"))
    if profile is not None and fleet is not None:
        table = with_speeds(table, fleet.islands)
    if words.microbatches == "any" and profile is not None:
        known = {size for pool in pools for size in table.microbatches(pool.chip)}
        sizes = tuple(sorted(size for size in known if job.batch.global_batch % size == 0)) or sizes
    links = brought.links or words.links
    if links is None and fleet is None:
        raise PlanError("pools need links", value=str(brought.pools), fix="give --links FILE; see docs/formats.md")
    network = network_of_fleet(fleet) if links is None and fleet else read_links(read_json(links, "links"))
    return Problem(
        table=table,
        pools=pools,
        network=network,
        global_batch=job.batch.global_batch,
        memory=MemoryModel(
            bytes_per_parameter=words.bytes_per_parameter or bytes_per_parameter(job.precision),
            fixed_bytes=words.fixed_bytes,
            margin=words.memory_margin,
        ),
        vocabulary=_vocabulary(job, words, sizes),
        objective="usd_per_token" if words.objective == "deadline" else words.objective,
        limits=Limits(
            min_tokens_per_s=words.min_tokens_per_s,
            max_usd_per_hour=words.max_usd_per_hour,
            max_watts=words.max_watts,
            deadline_s=words.deadline_s,
            total_tokens=_tokens(job, table) if words.deadline_s is not None else None,
        ),
    )


def misfit_of(job: JobConfig, table: ProfileTable) -> str | None:
    """Return why this job cannot train by a plan of this table; None where it can."""
    mine = build_profile(job.model, microbatch=1, precision=job.precision)
    for name, found, wanted in (
        ("layers", table.num_layers, len(mine.layers)),
        ("model", table.model, mine.model),
        ("sequence_length", table.sequence_length, mine.sequence_length),
        ("precision", table.precision, job.precision),
    ):
        if found != wanted:
            return f"the profile is of another model: its {name} is {found}, the job's is {wanted}"
    return None


def read_json(path: Path | None, what: str) -> Any:
    """Return the parsed JSON of a file.

    Raises:
        PlanError: it cannot be read or is no JSON object; names the file and the line.
    """
    fix = f"give a {what} file; see docs/formats.md"
    try:
        raw = json.loads(Path(path or "").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"the {what} file cannot be read: {error}", value=str(path), fix=fix) from None
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}"
        raise PlanError(f"the {what} file is not JSON: {error.msg}", where=where, fix=fix) from None
    if not isinstance(raw, dict):
        raise PlanError(f"the {what} file holds no object", value=type(raw).__name__, where=str(path), fix=fix)
    return raw


def _pools(job: JobConfig, fleet: Fleet | None, brought: Brought) -> tuple[Pool, ...]:
    if brought.pools is not None:
        return read_pools(read_json(brought.pools, "pools"))
    assert fleet is not None, "a fleet or pools"
    catalog = load_catalog(fleet.catalog)
    return pools_of_fleet(fleet, catalog)


def _tokens(job: JobConfig, table: ProfileTable) -> float:
    return float(job.steps) * job.batch.global_batch * table.sequence_length


def _microbatches(job: JobConfig, words: PlannerConfig) -> tuple[int, ...]:
    batch = job.batch.global_batch
    if words.microbatches is None:
        return (job.batch.microbatch,)
    if words.microbatches == "any":
        powers = [2**power for power in range(_MOST_SAMPLES.bit_length())]
        return tuple(sorted({job.batch.microbatch, *(size for size in powers if batch % size == 0)}))
    for size in words.microbatches:
        if batch % size:
            divisors = [n for n in range(1, min(batch, _MOST_SAMPLES) + 1) if batch % n == 0]
            fact = "a microbatch does not divide the global batch"
            raise PlanError(fact, value=size, valid=divisors, where="planner.microbatches", fix="change one of them")
    return tuple(sorted(set(words.microbatches)))


def _vocabulary(job: JobConfig, words: PlannerConfig, sizes: Sequence[int]) -> Vocabulary:
    schedules: tuple[str, ...] = (job.schedule,)
    if words.schedules is not None:
        schedules = SCHEDULE_NAMES if words.schedules == "any" else words.schedules
    return Vocabulary(
        degrees=words.tensor_parallel,
        widths=words.widths,
        microbatches=tuple(sizes),
        recompute=words.recompute,
        schedules=schedules,
        codecs=tuple(dict.fromkeys(("none", *words.codecs))),
        max_stages=words.max_stages if job.num_stages is None else max(words.max_stages, job.num_stages),
        num_stages=job.num_stages,
        max_replicas=words.max_replicas,
    )


def _analytic(job: JobConfig, fleet: Fleet | None, words: PlannerConfig, sizes: Sequence[int]) -> ProfileTable:
    if fleet is None:
        raise PlanError("pools need a profile", fix="give --profile FILE; see docs/formats.md")
    for island in fleet.islands:
        if job.precision not in island.chip.flops_of_format:
            raise UnsupportedFormat(
                f"chip {island.chip.name} of island {island.name} has no {job.precision}",
                value=job.precision,
                valid=sorted(island.chip.flops_of_format),
                fix="set precision to a format that every chip has",
            )
    per_chip = sorted({1, *(size // width for size in sizes for width in words.widths if size % width == 0)})
    profiles = [build_profile(job.model, microbatch=size, precision=job.precision) for size in per_chip]
    chips = {island.chip.name: island.chip for island in fleet.islands}.values()
    table = analytic_table(
        profiles, chips, degrees=sorted({1, *words.tensor_parallel}), efficiency=job.emulation.efficiency
    )
    return with_speeds(table, fleet.islands)
