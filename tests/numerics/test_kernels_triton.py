"""Every Triton kernel, run by Triton's interpreter, against its float64 reference.

The interpreter runs the kernels' arithmetic on the CPU, program by program: right in float32 and float16; bfloat16
operands reach it as float32, since it is silently wrong for them. It says nothing of speed or of races.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import hybrid_kernels as hk
from hybrid_kernels import kit
from hybrid_kernels.kit_cases import CASES

KERNELS = Path(__file__).parents[2] / "kernels"
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed (extra `cuda`)")


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str, str], dict[str, Any]]:
    # A process of its own: Triton decides as it is imported whether its functions are interpreted, and anything
    # that ran here before may have imported it.
    environment = {**os.environ, "PYTHONPATH": str(KERNELS), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "hybrid_kernels.kit", "--variant", "triton", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    assert done.stderr == ""
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return {(row["op"], row["case"], row["dtype"]): row for row in rows}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("op", hk.OPS)
def test_a_triton_kernel_stays_within_its_tolerance_of_the_float64_reference(
    op: str, dtype: str, outcomes: dict[tuple[str, str, str], dict[str, Any]]
) -> None:
    cases = [case.name for case in CASES if case.op == op]
    assert len(cases) >= 5
    rows = [outcomes[op, case, dtype] for case in cases]
    assert [row for row in rows if not kit.Outcome(**row).passed] == []
