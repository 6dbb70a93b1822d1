"""`hybrid plan`: print the placement and the simulated step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hybrid.commands.job import fleet_of, plan_of, read_job
from hybrid.errors import MachineError
from hybrid.runtime.preflight import check_address
from hybrid.scheduler.plan import Plan, ReplicaPlan


def run_plan(path: Path, *, address: str | None, as_json: bool, out: Path | None, overrides: Sequence[str]) -> None:
    """Plan the job and print the plan; nothing but `out` is written and no device taken.

    Raises:
        MachineError: `out` cannot be written.
    """
    job = read_job(path, overrides)
    if address is not None:
        check_address(address)
    job, fleet = fleet_of(job, address)
    plan = plan_of(job, fleet)
    if out is not None:
        try:
            out.write_text(plan.to_yaml(), encoding="utf-8")
        except OSError as error:
            raise MachineError(
                f"the plan cannot be written: {error.strerror}",
                value=str(out),
                fix="give --out a file in a folder that is there",
            ) from None
    if as_json:
        print(
            json.dumps(
                {
                    "plan": asdict(plan),
                    "rows": plan.rows(),
                    "summary": {"step_s": plan.step_s, "idle_share": plan.idle_share},
                }
            )
        )
        return
    console = Console()
    print_plan(plan, console)
    for replica in plan.replicas:
        gantt = replica.simulate().gantt(width=min(100, console.width))
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


def seconds(value: float) -> str:
    """Return a duration for people."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 0.9995:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns" if value else "0 s"


def num_bytes(value: int) -> str:
    """Return a size for people."""
    size = float(value)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
