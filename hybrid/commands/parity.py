"""`hybrid parity`: the job's first steps under each stage's emulated numerics, judged against fp32 on the CPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from hybrid.commands.job import fleet_of, plan_of, read_job

if TYPE_CHECKING:
    from hybrid.runtime.parity_report import ParityReport, Ratio


def run_parity_command(path: Path, *, steps: int, as_json: bool, overrides: Sequence[str]) -> int:
    """Run and print the comparison; return 0 where every layer is in the band, 1 where one is not.

    Raises:
        ConfigError, FleetError, PlanError, DataError: the job is wrong, or its precision is fp64.
        UnsupportedFormat: numerics that a chip does not have.
    """
    job = read_job(path, overrides)
    job, fleet = fleet_of(job, None)
    plan = plan_of(job, fleet)
    import torch

    from hybrid.models.tokens import prepare_data
    from hybrid.runtime.parity import run_parity

    torch.set_num_threads(job.runtime.threads_per_rank)
    report = run_parity(job, fleet, plan, prepare_data(job.data, job.model), steps=steps)
    if as_json:
        print(json.dumps({"in_band": report.in_band, **asdict(report)}))
    else:
        print_parity(report, Console())
    return 0 if report.in_band else 1


def print_parity(report: ParityReport, console: Console) -> None:
    """Print a table of layers and the verdict."""
    limits = report.max_linf_ratio, report.max_l2_ratio
    title = f"{report.job}: {report.steps} steps, {report.precision}; errors in units of bf16-on-CPU's, largest/L2"
    table = Table(title=title)
    for column in ("layer", "stage", "chip", "output", "gradient", "whole run", "its grad.", ""):
        table.add_column(column, no_wrap=True)
    for row in report.rows:
        table.add_row(
            *(row.layer, str(row.stage), row.chip, _text(row.output), _text(row.gradient)),
            *(_text(row.end_to_end_output), _text(row.end_to_end_gradient)),
            "" if row.judged().within(limits) else "out",
        )
    console.print(table)
    if report.in_band:
        words = f"all layers are in the band: largest < {limits[0]:.3g}, L2 < {limits[1]:.3g}"
    else:
        assert report.cause is not None, "a layer out of the band has a cause"
        words = (
            f"first layer out of the band (largest < {limits[0]:.3g}, L2 < {limits[1]:.3g}): {report.first_layer}, "
            f"step {report.first_step}; products: {', '.join(report.weights) or 'none'}\n"
            f"likely cause: {report.cause.kind}: {report.cause.detail} "
            f"(distance {report.cause.distance:.2f}; 0 the same error, 1 unrelated)"
        )
    console.print(words, highlight=False, markup=False, soft_wrap=True)


def _text(ratio: Ratio) -> str:
    return f"{ratio.linf:.2g}/{ratio.l2:.2g}"
