"""`hybrid validate`: on the CPU, on the fake neuron device, and on a machine without the device."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.testing import validation


def _validate(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "hybrid.cli", "validate", *words],
        capture_output=True,
        text=True,
        timeout=115,
        env={**os.environ, "HYBRID_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("words", [("cpu",), ("neuron", "--fake")], ids=["cpu", "fake neuron"])
def test_every_check_passes_and_the_report_says_what_it_ran_on(words: tuple[str, ...], tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    done = _validate(tmp_path, "--device", *words, "--quick", "--to", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(file.read_text())
    assert report["ok"]
    assert report["real"] == ("--fake" not in words)
    assert {check["status"] for check in report["checks"]} == {"PASS"}
    groups = {check["group"] for check in report["checks"]}
    assert groups >= {"backend kit", "kernels", "numerics", "job"}
    assert ("neuron backend" in groups) == (words[0] == "neuron")
    assert report["timings"]["to_device_bytes_per_s"] > 0
    assert report["environment"]["packages"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--device", "tpu"), "valid: cpu, cuda, neuron"),
        (("--device", "neuron", "--chip", "h100"), "device neuron does not drive the chip h100"),
        (("--device", "cpu", "--fake"), "only the neuron device has a fake"),
        pytest.param(
            ("--device", "neuron"),
            "torch-neuronx",
            marks=pytest.mark.skipif(hasattr(torch, "neuron"), reason="this machine has a Trainium"),
        ),
        pytest.param(
            ("--device", "cuda"),
            "sees no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"),
        ),
    ],
)
def test_what_cannot_be_validated_is_refused_in_one_line(words: tuple[str, ...], told: str, tmp_path: Path) -> None:
    done = _validate(tmp_path, *words, "--to", str(tmp_path / "report.json"))
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "report.json").exists()


def test_a_failing_check_is_told_and_stops_no_other() -> None:
    def fails() -> None:
        raise AssertionError("planted")

    found = validation._tried("numerics", "planted", fails)
    assert (found.status, found.detail) == ("FAIL", "AssertionError: planted")


def test_numerics_that_leave_their_band_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from hybrid.backends import open_backend
    from hybrid.hardware import load_catalog
    from hybrid.runtime.capabilities import capabilities_of

    torch.set_num_threads(1)
    backend = open_backend("cpu", capabilities_of(load_catalog().chip("cpu"), None))
    assert "relative L2 error" in validation._fp32(backend)
    real = torch.nn.functional.linear

    def as_tf32(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight.dtype != torch.float32:
            return real(x, weight, bias)
        keep = ~0x1FFF  # TF32 keeps ten bits of the fraction
        cut = [(y.detach().view(torch.int32) & keep).view(torch.float32) - y.detach() + y for y in (x, weight)]
        return real(cut[0], cut[1], bias)

    monkeypatch.setattr(torch.nn.functional, "linear", as_tf32)
    with pytest.raises(AssertionError, match="is TF32 or auto-cast on"):
        validation._fp32(backend)
