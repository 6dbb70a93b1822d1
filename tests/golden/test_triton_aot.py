"""Every Triton kernel compiles for three GPU generations without a GPU; what it takes is written down.

Rewrite the golden, after reading the difference, with
`python tests/golden/test_triton_aot.py > tests/golden/triton_aot.txt`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

GOLDEN = Path(__file__).with_name("triton_aot.txt")
KERNELS = Path(__file__).parents[2] / "kernels"
WRITTEN_BY = GOLDEN.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("triton ") if GOLDEN.exists() else ""
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None or version("triton") != WRITTEN_BY,
    reason=f"needs triton {WRITTEN_BY}, which wrote the golden (extra `cuda`): another compiler takes other registers",
)


def compile_all(cache: Path | None, *arguments: str) -> str:
    # A process of its own: where TRITON_INTERPRET was set as Triton was imported, nothing compiles.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(KERNELS)
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "hybrid_kernels.aot", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows_of(text: str) -> list[list[str]]:
    """Return [kernel, architecture, registers, spill bytes, shared bytes] of each line."""
    return [line.rsplit(maxsplit=4) for line in text.splitlines()[2:]]


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_triton_kernel_compiles_without_a_gpu_and_takes_what_the_golden_says(tmp_path: Path) -> None:
    assert compile_all(tmp_path) == GOLDEN.read_text(encoding="utf-8")


@needs_triton
@pytest.mark.timeout(300)
def test_the_optimizer_kernel_compiles_for_the_h100_and_takes_what_the_golden_says(tmp_path: Path) -> None:
    got = rows_of(compile_all(tmp_path, "--op", "adamw", "--arch", "90"))
    want = [row for row in rows_of(GOLDEN.read_text(encoding="utf-8")) if row[:2] in [r[:2] for r in got]]
    assert len(got) == 1
    assert got == want


def test_no_triton_kernel_spills_and_each_fits_in_shared_memory_on_every_architecture() -> None:
    limits = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
    rows = rows_of(GOLDEN.read_text(encoding="utf-8"))
    assert {row[1] for row in rows} == set(limits)
    assert [row for row in rows if int(row[3]) > 0] == []
    assert [row for row in rows if int(row[4]) > limits[row[1]]] == []


def test_the_golden_holds_every_operation_on_every_architecture() -> None:
    names = {(row[0].split()[0], row[1]) for row in rows_of(GOLDEN.read_text(encoding="utf-8"))}
    ops = ("rmsnorm", "rope", "swiglu", "cross_entropy", "attention", "fp8_pack", "fp8_unpack", "reduce_add", "adamw")
    assert names == {(op, arch) for op in ops for arch in ("sm_80", "sm_90", "sm_100")}


if __name__ == "__main__":
    sys.stdout.write(compile_all(None))
