"""Runs published example kernels, unmodified, from a folder outside this repository.

The folder is the `nki` folder of a checkout of aws-neuron/aws-neuron-sdk. Files are executed as they are; what they
change in the process (environment, import path, modules) is put back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np

from hybrid.errors import UserError
from hybrid.testing.nki.dtypes import Array
from hybrid.testing.nki.example_cases import CASES, ExampleCase
from hybrid.testing.nki.machine import Usage
from hybrid.testing.nki.refusal import NkiRefused
from hybrid.testing.nki.standin import interpreting, load_kernels

SEED = 20261121
"""Of the inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleResult:
    """What came of one published kernel on one generation."""

    file: str
    kernel: str
    generation: str
    outcome: str
    """`matches`, `refused` (as it must be), or what is wrong: `differs`, `refused by …`, `not refused`, `missing`."""
    error: float
    """Largest difference, relative to the expectation's largest magnitude."""
    tolerance: float
    usage: Usage | None

    @property
    def ok(self) -> bool:
        """True where the kernel did what it must."""
        return self.outcome in ("matches", "refused")


def run_examples(folder: Path) -> tuple[ExampleResult, ...]:
    """Run every published kernel that we know, on every generation that has what it uses.

    Raises:
        UserError: the folder has no `examples`.
    """
    if not (folder / "examples").is_dir():
        raise UserError(
            "not the `nki` folder of a checkout of aws-neuron/aws-neuron-sdk",
            value=str(folder),
            fix="give the folder that holds `examples` and `deep-dives`",
        )
    return tuple(_run(folder, case, generation) for case in CASES for generation in case.generations)


def _run(folder: Path, case: ExampleCase, generation: str) -> ExampleResult:
    path = folder / case.file
    usage, error = None, 0.0
    if not path.is_file():
        outcome = "missing"
    else:
        inputs = case.inputs(np.random.default_rng(SEED))
        expected = case.expected(*inputs)
        try:
            with _contained(path.parent), interpreting(generation) as machine:
                returned = getattr(load_kernels(path), case.kernel)(*inputs, **case.options)
                usage = machine.usage()
        except NkiRefused as refusal:
            outcome = "refused" if refusal.rule == case.refused_by else f"refused by {refusal.rule}"
        else:
            error = _error(returned if isinstance(returned, tuple) else (returned,), expected)
            outcome = "not refused" if case.refused_by else "matches" if error <= case.tolerance else "differs"
    return ExampleResult(
        file=case.file,
        kernel=case.kernel,
        generation=generation,
        outcome=outcome,
        error=error,
        tolerance=case.tolerance,
        usage=usage,
    )


def _error(returned: tuple[Array, ...], expected: tuple[Array, ...]) -> float:
    """Return the largest relative difference; infinite where shapes differ or a value is not finite."""
    if [r.shape for r in returned] != [e.shape for e in expected]:
        return float("inf")
    worst = 0.0
    for got, want in zip(returned, expected, strict=True):
        difference = np.abs(got.astype(np.float64) - want.astype(np.float64)).max()
        worst = max(worst, float(difference / np.abs(want.astype(np.float64)).max()))
    return worst if np.isfinite(worst) else float("inf")


@contextmanager
def _contained(folder: Path) -> Iterator[None]:
    """Let files import their neighbours, and undo what they do to the environment, the path and the modules."""
    before = set(sys.modules)
    path = list(sys.path)
    with mock.patch.dict("os.environ"):
        sys.path.insert(0, str(folder))
        try:
            yield
        finally:
            sys.path[:] = path
            for name in set(sys.modules) - before:
                if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
                    del sys.modules[name]


def format_results(results: tuple[ExampleResult, ...]) -> str:
    """Return the results as a Markdown table, a kernel a row."""
    rows = [
        "| kernel | outcome | largest relative error | tolerance | SBUF, PSUM a partition |",
        "|---|---|---|---|---|",
    ]
    for kernel in dict.fromkeys((r.file, r.kernel) for r in results):
        own = [r for r in results if (r.file, r.kernel) == kernel]
        outcomes = ", ".join(f"{r.generation} {r.outcome}" for r in own)
        usage = own[-1].usage
        memory = f"{usage.peak_sbuf_bytes / 1024:.1f}, {usage.peak_psum_bytes / 1024:.1f} KiB" if usage else "–"
        error = "–" if usage is None else f"{max(r.error for r in own):.1e}"
        rows.append(f"| `{kernel[1]}` | {outcomes} | {error} | {own[0].tolerance:.1e} | {memory} |")
    return "\n".join(rows)
