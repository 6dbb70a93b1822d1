"""Stages of several ranks train as one process does: tensor parallel, width, and neighbours of other degrees."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.commands.job import fleet_of, plan_of
from hybrid.config import JobConfig, parse_job
from hybrid.errors import ConfigError, PlanError
from hybrid.observe.events import EvalEvent, Event, StepEvent
from hybrid.runtime import checkpoint
from hybrid.runtime.local import ThreadPlacement
from hybrid.runtime.trainer import train, train_in_one_process
from hybrid.scheduler.plan import Plan

Degrees = tuple[tuple[int, int], ...]
"""(tensor_parallel, width) of each stage."""


def _job(tmp_path: Path, **changes: Any) -> JobConfig:
    text = tmp_path / "text.txt"
    if not text.exists():
        text.write_text("\n".join(f"line {i} of {i * i % 97} and {i**3 % 89} apples" for i in range(4000)))
    raw: dict[str, Any] = {
        "name": "degrees",
        "model": {
            "num_blocks": 3,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 320,
            "sequence_length": 16,
        },
        "data": {"source": "text", "path": str(tmp_path), "held_out_share": 0.1},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3},
        "batch": {"global_batch": 8, "microbatch": 2},
        "steps": 20,
        "fleet": {"islands": [{"name": "host", "device": "cpu", "count": 8}]},
        "evaluate": {"num_microbatches": 2},
        "checkpoint": {"at_end": False},
        "runtime": {"placement": "threads", "transport": "inproc", "timeout_s": 30.0},
        "runs_dir": str(tmp_path / "runs"),
    }
    for key, value in changes.items():
        where = raw
        *parents, last = key.split("__")
        for parent in parents:
            where = where.setdefault(parent, {})
        where[last] = value
    return parse_job(raw)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.set_num_threads(1)


def spread(plan: Plan, degrees: Degrees, seconds: dict[str, float]) -> Plan:
    """Return a plan of one rank a stage with other degrees, its ranks numbered anew."""
    stages, first = [], 0
    for stage, (tensor_parallel, width) in zip(plan.replica.stages, degrees, strict=True):
        ranks = tuple(range(first, first + tensor_parallel * width))
        stages.append(replace(stage, ranks=ranks, tensor_parallel=tensor_parallel, width=width, **seconds))
        first += len(ranks)
    return replace(plan, replicas=(replace(plan.replica, stages=tuple(stages)),))


def _train(
    job: JobConfig, degrees: Degrees, *, resume: Path | None = None, seconds: dict[str, float] | None = None
) -> list[Event]:
    events: list[Event] = []
    job = job.model_copy(update={"num_stages": len(degrees)})
    job, fleet = fleet_of(job, None)
    plan = spread(plan_of(job, fleet), degrees, seconds or {})
    assert Plan.from_yaml(plan.to_yaml()) == plan
    placement = ThreadPlacement(threads_per_rank=1)
    train(job, fleet, plan, placement, resume=resume, sink=events.append, started_s=time.monotonic())
    return events


def _reference(job: JobConfig) -> list[Event]:
    events: list[Event] = []
    train_in_one_process(job, resume=None, sink=events.append, started_s=time.monotonic())
    return events


def _losses(events: list[Event]) -> list[float]:
    """Return the loss of each step, and the held-out loss."""
    # An evaluation may be told before the last rank has reported its step.
    return [e.loss for kind in (StepEvent, EvalEvent) for e in events if isinstance(e, kind)]


def _norms(events: list[Event]) -> list[float]:
    return [e.grad_norm for e in events if isinstance(e, StepEvent)]


CASES: dict[str, Degrees] = {
    "2": ((2, 1),),
    "4": ((4, 1),),
    "2-1": ((2, 1), (1, 1)),
    "1-2": ((1, 1), (2, 1)),
    "2-2": ((2, 1), (2, 1)),
    "2-4": ((2, 1), (4, 1)),
    "4-2": ((4, 1), (2, 1)),
    "1-w2": ((1, 1), (1, 2)),
    "w2-1": ((1, 2), (1, 1)),
    "w2-2": ((1, 2), (2, 1)),
    "2-w2-1": ((2, 1), (1, 2), (1, 1)),
    "2xw2-2": ((2, 2), (2, 1)),
}


def _quick(name: str) -> list[Any]:
    """Return all cases, those but one marked as slow."""
    return [case if case == name else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", _quick("2-1"))
def test_twenty_fp32_steps_equal_the_reference_to_1e_6(case: str, tmp_path: Path) -> None:
    job = _job(tmp_path)
    wanted, found = _reference(job), _train(job, CASES[case])
    assert len(_losses(wanted)) == 21
    assert _losses(wanted)[0] > _losses(wanted)[19], "nothing was learned"
    assert _losses(found) == pytest.approx(_losses(wanted), rel=1e-6)
    # A norm is a gradient's own size, before the update scales it: it shows what twenty updates have added up.
    assert _norms(found) == pytest.approx(_norms(wanted), rel=3e-5)


@pytest.mark.parametrize("sequence_parallel", [True, False], ids=["sp", "no-sp"])
@pytest.mark.parametrize("case", _quick("2xw2-2"))
def test_ten_fp64_steps_equal_the_reference_within_rounding(case: str, sequence_parallel: bool, tmp_path: Path) -> None:
    job = _job(
        tmp_path,
        precision="fp64",
        steps=10,
        runtime__sequence_parallel=sequence_parallel,
        model__tied_embeddings=not sequence_parallel,
    )
    wanted, found = _reference(job), _train(job, CASES[case])
    assert _losses(found) == pytest.approx(_losses(wanted), rel=1e-12)
    assert _norms(found) == pytest.approx(_norms(wanted), rel=1e-11)


@pytest.mark.parametrize(
    ("before", "after"),
    [("2xw2-2", "2-1"), pytest.param("2-4", "w2-1", marks=pytest.mark.slow)],
)
def test_a_checkpoint_of_some_degrees_is_the_references_and_goes_on_with_others(
    before: str, after: str, tmp_path: Path
) -> None:
    job = _job(tmp_path, precision="fp64", steps=6, checkpoint={"every_steps": 3, "at_end": False})
    wanted = _reference(job)
    whole = _checkpoint(tmp_path)
    _train(job, CASES[before])
    found = _checkpoint(tmp_path)
    for index in range(job.model.num_layers):
        one, other = (checkpoint.read_layer(manifest, index) for manifest in (whole, found))
        for part, tensors in one.items():
            assert tensors.keys() == other[part].keys()
            for name, tensor in tensors.items():
                torch.testing.assert_close(other[part][name], tensor, rtol=1e-9, atol=1e-14)
    resumed = _train(job, CASES[after], resume=found.path)
    assert _losses(resumed) == pytest.approx(_losses(wanted)[3:], rel=1e-12)


def _checkpoint(folder: Path) -> checkpoint.Manifest:
    """Return the first checkpoint of the newest run."""
    run = max((folder / "runs").iterdir(), key=lambda path: path.stat().st_mtime)
    return checkpoint.read_manifest(checkpoint.complete_checkpoints(run)[0])


@pytest.mark.parametrize(
    ("changes", "degrees", "message"),
    [
        ({"model__vocab_size": 321}, ((2, 1), (1, 1)), r"stages\[0\].tensor_parallel.*model.vocab_size 321"),
        ({"model__sequence_length": 17}, ((1, 1), (2, 1)), r"stages\[1\].tensor_parallel.*model.sequence_length 17"),
        ({}, ((3, 1), (1, 1)), "tensor_parallel 3 is not a multiple of model.num_kv_heads 2"),
        ({"batch__microbatch": 1}, ((1, 2), (1, 1)), "width"),
    ],
)
def test_impossible_degrees_are_refused_before_anything_is_placed(
    changes: dict[str, Any], degrees: Degrees, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=r"(?s)" + message):
        _train(_job(tmp_path, **changes), degrees)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


def test_a_stage_of_several_ranks_is_not_compiled(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"runtime.compile"):
        _train(_job(tmp_path, runtime__compile=True), CASES["2-1"])


def test_emulated_chips_keep_their_pace_when_several_hold_a_stage(tmp_path: Path) -> None:
    islands = [{"name": "a", "device": "trn2", "count": 4}, {"name": "b", "device": "h100", "count": 4}]
    job = _job(tmp_path, fleet={"islands": islands}, steps=3, emulation={"pace": True, "time_scale": 1.0})
    seconds = {"forward_s": 0.02, "backward_s": 0.04, "weight_gradient_s": 0.02}
    events = _train(job, CASES["2-1"], seconds=seconds)
    assert _losses(events) == pytest.approx(_losses(_reference(job)), rel=1e-6)
    # Four microbatches through two stages: five forwards and backwards one after the other.
    steps_s = [event.seconds for event in events if isinstance(event, StepEvent)]
    assert all(0.95 * 5 * 0.06 < step_s < 3 * 5 * 0.06 for step_s in steps_s), steps_s


def _two_replicas(plan: Plan, degrees: Degrees) -> Plan:
    """Return a plan of two replicas that share the batch, each of these degrees."""
    first = spread(plan, degrees, {}).replica
    half = replace(first, num_microbatches=first.num_microbatches // 2)
    stages = tuple(replace(one, ranks=tuple(rank + len(first.ranks) for rank in one.ranks)) for one in first.stages)
    return replace(plan, replicas=(half, replace(half, replica=1, first_sample=half.num_samples, stages=stages)))


@pytest.mark.parametrize(
    ("case", "precision"),
    [
        ("2-1", "fp32"),
        pytest.param("2-1", "fp64", marks=pytest.mark.slow),
        pytest.param("2xw2-2", "fp64", marks=pytest.mark.slow),
    ],
)
def test_two_replicas_of_several_ranks_a_stage_equal_the_reference(case: str, precision: str, tmp_path: Path) -> None:
    """Two stages, tensor parallel 2 then 1, two replicas: six ranks."""
    count = 2 * sum(tensor_parallel * width for tensor_parallel, width in CASES[case])
    islands = [{"name": "host", "device": "cpu", "count": count}]
    job = _job(tmp_path, precision=precision, fleet={"islands": islands}, checkpoint={"at_end": True})
    wanted, folder = _reference(job), tmp_path / "runs"
    whole = _checkpoint(tmp_path)
    job = job.model_copy(update={"num_stages": 2})
    job, fleet = fleet_of(job, None)
    plan = _two_replicas(plan_of(job, fleet), CASES[case])
    assert plan.num_ranks == count
    assert Plan.from_yaml(plan.to_yaml()) == plan
    found: list[Event] = []
    placement = ThreadPlacement(threads_per_rank=1)
    train(job, fleet, plan, placement, resume=None, sink=found.append, started_s=time.monotonic())
    bound = 1e-6 if precision == "fp32" else 1e-12
    assert len(_losses(wanted)) == 21
    assert _losses(found) == pytest.approx(_losses(wanted), rel=bound)
    other = _checkpoint(tmp_path)
    assert len(list(folder.iterdir())) == 2
    for index in range(job.model.num_layers):
        one, two = (checkpoint.read_layer(manifest, index)["weight"] for manifest in (whole, other))
        for name, tensor in one.items():
            # An element whose gradient is all rounding moves by its sign: so fp32 weights have a wider bound.
            torch.testing.assert_close(two[name], tensor, rtol=0.0, atol=2e-4 if precision == "fp32" else 1e-9)
