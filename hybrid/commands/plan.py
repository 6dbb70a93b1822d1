"""`hybrid plan`: print the placement and the simulated step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hybrid.commands.job import fleet_of, plan_of, read_job
from hybrid.errors import MachineError
from hybrid.runtime.preflight import check_address
from hybrid.scheduler.plan import Plan


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
    console.print(plan.simulate().gantt(width=min(100, console.width)), highlight=False, markup=False, soft_wrap=True)


def print_plan(plan: Plan, console: Console) -> None:
    """Print the plan as a table of stages."""
    table = Table(title=f"{plan.job}: {plan.model} in {plan.num_stages} stages, {plan.schedule}, {plan.precision}")
    for column, justify in (
        ("stage", "right"),
        ("island", "left"),
        ("chip", "left"),
        ("backend", "left"),
        ("layers", "left"),
        ("F", "right"),
        ("B", "right"),
        ("memory", "right"),
        ("idle", "right"),
        ("sends", "right"),
    ):
        table.add_column(column, justify="left" if justify == "left" else "right")
    for stage, row in zip(plan.stages, plan.rows(), strict=True):
        table.add_row(
            str(stage.stage),
            stage.island,
            stage.chip,
            stage.backend,
            f"{stage.first_layer}–{stage.end_layer - 1}",
            seconds(stage.forward_s),
            seconds(stage.backward_s),
            f"{num_bytes(stage.memory_bytes)} of {num_bytes(stage.memory_limit_bytes)}",
            f"{float(str(row['idle_share'])):.0%}",
            num_bytes(int(str(row["send_bytes"]))) if row["send_bytes"] else "",
        )
    console.print(table)
    console.print(
        f"{plan.num_microbatches} microbatches of {plan.microbatch}; predicted step {seconds(plan.step_s)} "
        f"on the real chips, idle {plan.idle_share:.1%} ({plan.source})",
        highlight=False,
        soft_wrap=True,
    )


def seconds(value: float) -> str:
    """Return a duration for people."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if value * factor >= 1.0:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns" if value else "0 s"


def num_bytes(value: int) -> str:
    """Return a size for people."""
    size = float(value)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
