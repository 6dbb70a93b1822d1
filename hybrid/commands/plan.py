"""`hybrid plan`: print the placement and the simulated step, and why it is the one."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hybrid.commands.figures import num_bytes, seconds
from hybrid.commands.job import fleet_of, plan_of, read_job
from hybrid.commands.problem import Brought
from hybrid.config import JobConfig
from hybrid.errors import MachineError, PlanError
from hybrid.runtime.preflight import check_address
from hybrid.scheduler.plan import Plan, ReplicaPlan
from hybrid.scheduler.search.fleet_plan import write_fleet_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanWords:
    """What the command line says beside the job: it goes before the job's `planner` section."""

    overrides: Sequence[str] = ()
    objective: str | None = None
    limits: Mapping[str, float | None] = field(default_factory=dict)
    """By key of the `planner` section."""
    brought: Brought = field(default_factory=Brought)
    explain: bool = False

    def of_planner(self) -> list[str]:
        """Return the words as overrides of the `planner` section."""
        given = {"objective": self.objective, **self.limits}
        return [f"planner.{key}={value}" for key, value in given.items() if value is not None]


def run_plan(path: Path, words: PlanWords, *, address: str | None, as_json: bool, out: Path | None) -> None:
    """Plan the job and print the plan; nothing but `out` is written and no device taken.

    Raises:
        MachineError: `out` cannot be written.
        PlanError, FleetError: no plan; says what would have to change and by how much.
    """
    job = read_job(path, [*words.overrides, *words.of_planner()])
    if address is not None:
        check_address(address)
    if job.planner is not None or words.explain or words.brought != Brought():
        _search(job, words, address, as_json=as_json, out=out)
        return
    job, fleet = fleet_of(job, address)
    plan = plan_of(job, fleet)
    if out is not None:
        _write(out, plan.to_yaml())
    if as_json:
        summary = {"step_s": plan.step_s, "idle_share": plan.idle_share}
        print(json.dumps({"plan": asdict(plan), "rows": plan.rows(), "summary": summary}))
        return
    console = Console()
    print_plan(plan, console)
    _print_gantt(plan, console)


def _search(job: JobConfig, words: PlanWords, address: str | None, *, as_json: bool, out: Path | None) -> None:
    """Plan by the search."""
    from hybrid.commands import planned as planned_
    from hybrid.commands.plan_report import print_planned

    fleet = None
    if words.brought.pools is None:
        job, fleet = fleet_of(job, address)
    planned = planned_.search_plan(job, fleet, words.brought, reasons=words.explain)
    if out is not None and out.suffix == ".json":
        _write(out, json.dumps(write_fleet_plan(planned.choice), indent=1) + "\n")
    elif out is not None:
        if planned.plan is None:
            fact = f"{sum(planned.choice.chips):,} ranks are too many for a plan that names each"
            raise PlanError(fact, value=str(out), fix="write it as JSON: --out plan.json")
        _write(out, planned.plan.to_yaml())
    if as_json:
        print(json.dumps(planned_.as_json(planned)))
        return
    console = Console()
    print_planned(planned, console)
    if planned.plan is not None:
        _print_gantt(planned.plan, console)


def _write(out: Path, text: str) -> None:
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(
            f"the plan cannot be written: {error.strerror}",
            value=str(out),
            fix="give --out a file in a folder that is there",
        ) from None


def _print_gantt(plan: Plan, console: Console) -> None:
    """Print the step of the slowest replica."""
    slowest = max(plan.replicas, key=lambda replica: replica.step_s)
    gantt = slowest.simulate().gantt(width=min(100, console.width))
    console.print(gantt, highlight=False, markup=False, soft_wrap=True)


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan: a table of stages for each replica."""
    for replica in plan.replicas:
        console.print(_table(plan, replica))
    emulated = sum(plan.stages_of_rank(rank)[0].backend == "emulated" for rank in range(plan.num_ranks))
    if emulated:
        console.print(f"{emulated} of {plan.num_ranks} chips are emulated on the CPU", highlight=False)
    batches = "; ".join(f"{replica.num_microbatches} microbatches of {replica.microbatch}" for replica in plan.replicas)
    console.print(
        f"{batches}; predicted step {seconds(plan.step_s)} "
        f"on the real chips, idle {plan.idle_share:.1%} ({plan.source})",
        highlight=False,
        soft_wrap=True,
    )


def _table(plan: Plan, replica: ReplicaPlan) -> Table:
    name = "" if len(plan.replicas) == 1 else f" replica {replica.replica},"
    title = f"{plan.job}:{name} {plan.model}, {replica.num_stages} stages, {replica.schedule}, {plan.precision}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for column in ("stage", "island", "chip", "layers", "F", "B", "memory", "idle"):
        table.add_column(column, justify="left" if column in ("island", "chip") else "right", no_wrap=True)
    for stage, row in zip(replica.stages, replica.rows(), strict=True):
        table.add_row(
            str(stage.stage),
            stage.island,
            stage.chip if len(stage.ranks) == 1 else f"{len(stage.ranks)}x {stage.chip}",
            f"{stage.first_layer}–{stage.end_layer - 1}",
            seconds(stage.forward_s),
            seconds(stage.backward_s),
            f"{num_bytes(stage.memory_bytes)}/{num_bytes(stage.memory_limit_bytes)}",
            f"{float(str(row['idle_share'])):.0%}",
        )
    return table
