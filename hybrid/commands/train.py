"""`hybrid train`: check, plan, place, train, and say how it went."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from hybrid.commands.figures import seconds
from hybrid.commands.job import fleet_of, plan_of, read_job
from hybrid.commands.plan import print_plan
from hybrid.config import JobConfig
from hybrid.errors import ConfigError
from hybrid.hardware.fleet import Fleet
from hybrid.observe.terminal import open_progress
from hybrid.runtime.placement import Placement
from hybrid.runtime.preflight import check_address, check_devices, check_memory
from hybrid.runtime.trainer import Summary, train, train_in_one_process
from hybrid.scheduler.plan import Plan


def run_train(
    path: Path,
    *,
    address: str | None,
    reference: bool,
    resume: Path | None,
    plan_file: Path | None,
    as_json: bool,
    overrides: Sequence[str],
    started_s: float,
) -> None:
    """Train a job; progress goes to standard error under --json, so that standard output holds the summary alone."""
    job = read_job(path, overrides)
    _check_words(job, reference=reference, address=address)
    console = Console(stderr=as_json)
    if reference:
        plan = None if plan_file is None else plan_of(*fleet_of(job, None), plan_file)
        with open_progress(console, job, num_ranks=1, quiet=as_json) as sink:
            summary = train_in_one_process(job, resume=resume, sink=sink, started_s=started_s, plan=plan)
    else:
        if address is not None:
            check_address(address)
        job, fleet = fleet_of(job, address)
        plan = plan_of(job, fleet, plan_file)
        if address is None:
            if job.runtime.placement == "ray":
                check_devices(stage.backend for stage in plan.stages)
            needed_bytes = sum(stage.memory_bytes * len(stage.ranks) for stage in plan.stages)
            check_memory(needed_bytes, "the job's ranks together, all on this machine,")
        if not as_json:
            print_plan(plan, console)
        placement = open_placement(job, fleet, plan, address)
        with open_progress(console, job, num_ranks=plan.num_ranks, quiet=as_json) as sink:
            summary = train(job, fleet, plan, placement, resume=resume, sink=sink, started_s=started_s)
    if as_json:
        print(json.dumps(asdict(summary)))
        sys.stdout.flush()
    else:
        print_summary(summary, console)


def _check_words(job: JobConfig, *, reference: bool, address: str | None) -> None:
    """Refuse words that would be without effect: who writes them expects one."""
    if address is not None and (reference or job.runtime.placement == "threads"):
        raise ConfigError(
            f"{'--reference' if reference else 'runtime.placement: threads'} runs in this process, on no cluster",
            value=f"--address {address}",
            valid="runtime.placement: ray, without --reference",
            fix="give one or the other",
        )


def open_placement(job: JobConfig, fleet: Fleet, plan: Plan, address: str | None) -> Placement:
    """Return where the job's workers will run; nothing is started yet."""
    if job.runtime.placement == "threads":
        from hybrid.runtime.local import ThreadPlacement

        return ThreadPlacement(threads_per_rank=job.runtime.threads_per_rank)
    from hybrid.runtime.launcher import RayPlacement

    return RayPlacement(
        [fleet.island(plan.stages_of_rank(rank)[0].island) for rank in range(plan.num_ranks)],
        address=address,
        timeout_s=job.runtime.placement_timeout_s,
        job_name=job.name,
    )


def print_summary(summary: Summary, console: Console) -> None:
    """Print how a run ended."""
    lines = [f"run        {summary.run}"]
    if summary.final_loss is not None:
        lines.append(f"steps      {summary.steps}, final training loss {summary.final_loss:.4f}")
    if summary.held_out_loss is not None:
        below = summary.unigram_entropy - summary.held_out_loss
        lines.append(
            f"held out   loss {summary.held_out_loss:.4f} nats a token; unigram entropy {summary.unigram_entropy:.4f} "
            f"({abs(below):.4f} {'below' if below > 0 else 'ABOVE'} it)"
        )
    if summary.step_s is not None and summary.tokens_per_s is not None:
        lines.append(f"speed      {summary.tokens_per_s:,.0f} tokens/s, {seconds(summary.step_s)} a step (median)")
    if summary.step_s is not None and summary.predicted_step_s is not None:
        off = summary.step_s / summary.predicted_step_s - 1
        lines.append(
            f"predicted  {seconds(summary.predicted_step_s)} a step at time scale {summary.time_scale:g}; "
            f"measured {off:+.1%}"
        )
    if len(summary.idle_share_of_rank) > 1:
        lines.append(
            "idle       " + ", ".join(f"rank {r} {share:.0%}" for r, share in enumerate(summary.idle_share_of_rank))
        )
    if summary.first_step_s is not None:
        phases = ", ".join(f"{name} {at:.1f}" for name, at in summary.phases.items())
        lines.append(f"start-up   first step after {summary.first_step_s:.1f} s ({phases})")
    if summary.checkpoint is not None:
        lines.append(f"checkpoint {summary.checkpoint}")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
