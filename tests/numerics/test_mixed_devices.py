"""A job with stages on the CPU, a fake neuron core and an emulated chip trains as one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

PROGRAM = Path(__file__).parent / "mixed_devices_job.py"


def _run(tmp_path: Path, precision: str, kind: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), str(tmp_path), precision, kind],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "HYBRID_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _check(report: dict[str, Any], relative: float) -> None:
    assert report["backends"] == ["cpu", "neuron", "emulated"]
    found, wanted = report["found"], report["wanted"]
    assert len(found) == len(wanted) == 9
    assert wanted[0][0] > wanted[7][0], "nothing was learned"
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=relative)


def test_a_mixed_job_has_the_losses_of_the_reference_and_its_checkpoint_goes_on_anywhere(tmp_path: Path) -> None:
    # The device's attention is the same mathematics by other kernels: the last bits differ, no more.
    report = _run(tmp_path, "fp32", "threads")
    _check(report, 1e-5)
    for ours, theirs in zip(report["resumed"], report["wanted"][4:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize(("precision", "relative"), [("fp32", 1e-5), ("bf16", 2e-3)])
def test_a_mixed_job_over_processes_has_the_losses_of_the_reference(
    precision: str, relative: float, tmp_path: Path
) -> None:
    _check(_run(tmp_path, precision, "processes"), relative)


def test_block_squares_are_the_norm_in_float64() -> None:
    from hybrid.runtime.optimizer import _block_squares, squared_norm

    generator = torch.Generator().manual_seed(3)
    for shape in ((0,), (1,), (4096,), (4097,), (130, 99)):
        gradient = torch.randn(shape, generator=generator)
        blocks = _block_squares(gradient)
        assert blocks.shape == (-(-gradient.numel() // 4096),)
        assert float(blocks.double().sum()) == pytest.approx(squared_norm([gradient]), rel=1e-5)
