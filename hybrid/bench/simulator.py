"""`hybrid bench simulator`: the simulator against what others measured, against this machine, and a million chips.

Three parts: the fifteen GH200 plans of Sailor's artefact (skipped, visibly, where the data is not there), this
machine's own pipelines, and the time and memory of simulating a step of a million chips. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybrid.bench.gh200 import CHIP, Measured, Setup, predict, read_measured, read_setup
from hybrid.bench.here import measure_here
from hybrid.bench.million import measure_million, measure_million_mib
from hybrid.bench.result import Result, Row
from hybrid.errors import DataError

DATA = Path("../shared/data")
"""Where Sailor's files lie, in `sailor/`; see docs/simulator.md."""
GOALS = {
    "gh200_time_mae": 0.05,
    "gh200_memory_mae": 0.05,
    "here_mae": 0.05,
    "here_max": 0.10,
    "simulate_s_million": 5.0,
}


def measure_simulator(*, quick: bool) -> Result:
    """Measure everything; for `hybrid bench`."""
    rows, summary = run(quick)
    return Result(rows=rows, summary=summary, shown=[_line(row) for row in rows], goals=GOALS)


def run(quick: bool, *, data: Path = DATA) -> tuple[list[Row], dict[str, float]]:
    """Return the rows and the summary of all three parts.

    Args:
        quick: fewer repeats on this machine.
        data: the folder of the independent data; where it is missing, its part is one row that says so, and its
            numbers are left out of the summary.

    Raises:
        DataError: the data is there and is not Sailor's.
        WorkerFailed: a process of this machine's part failed.
    """
    rows: list[Row] = []
    summary: dict[str, float] = {}
    for part in (gh200_rows(data), measure_here(quick=quick), million_rows()):
        rows += part[0]
        summary.update(part[1])
    return rows, summary


def gh200_rows(data: Path) -> tuple[list[Row], dict[str, float]]:
    """Return a row for each of the fifteen plans, and the mean and largest errors.

    `gh200_time_mae` and `gh200_time_max` leave out the plan with a single microbatch, which fixed overhead decides
    (its row says `apart`); `gh200_time_mae_all` counts it too. The memory's mean counts all.
    """
    folder = data / "sailor"
    if not folder.is_dir():
        row = {"part": "gh200", "what": "SKIPPED", "why": f"no folder {folder}: the measured plans aren't here"}
        return [row], {}
    setup, plans = read_folder(folder)
    rows: list[Row] = []
    for plan in plans:
        result = predict(setup, plan)
        rows.append(
            {
                "part": "gh200",
                "what": plan.name,
                "stages": len(plan.cuts),
                "replicas": plan.num_replicas,
                "microbatch": plan.microbatch,
                "num_microbatches": plan.num_microbatches,
                "measured_s": plan.step_s,
                "predicted_s": result.step_s,
                "error": result.step_s / plan.step_s - 1,
                "measured_bytes": plan.memory_bytes,
                "predicted_bytes": result.peak_bytes,
                "memory_error": result.peak_bytes / plan.memory_bytes - 1,
                "apart": plan.num_microbatches == 1,
            }
        )
    every, memory = _errors(rows, "error"), _errors(rows, "memory_error")
    counted = _errors([row for row in rows if not row["apart"]], "error")
    return rows, {
        "gh200_time_mae": _mean(counted),
        "gh200_time_max": max(counted),
        "gh200_time_mae_all": _mean(every),
        "gh200_memory_mae": _mean(memory),
        "gh200_memory_max": max(memory),
    }


def read_folder(folder: Path) -> tuple[Setup, list[Measured]]:
    """Return the set-up and the measured plans in a folder that is laid out as Sailor's data is.

    Raises:
        DataError: a file is missing or isn't JSON of that form.
    """
    try:
        setup = read_setup(
            _json(folder / "profiles" / "OPT-350" / CHIP / "profile.json"),
            _json(folder / "layer_sizes_opt350.json"),
            _json(folder / "network" / "inter_node.json"),
            _json(folder / "network" / "intra_node.json"),
            _json(folder / "training_config.json"),
        )
        paths = sorted((folder / "measured_plans").glob("*.json"))
        return setup, [read_measured(path.stem.removeprefix("plan_config_"), _json(path)) for path in paths]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        fact = f"the measured plans cannot be read: {type(error).__name__}: {error}"
        raise DataError(fact, value=str(folder), fix="lay the files out as docs/simulator.md says") from None


def million_rows() -> tuple[list[Row], dict[str, float]]:
    """Return the row of a million chips, and the seconds that simulating their step took."""
    result, built_s, simulated_s = measure_million()
    peak_mib = measure_million_mib()
    row: Row = {
        "part": "million",
        "what": f"{result.step.num_devices:,} chips of {len(result.runs)} kinds",
        "predicted_s": result.step_s,
        "tokens_per_s": result.tokens_per_s,
        "idle_share": result.idle_share,
        "kwh_per_step": result.kwh_per_step,
        "build_s": built_s,
        "simulate_s": simulated_s,
        "peak_mib": peak_mib,
    }
    return [row], {"simulate_s_million": simulated_s, "simulate_mib_million": peak_mib}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _errors(rows: Sequence[Row], name: str) -> list[float]:
    return [abs(float(str(row[name]))) for row in rows]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _line(row: Row) -> dict[str, str]:
    """Return a line of the table for people."""

    def number(name: str, form: str) -> str:
        value = row.get(name)
        return form.format(value) if isinstance(value, float | int) else ""

    return {
        "part": str(row["part"]),
        "what": str(row.get("what") or row.get("schedule")),
        "measured": number("measured_s", "{:.4f} s"),
        "predicted": number("predicted_s", "{:.4f} s"),
        "error": number("error", "{:+.1%}"),
        "memory error": number("memory_error", "{:+.1%}"),
        "note": str(
            row.get("why")
            or row.get("machine")
            or (f"{number('simulate_s', '{:.2f} s')} to simulate" if row["part"] == "million" else "")
        ),
    }
