"""A job with stages on the CPU, a fake neuron core and an emulated chip trains as one process does."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.commands.job import fleet_of, plan_of
from hybrid.config import parse_job
from hybrid.observe.events import Event, PhaseEvent, StepEvent
from hybrid.runtime.local import ThreadPlacement
from hybrid.runtime.trainer import train

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


def test_a_job_that_compiles_ahead_tells_what_is_compiled_and_trains_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of {i * i % 97}" for i in range(4000)))
    losses: list[list[float]] = []
    phases: list[str] = []
    for compile_stages in (False, True):
        job = parse_job(
            {
                "model": {"num_blocks": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2}
                | {"intermediate_size": 48, "vocab_size": 320, "sequence_length": 16},
                "data": {"source": "text", "path": str(tmp_path / "text.txt"), "held_out_share": 0.1},
                "batch": {"global_batch": 4, "microbatch": 2},
                "steps": 3,
                "fleet": {"islands": [{"name": "a", "device": "trn2", "count": 2}]},
                "emulation": {"pace": False},
                "runtime": {"placement": "threads", "transport": "inproc", "compile": compile_stages},
                "runs_dir": str(tmp_path / "runs"),
            }
        )
        job, fleet = fleet_of(job, None)
        events: list[Event] = []
        placement = ThreadPlacement(threads_per_rank=1)
        plan = plan_of(job, fleet)
        train(job, fleet, plan, placement, resume=None, sink=events.append, started_s=time.monotonic())
        losses.append([event.loss for event in events if isinstance(event, StepEvent)])
        phases = [event.name for event in events if isinstance(event, PhaseEvent)]
    assert losses[0] == losses[1]
    assert len(losses[1]) == 3
    told = [name for name in phases if " compiled " in name]
    assert {name.partition(" compiled ")[0] for name in told} == {"rank 0", "rank 1"}
    assert len(told) == 4
    assert phases.index("stages built and warm") > max(phases.index(name) for name in told)


def test_block_squares_are_the_norm_in_float64() -> None:
    from hybrid.runtime.optimizer import _block_squares, squared_norm

    generator = torch.Generator().manual_seed(3)
    for shape in ((0,), (1,), (4096,), (4097,), (130, 99)):
        gradient = torch.randn(shape, generator=generator)
        blocks = _block_squares(gradient)
        assert blocks.shape == (-(-gradient.numel() // 4096),)
        assert float(blocks.double().sum()) == pytest.approx(squared_norm([gradient]), rel=1e-5)
