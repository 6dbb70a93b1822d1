"""`hybrid simulate PLAN`: a plan's step on paper: time line, tokens a second, dollars, energy; a trace; goodput."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hybrid.commands.figures import num_bytes, seconds
from hybrid.commands.problem import read_json
from hybrid.errors import DataError, MachineError, PlanError, UserError
from hybrid.hardware.catalog import Catalog, load_catalog
from hybrid.observe.trace import trace_of_step
from hybrid.scheduler.plan import Plan
from hybrid.scheduler.step.build import step_of_plan
from hybrid.scheduler.step.engine import simulate_step
from hybrid.scheduler.step.fleet_plan import chips_of_fleet_plan, read_step
from hybrid.scheduler.step.replay import Pace, Replay, read_trace, replay
from hybrid.scheduler.step.result import StepResult


def run_simulate(
    path: Path,
    *,
    trace: Path | None,
    availability: Path | None,
    recovery_s: float,
    sequence_length: int | None,
    as_json: bool,
) -> None:
    """Simulate a plan and print what follows; only `trace` is written.

    Raises:
        PlanError: the plan cannot be read.
        DataError: the availability trace is wrong.
        MachineError: the trace cannot be written.
    """
    text = _read(path, "plan file", PlanError)
    unpriced: list[str] = []
    if text.lstrip().startswith("{"):
        raw = read_json(path, "plan")
        step, title = read_step(raw), str(raw.get("model", path.stem))
        if sequence_length is not None:
            step = replace(step, tokens_per_sample=sequence_length)
        needed = chips_of_fleet_plan(raw)
    else:
        plan = Plan.from_yaml(text, where=str(path))
        usd, watts = prices(load_catalog(), {stage.chip for stage in plan.stages})
        step = step_of_plan(plan, tokens_per_sample=sequence_length or 1, usd_per_hour_of_chip=usd, watts_of_chip=watts)
        title, unpriced = plan.job, sorted({stage.chip for stage in plan.stages} - usd.keys())
        needed = chips_of_plan(plan)
    result = simulate_step(step)
    found = None
    if availability is not None:
        found = goodput(
            needed, result, _read(availability, "availability trace", DataError), recovery_s, str(availability)
        )
    if trace is not None:
        _write(trace, json.dumps(trace_of_step(result)))
    unit = "samples" if step.tokens_per_sample == 1 else "tokens"
    if as_json:
        print(json.dumps(_plain(result, found, unit, unpriced)))
        return
    _print(title, result, found, unit, unpriced, Console())
    if trace is not None:
        print(f"trace {trace}: open it at https://ui.perfetto.dev")


def prices(catalog: Catalog, chips: set[str]) -> tuple[dict[str, float], dict[str, float]]:
    """Return what a chip costs an hour, and its rated power, for those chips whose catalog says so.

    The price is the lowest on-demand one of a system of the chip, shared out over its chips.
    """
    usd: dict[str, float] = {}
    watts: dict[str, float] = {}
    for name in chips:
        offers = [
            system.usd_per_hour / system.num_chips
            for system in catalog.systems.values()
            if system.chip == name and system.usd_per_hour is not None
        ]
        if offers:
            usd[name] = min(offers)
        power = catalog.chip(name).power_w
        if power is not None:
            watts[name] = power
    return usd, watts


def chips_of_plan(plan: Plan) -> dict[str, int]:
    """Return how many chips of each kind a plan runs on."""
    ranks: dict[str, set[int]] = {}
    for stage in plan.stages:
        ranks.setdefault(stage.chip, set()).update(stage.ranks)
    return {chip: len(mine) for chip, mine in ranks.items()}


def goodput(needed: Mapping[str, int], result: StepResult, text: str, recovery_s: float, where: str) -> Replay:
    """Return what training along an availability trace comes to, by a plan that needs so many chips of each kind.

    The plan runs as often side by side as the chips of every kind allow; with too few it doesn't run.
    """

    def pace_of(chips: Mapping[str, int]) -> Pace | None:
        copies = min(chips.get(chip, 0) // number for chip, number in needed.items())
        if not copies:
            return None
        used = {chip: number * copies for chip, number in needed.items()}
        return Pace(step_s=result.step_s, tokens=result.step.tokens * copies, chips=used)

    changes, end_s = read_trace(text, where=where)
    return replay(changes, pace_of, end_s=end_s, recovery_s=recovery_s)


def _read(path: Path, what: str, error: type[UserError]) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise error(
            f"the {what} cannot be read: {cause}", value=str(path), fix="name a text file that is there"
        ) from None


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise MachineError(
            f"the trace cannot be written: {error.strerror}",
            value=str(path),
            fix="give --trace a file in a folder that is there",
        ) from None


def _names(result: StepResult) -> list[str]:
    """Return what each row's devices are."""
    names = []
    for run in result.runs:
        home = run.pipeline.schedule.rank_of_stage
        names += [run.pipeline.stages[home.index(rank)].name for rank in range(run.pipeline.schedule.num_ranks)]
    return names


def _plain(result: StepResult, found: Replay | None, unit: str, unpriced: list[str]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "step_s": result.step_s,
        f"{unit}_per_s": result.tokens_per_s,
        "usd_per_hour": result.usd_per_hour,
        "usd_per_step": result.usd_per_step,
        "kwh_per_step": result.kwh_per_step,
        "idle_share": result.idle_share,
        "peak_bytes": result.peak_bytes,
    }
    if found is not None:
        summary |= {
            f"goodput_{unit}_per_s": found.goodput,
            "useful_share": found.useful_share,
            "usd": found.usd,
        }
    return {"source": result.step.source, "unpriced": unpriced, "rows": result.rows(), "summary": summary}


def _print(
    title: str, result: StepResult, found: Replay | None, unit: str, unpriced: list[str], console: Console
) -> None:
    schedules = [pipeline.schedule for pipeline in result.step.pipelines]
    batches = ", ".join(dict.fromkeys(f"{s.name}, {s.num_microbatches} microbatches" for s in schedules))
    many = any(pipeline.count > 1 for pipeline in result.step.pipelines)
    table = Table(title=f"{title}: one step, {batches}")
    for column in (*(["×"] if many else []), "rank", "device", "forward", "backward", "idle", "peak memory"):
        table.add_column(column, justify="left" if column == "device" else "right", no_wrap=True)
    for row, name in zip(result.rows(), _names(result), strict=True):
        split = float(str(row["input_gradient_s"])) + float(str(row["weight_gradient_s"]))
        table.add_row(
            *([f"{row['replicas']:,}"] if many else []),
            str(row["rank"]),
            name,
            seconds(float(str(row["forward_s"]))),
            seconds(float(str(row["backward_s"])) + split),
            f"{float(str(row['idle_s'])) / result.step_s:.0%}",
            num_bytes(round(float(str(row["peak_bytes"])))),
        )
    console.print(table)
    for run in result.runs:
        gantt = run.timeline.gantt(width=min(100, console.width))
        console.print(gantt, highlight=False, markup=False, soft_wrap=True)
    rate = f"{result.tokens_per_s:,.4g} {unit}/s"
    lines = [f"step {seconds(result.step_s)}, {rate}, idle {result.idle_share:.1%} ({result.step.source})"]
    if result.usd_per_hour:
        lines.append(f"${result.usd_per_hour:,.2f} an hour, ${result.usd_per_step:.3g} a step, at on-demand prices")
    if result.watts:
        lines.append(f"{result.kwh_per_step:.3g} kWh a step at rated power")
    if unpriced:
        lines.append(f"no price in the catalog: {', '.join(unpriced)}")
    if found is not None:
        lines.append(
            f"along the trace: {found.goodput:,.4g} {unit}/s over {found.seconds:,.0f} s, "
            f"{found.useful_share:.1%} of the time useful, ${found.usd:,.2f}"
        )
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
