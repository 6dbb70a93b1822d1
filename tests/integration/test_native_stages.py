"""Stages of several processes over their native group: gloo here; a plan file that Ray runs; a rank that is killed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from hybrid.commands.job import fleet_of, plan_of
from hybrid.config import JobConfig
from hybrid.errors import WorkerFailed
from hybrid.job_file import load_job
from hybrid.observe.events import EvalEvent, Event, StepEvent
from hybrid.runtime.trainer import train, train_in_one_process
from hybrid.scheduler.plan import Plan
from hybrid.testing.process_placement import ProcessPlacement

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

JOB = """
name: native
model: {num_blocks: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, intermediate_size: 64,
        vocab_size: 320, sequence_length: 16}
data: {source: text, path: TEXT, held_out_share: 0.1}
batch: {global_batch: 8, microbatch: 2}
steps: STEPS
num_stages: 2
fleet: {islands: [{name: host, device: cpu, count: 6}]}
evaluate: {num_microbatches: 2}
checkpoint: {at_end: false}
runtime: {heartbeat_s: 0.5}
runs_dir: RUNS
"""


def _job(folder: Path, steps: int) -> Path:
    texts = folder / "text"
    texts.mkdir()
    for name in "abcdefghij":
        (texts / f"{name}.txt").write_text("\n".join(f"{name} {i} of {i * i % 97}" for i in range(500)))
    text = JOB.replace("TEXT", str(texts)).replace("STEPS", str(steps)).replace("RUNS", str(folder / "runs"))
    (folder / "job.yaml").write_text(text)
    return folder / "job.yaml"


def _plan(job: JobConfig, degrees: tuple[tuple[int, int], ...]) -> Plan:
    job, fleet = fleet_of(job, None)
    plan = plan_of(job, fleet)
    stages, first = [], 0
    for stage, (tensor_parallel, width) in zip(plan.replica.stages, degrees, strict=True):
        ranks = tuple(range(first, first + tensor_parallel * width))
        stages.append(replace(stage, ranks=ranks, tensor_parallel=tensor_parallel, width=width))
        first += len(ranks)
    return replace(plan, replicas=(replace(plan.replica, stages=tuple(stages)),))


def _losses(events: list[Event]) -> list[float]:
    # An evaluation may be told before the last rank has reported its step.
    return [event.loss for kind in (StepEvent, EvalEvent) for event in events if isinstance(event, kind)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))


def test_processes_train_over_gloo_as_one_process_does(tmp_path: Path) -> None:
    job = load_job(_job(tmp_path, steps=10))
    wanted: list[Event] = []
    train_in_one_process(job, resume=None, sink=wanted.append, started_s=time.monotonic())
    found: list[Event] = []
    plan = _plan(job, ((2, 2), (2, 1)))
    job, fleet = fleet_of(job, None)
    placement = ProcessPlacement(fake_neuron=False)
    train(job, fleet, plan, placement, resume=None, sink=found.append, started_s=time.monotonic())
    assert len(_losses(found)) == 11
    assert _losses(found) == pytest.approx(_losses(wanted), rel=1e-6)


def test_a_killed_rank_of_a_stage_ends_the_job_and_every_process(tmp_path: Path) -> None:
    job = load_job(_job(tmp_path, steps=100_000))
    plan = _plan(job, ((2, 1), (1, 1)))
    job, fleet = fleet_of(job, None)
    placement = ProcessPlacement(fake_neuron=False)
    before = set(psutil.Process().children(recursive=True))

    def kill_one(event: Event) -> None:
        if isinstance(event, StepEvent) and event.step == 3:
            next(one for one in placement._processes if one.name == "rank-1").kill()

    started_s = time.monotonic()
    with pytest.raises(WorkerFailed, match="rank 1"):
        train(job, fleet, plan, placement, resume=None, sink=kill_one, started_s=started_s)
    assert time.monotonic() - started_s < 90.0
    left = {
        one for one in set(psutil.Process().children(recursive=True)) - before if "spawn_main" in str(one.cmdline())
    }
    assert not left


@pytest.mark.ray
def test_a_plan_file_with_degrees_above_one_runs_on_ray(tmp_path: Path) -> None:
    path = _job(tmp_path, steps=5)
    job = load_job(path)
    (tmp_path / "plan.yaml").write_text(_plan(job, ((2, 1), (1, 1))).to_yaml())
    wanted: list[Event] = []
    train_in_one_process(job, resume=None, sink=wanted.append, started_s=time.monotonic())
    done = subprocess.run(
        [sys.executable, "-m", "hybrid.cli", "train", str(path), "--plan", str(tmp_path / "plan.yaml")],
        cwd=tmp_path,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = max((tmp_path / "runs").iterdir(), key=lambda folder: folder.stat().st_mtime)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["event"] == "step"]
    assert losses == pytest.approx(_losses(wanted)[:5], rel=1e-6)
