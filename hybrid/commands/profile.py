"""`hybrid profile JOB`: run each distinct layer on each kind of device of the fleet; write the measured profile."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hybrid.commands.figures import num_bytes, seconds
from hybrid.commands.job import fleet_of, read_job
from hybrid.config import JobConfig
from hybrid.errors import MachineError
from hybrid.hardware.fleet import Fleet, Island
from hybrid.models.profile import build_profile
from hybrid.scheduler.search.formats import write_profile
from hybrid.scheduler.search.table import Cell, ProfileTable, Sizes


def run_profile(path: Path, *, out: Path | None, rounds: int, as_json: bool, overrides: Sequence[str]) -> None:
    """Measure the job's layers and print or write them.

    Raises:
        MachineError: `out` cannot be written.
        UnsupportedFormat: a device lacks the job's precision.
    """
    job = read_job(path, overrides)
    job, fleet = fleet_of(job, None)
    profile = measure_profile(job, fleet, rounds=rounds)
    text = json.dumps(profile, indent=1)
    if out is not None:
        try:
            out.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise MachineError(
                f"the profile cannot be written: {error.strerror}",
                value=str(out),
                fix="give --out a file in a folder that is there",
            ) from None
    if as_json:
        print(json.dumps(profile))
        return
    _print(profile, Console())


def measure_profile(job: JobConfig, fleet: Fleet, *, rounds: int) -> dict[str, Any]:
    """Return the measured profile as plain data that `read_profile` takes; the format is in docs/formats.md."""
    import torch

    from hybrid.runtime.layer_profile import measure_layers

    torch.set_num_threads(job.runtime.threads_per_rank)
    batch = job.batch.microbatch
    whole = build_profile(job.model, microbatch=batch, precision=job.precision)
    cells: dict[tuple[str, int, int], Cell] = {}
    notes = [
        "each kind of layer run alone, medians; a backward's parts by a split one's; update_s is the whole model's"
    ]
    sizes: Sizes | None = None
    for island in {island.chip.name: island for island in fleet.islands}.values():
        backend, note = _open(island)
        notes += [note] if note else []
        measured = measure_layers(job.model, backend, microbatch=batch, precision=job.precision, rounds=rounds)
        kinds = {row.kind: row for row in measured}
        rows = [kinds[layer.kind] for layer in whole.layers]
        shares = [row.weight_gradient_s / (row.input_gradient_s + row.weight_gradient_s) for row in rows]
        weight = tuple(row.backward_s * share for row, share in zip(rows, shares, strict=True))
        cells[island.chip.name, 1, batch] = Cell(
            forward_s=tuple(row.forward_s for row in rows),
            input_gradient_s=tuple(row.backward_s - part for row, part in zip(rows, weight, strict=True)),
            weight_gradient_s=weight,
            update_s=sum(row.update_s for row in rows),
        )
        sizes = sizes or Sizes(
            num_parameters=tuple(row.num_parameters for row in rows),
            saved_bytes=tuple(row.saved_bytes // batch for row in rows),
            output_bytes=tuple(row.output_bytes // batch for row in rows),
        )
    assert sizes is not None, "a fleet has an island"
    return write_profile(
        ProfileTable(
            model=whole.model,
            source="measured",
            note="; ".join(notes),
            sequence_length=job.model.sequence_length,
            precision=job.precision,
            layers=tuple(layer.name for layer in whole.layers),
            sizes={1: sizes},
            cells=cells,
        )
    )


def _open(island: Island) -> tuple[Any, str]:
    """Return the device to measure on, and what must be said about it."""
    from hybrid.backends import open_backend
    from hybrid.runtime.capabilities import capabilities_of

    if island.backend == "emulated":
        # The emulation computes on the CPU; its pace is the planner's own figure and would measure nothing.
        note = f"{island.chip.name} is emulated: its seconds are this machine's CPU's, not the chip's"
        return open_backend("cpu", capabilities_of(island.chip, None)), note
    return open_backend(island.backend, capabilities_of(island.chip, island.memory_bytes)), ""


def _print(profile: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{profile['model']}, {profile['precision']}, measured")
    for column in ("chip", "layers", "forward", "backward", "saved a sample"):
        table.add_column(column, justify="left" if column in ("chip", "layers") else "right", no_wrap=True)
    saved = profile["sizes"][0]["saved_bytes"]
    for cell in profile["cells"]:
        for index, (first, end) in _runs(cell, saved):
            names = profile["layers"]
            table.add_row(
                cell["chip"],
                names[first] if end - first == 1 else f"{names[first]} to {names[end - 1]}",
                seconds(cell["forward_s"][index]),
                seconds(cell["input_gradient_s"][index] + cell["weight_gradient_s"][index]),
                num_bytes(saved[index]),
            )
    console.print(table)
    console.print(profile["note"], highlight=False, markup=False, soft_wrap=True)


def _runs(cell: dict[str, Any], saved: Sequence[int]) -> list[tuple[int, tuple[int, int]]]:
    """Return (index, (first, end)) for each run of layers that cost the same."""
    found: list[tuple[int, tuple[int, int]]] = []
    for index in range(len(saved)):
        same = found and (cell["forward_s"][index], saved[index]) == (
            cell["forward_s"][found[-1][0]],
            saved[found[-1][0]],
        )
        if same:
            found[-1] = (found[-1][0], (found[-1][1][0], index + 1))
        else:
            found.append((index, (index, index + 1)))
    return found
