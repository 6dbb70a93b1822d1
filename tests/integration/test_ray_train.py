"""Real Ray, real processes: the command line as a user runs it, and what is left when it ends, however it ends."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

JOB = """
name: tiny
model: {num_blocks: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, intermediate_size: 64,
        vocab_size: 320, sequence_length: 16}
data: {source: text, path: text, held_out_share: 0.1}
batch: {global_batch: 8, microbatch: 2}
steps: STEPS
emulation: {pace: false}
fleet:
  islands:
    - {name: trainium, device: trn2, count: 1}
    - {name: nvidia, device: h100, count: 1}
evaluate: {num_microbatches: 2}
runtime: {heartbeat_s: 0.5}
runs_dir: RUNS
"""


class Command:
    """A `hybrid` process that leaves a mark on all that it starts."""

    def __init__(self, folder: Path, *words: str, steps: int = 5) -> None:
        self.mark = uuid.uuid4().hex
        texts = folder / "text"
        texts.mkdir(exist_ok=True)
        for name in "abcdefghij":
            (texts / f"{name}.txt").write_text("\n".join(f"{name} {i} of {i * i % 97}" for i in range(500)))
        self.runs = folder / "runs"
        (folder / "job.yaml").write_text(JOB.replace("STEPS", str(steps)).replace("RUNS", str(self.runs)))
        self.shm_before = set(os.listdir("/dev/shm"))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "hybrid.cli", *words],
            cwd=folder,
            env={**os.environ, "HYBRID_TEST_MARK": self.mark, "HYBRID_CACHE": str(folder / "cache")},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def marked(self) -> list[psutil.Process]:
        """Return the living processes that the command started, itself included."""
        out = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HYBRID_TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    out.append(process)
            except psutil.Error:
                continue
        return out

    def workers(self) -> list[psutil.Process]:
        return [process for process in self.marked() if any("_WorkerActor" in word for word in process.cmdline())]

    def wait_for_step(self, step: int, timeout_s: float = 150.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            for metrics in self.runs.glob("*/metrics.jsonl"):
                if f'"event": "step", "step": {step},' in metrics.read_text():
                    return
            if self.process.poll() is not None:
                raise AssertionError(f"ended before step {step}: {self.process.communicate()}")
            time.sleep(0.1)
        raise AssertionError(f"step {step} was not reached in {timeout_s} s")

    def end(self, timeout_s: float) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, out, err

    def check_nothing_is_left(self) -> None:
        deadline_s = time.monotonic() + 15.0
        while self.marked() and time.monotonic() < deadline_s:
            time.sleep(0.2)
        assert [process.cmdline() for process in self.marked()] == []
        assert set(os.listdir("/dev/shm")) - self.shm_before == set()
        assert list(self.runs.glob("*/checkpoints/*.partial")) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def test_a_mixed_fleet_trains_on_a_local_ray_and_leaves_nothing_behind(folder: Path) -> None:
    command = Command(folder, "train", "job.yaml", "--json")
    code, out, err = command.end(200.0)
    assert code == 0, err
    summary = json.loads(out)
    assert out.count("\n") == 1
    assert summary["steps"] == 5
    assert summary["held_out_loss"] is not None
    assert summary["first_step_s"] > 0
    run = folder / summary["run"]
    assert (run / "plan.yaml").is_file()
    assert len([line for line in (run / "metrics.jsonl").open() if '"event": "step"' in line]) == 5
    command.check_nothing_is_left()

    reference = Command(folder, "train", "job.yaml", "--reference", "--json")
    code, out, err = reference.end(100.0)
    assert code == 0, err
    assert json.loads(out)["final_loss"] == summary["final_loss"]
    assert json.loads(out)["held_out_loss"] == summary["held_out_loss"]


def test_a_killed_worker_ends_the_job_within_seconds_with_its_rank_and_a_non_zero_code(folder: Path) -> None:
    command = Command(folder, "train", "job.yaml", steps=100_000)
    command.wait_for_step(3)
    workers = command.workers()
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    killed_s = time.monotonic()
    code, _, err = command.end(60.0)
    assert time.monotonic() - killed_s < 30.0
    assert code == 1
    assert "rank" in err
    assert "process ended before its job did" in err
    command.check_nothing_is_left()


def test_ctrl_c_ends_everything_with_code_130(folder: Path) -> None:
    command = Command(folder, "train", "job.yaml", steps=100_000)
    command.wait_for_step(3)
    command.process.send_signal(signal.SIGINT)
    code, _, err = command.end(60.0)
    assert code == 130, err
    assert "interrupted" in err
    command.check_nothing_is_left()


@pytest.mark.slow
def test_a_killed_driver_takes_its_workers_and_its_ray_with_it(folder: Path) -> None:
    command = Command(folder, "train", "job.yaml", steps=100_000)
    command.wait_for_step(3)
    command.process.kill()
    command.process.communicate(timeout=30.0)
    command.check_nothing_is_left()
