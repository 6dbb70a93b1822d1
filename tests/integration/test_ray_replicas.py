"""Replicas of unequal shape as a user runs them: `hybrid train --plan` on real Ray, processes and sockets."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid.config import dump_job
from tests.numerics.replica_plans import Cut, job_of, plan_replicas

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]


def _train(folder: Path, *words: str) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, "-m", "hybrid.cli", "train", "job.yaml", "--plan", "plan.yaml", "--json", *words],
        cwd=folder,
        env={**os.environ, "HYBRID_CACHE": str(folder / "cache")},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    summary: dict[str, object] = json.loads(done.stdout)
    return summary


def test_a_trainium_and_an_nvidia_replica_train_as_one_process_does(tmp_path: Path) -> None:
    islands = [{"name": "trainium", "device": "trn2", "count": 3}, {"name": "nvidia", "device": "h100", "count": 2}]
    job = job_of(
        tmp_path,
        steps=4,
        fleet={"islands": islands},
        emulation={"pace": False},
        runtime={"heartbeat_s": 0.5, "placement_timeout_s": 120.0},
    )
    cuts = (
        Cut(layers=(2, 2, 1), num_microbatches=5, microbatch=2, island=0),
        Cut(layers=(1, 4), num_microbatches=3, microbatch=2, island=1),
    )
    _, plan = plan_replicas(job, cuts)
    (tmp_path / "job.yaml").write_text(dump_job(job))
    (tmp_path / "plan.yaml").write_text(plan.to_yaml())
    found, wanted = _train(tmp_path), _train(tmp_path, "--reference")
    assert found["final_loss"] == wanted["final_loss"]
    assert found["held_out_loss"] == wanted["held_out_loss"]
