"""`hybrid bench NAME`: run a benchmark; a table for people, or under --json the one object of the contract."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from typing import TextIO

from rich.console import Console
from rich.table import Table

from hybrid.bench import BENCHES, TUNERS
from hybrid.bench.result import Result, machine_facts, now, to_json
from hybrid.errors import ConfigError


def run_bench(name: str, *, as_json: bool, quick: bool, tune: bool = False) -> None:
    """Run a benchmark and print what it measured; nothing is written.

    Raises:
        ConfigError: no such benchmark.
    """
    if name not in BENCHES:
        raise ConfigError("no such benchmark", value=name, valid=BENCHES, fix="name one of those")
    if tune and name not in TUNERS:
        raise ConfigError("nothing to tune in this benchmark", value=name, valid=TUNERS, fix="leave out --tune")
    module, function = (TUNERS[name] if tune else BENCHES[name][0]).split(":")
    machine, date = machine_facts(), now()
    with standard_output_kept() as output:
        measure: Callable[..., Result] = getattr(import_module(module), function)
        result = measure(quick=quick)
        if as_json:
            print(to_json(result, machine, date), file=output, flush=True)
        else:
            _show(name, result, Console(file=output))


@contextmanager
def standard_output_kept() -> Iterator[TextIO]:
    """Yield the standard output; meanwhile what libraries and children write to it goes to the error output."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(kept, "w", encoding="utf-8", closefd=False) as output, redirect_stdout(sys.stderr):
            yield output
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _show(name: str, result: Result, console: Console) -> None:
    table = Table(title=f"hybrid bench {name}")
    for index, column in enumerate(result.shown[0]):
        table.add_column(column, justify="left" if index < 2 else "right", no_wrap=index < 2)
    for line in result.shown:
        table.add_row(*line.values())
    console.print(table)
    for number, value in result.summary.items():
        verdict = _verdict(value, result.goals.get(number), result.floors.get(number))
        console.print(f"{number:<28} {value:.3f}{verdict}", highlight=False, markup=False, soft_wrap=True)


def _verdict(value: float, goal: float | None, floor: float | None) -> str:
    if goal is not None:
        return f"  (goal ≤ {goal:.2f}: {'met' if value <= goal else 'MISSED'})"
    if floor is not None:
        return f"  (goal ≥ {floor:.2f}: {'met' if value >= floor else 'MISSED'})"
    return ""
