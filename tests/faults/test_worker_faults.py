"""A fault at each rank and place of a step ends the whole job in seconds, with its own cause, and leaves nothing."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.commands.job import fleet_of, plan_of
from hybrid.config import JobConfig, parse_job
from hybrid.errors import HybridError, WorkerFailed
from hybrid.observe.events import StepEvent
from hybrid.runtime import checkpoint, held_stages, optimizer, worker
from hybrid.runtime.compute import StageCompute
from hybrid.runtime.local import ThreadPlacement
from hybrid.runtime.trainer import train

NUM_RANKS = 3


class Planted(RuntimeError):
    """The fault that a test plants."""


def _job(tmp_path: Path, medium: str) -> JobConfig:
    (tmp_path / "text.txt").write_text("\n".join(f"line {i} of {i * i % 97} apples" for i in range(4000)))
    return parse_job(
        {
            "model": {
                "num_blocks": 2,
                "hidden_size": 16,
                "num_heads": 2,
                "num_kv_heads": 1,
                "intermediate_size": 24,
                "vocab_size": 320,
                "sequence_length": 8,
            },
            "data": {"source": "text", "path": str(tmp_path), "held_out_share": 0.1},
            "batch": {"global_batch": 8, "microbatch": 2},
            "steps": 4,
            "num_stages": NUM_RANKS,
            "fleet": {"islands": [{"name": "host", "device": "cpu", "count": NUM_RANKS}]},
            "evaluate": {"every_steps": 2, "num_microbatches": 2},
            "checkpoint": {"every_steps": 2},
            "runtime": {
                "placement": "threads",
                "transport": "zmq" if medium.startswith("zmq") else "inproc",
                "zmq_medium": "ipc",
                "timeout_s": 20.0,
                "heartbeat_s": 0.5,
            },
            "runs_dir": str(tmp_path / "runs"),
        }
    )


def _on_rank(rank: int, function: Callable[..., Any], *, nth_call: int = 1) -> Callable[..., Any]:
    """Return `function`, which raises at its nth call on one rank's thread."""
    calls = 0

    def faulty(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        if threading.current_thread().name == f"rank-{rank}":
            calls += 1
            if calls == nth_call:
                raise Planted(f"planted on rank {rank}")
        return function(*args, **kwargs)

    return faulty


PLACES: dict[str, tuple[object, str, int]] = {
    "opening its node": (worker, "open_node", 1),
    "building the stage": (held_stages, "build_stage", 1),
    "warming up": (worker, "warm_up", 1),
    "a forward of the second step": (StageCompute, "forward", 3 + 1 + 4 + 2),
    "a backward of the second step": (StageCompute, "backward", 3 + 4 + 2),
    "the optimizer": (optimizer.AdamW, "step", 2),
    "an evaluation": (StageCompute, "evaluate", 2),
    "writing a checkpoint": (checkpoint, "write_layer", 1),
}


@pytest.mark.parametrize("medium", ["inproc", "zmq"])
@pytest.mark.parametrize("rank", range(NUM_RANKS))
@pytest.mark.parametrize("place", PLACES)
def test_a_fault_ends_the_job_with_its_own_cause(
    place: str, rank: int, medium: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    owner, name, nth_call = PLACES[place]
    monkeypatch.setattr(owner, name, _on_rank(rank, getattr(owner, name), nth_call=nth_call))
    job, fleet = fleet_of(_job(tmp_path, medium), None)
    events: list[object] = []
    started_s = time.monotonic()
    placement = ThreadPlacement(threads_per_rank=1)
    with pytest.raises(WorkerFailed) as caught:
        train(job, fleet, plan_of(job, fleet), placement, resume=None, sink=events.append, started_s=started_s)
    assert time.monotonic() - started_s < 20.0
    text = str(caught.value)
    assert f"planted on rank {rank}" in text, "the cause, not a consequence"
    assert f"rank {rank}" in text
    assert "Traceback" in text
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(("rank-", "control-"))] == []
    assert list(tmp_path.glob("runs/*/checkpoints/*.partial")) == []
    committed = [event.step for event in events if isinstance(event, StepEvent)]
    assert committed == list(range(len(committed))), "steps are committed in order, each once"


def test_an_emulated_chip_without_memory_for_the_activations_says_what_did_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    job, fleet = fleet_of(_job(tmp_path, "inproc"), None)
    plan = plan_of(job, fleet)
    # The planner would refuse the job; a plan that was made elsewhere may promise too much.
    small = plan.stages[1].memory_bytes // 3
    stages = tuple(
        replace(stage, memory_limit_bytes=small) if stage.stage == 1 else stage for stage in plan.replica.stages
    )
    plan = replace(plan, replicas=(replace(plan.replica, stages=stages),))
    with pytest.raises(HybridError, match=r"rank 1.*out of memory: tried to allocate .* in use"):
        train(
            job,
            fleet,
            plan,
            ThreadPlacement(threads_per_rank=1),
            resume=None,
            sink=lambda event: None,
            started_s=time.monotonic(),
        )
    torch.set_num_threads(1)
