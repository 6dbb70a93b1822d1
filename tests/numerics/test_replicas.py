"""Replicas of unequal shape compute what one process computes: the same bits in fp64, given the documented order."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybrid.observe.events import EvalEvent, Event, StepEvent
from tests.numerics.replica_plans import Cut, job_of, plan_replicas, run_reference, run_replicas

THREE_AND_TWO = (
    Cut(layers=(2, 2, 1), num_microbatches=5, microbatch=2),
    Cut(layers=(1, 4), num_microbatches=3, microbatch=2, speed=2.0),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.set_num_threads(1)


def _steps(events: list[Event]) -> list[tuple[float, float]]:
    return [(event.loss, event.grad_norm) for event in events if isinstance(event, StepEvent)]


def _layers(checkpoint: str) -> dict[str, torch.Tensor]:
    files = sorted(Path(checkpoint).glob("layer-*.safetensors"))
    assert files
    return {key: tensor for file in files for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_three_stage_and_a_two_stage_replica_are_the_bits_of_one_process_in_fp64(tied: bool, tmp_path: Path) -> None:
    job = job_of(tmp_path, precision="fp64", model__tied_embeddings=tied)
    fleet, plan = plan_replicas(job, THREE_AND_TWO)
    wanted, wanted_events = run_reference(job, plan)
    found, events = run_replicas(job, fleet, plan)
    assert _steps(events) == _steps(wanted_events)
    losses = [[event.loss for event in each if isinstance(event, EvalEvent)] for each in (events, wanted_events)]
    assert losses[0] == losses[1]
    want, got = _layers(wanted.checkpoint), _layers(found.checkpoint)
    assert want.keys() == got.keys()
    assert [name for name in want if not torch.equal(want[name], got[name])] == []
