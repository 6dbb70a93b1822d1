"""Declared NeuronCores on a real local Ray: whole chips are taken, every rank gets a core and says what is missing."""

import time
from pathlib import Path

import pytest

from hybrid.commands.job import fleet_of, plan_of
from hybrid.config import parse_job
from hybrid.errors import UserError
from hybrid.runtime.launcher import RayPlacement
from hybrid.runtime.trainer import train

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]


def test_ranks_of_one_chip_share_its_bundle_and_are_refused_for_want_of_a_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("\n".join(f"{i} of {i * i % 97}" for i in range(5000)))
    job = parse_job(
        {
            "model": {"num_blocks": 2, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2}
            | {"intermediate_size": 64, "vocab_size": 320, "sequence_length": 16},
            "data": {"source": "text", "path": str(tmp_path / "text.txt"), "held_out_share": 0.1},
            "batch": {"global_batch": 4, "microbatch": 2},
            "steps": 1,
            "num_stages": 2,
            "fleet": {"islands": [{"name": "a", "device": "trn2", "backend": "neuron"}]},
            "runs_dir": str(tmp_path / "runs"),
        }
    )
    job, fleet = fleet_of(job, None)
    plan = plan_of(job, fleet)
    islands = [fleet.island(stage.island) for stage in plan.stages]
    placement = RayPlacement(islands, address=None, timeout_s=90.0, job_name="cores")
    with pytest.raises(UserError, match=r"torch-neuronx is not installed.*package index"):
        train(job, fleet, plan, placement, resume=None, sink=lambda event: None, started_s=time.monotonic())
