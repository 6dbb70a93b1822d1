"""Replicas of unequal shape compute what one process computes: the same bits in fp64, given the documented order."""

import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hybrid.errors import PlanError
from hybrid.models.stage import named_state
from hybrid.observe.events import EvalEvent, Event, StepEvent
from hybrid.runtime import open_replicas, worker
from hybrid.runtime.bucket_exchange import BucketExchange
from hybrid.runtime.replicas import Replicas
from hybrid.scheduler.reduction import plan_buckets
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


@pytest.fixture
def held_of_rank(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """Keep each rank's stages beyond its run."""
    kept: dict[int, Any] = {}
    build = worker.build_held_stages

    def building(spec: Any, *more: Any) -> Any:
        kept[spec.rank] = build(spec, *more)
        return kept[spec.rank]

    monkeypatch.setattr(worker, "build_held_stages", building)
    return kept


def test_replicas_hold_the_same_bytes_after_fifty_steps_and_those_of_one_process_to_1e_6(
    held_of_rank: dict[int, Any], tmp_path: Path
) -> None:
    # Microbatches of other sizes too: 5 of 2 samples and 2 of 3.
    cuts = (THREE_AND_TWO[0], Cut(layers=(1, 4), num_microbatches=2, microbatch=3, speed=2.0))
    job = job_of(tmp_path, steps=50, model__tied_embeddings=True)
    fleet, plan = plan_replicas(job, cuts)
    found, events = run_replicas(job, fleet, plan)
    state_of_replica = [
        {name: p for rank in replica.ranks for one in held_of_rank[rank] for name, p in named_state(one.stage).items()}
        for replica in plan.replicas
    ]
    one, other = state_of_replica
    assert one.keys() == other.keys()
    assert [
        name for name in one if one[name].detach().numpy().tobytes() != other[name].detach().numpy().tobytes()
    ] == []
    wanted, wanted_events = run_reference(job, plan)
    losses, wanted_losses = ([loss for loss, _ in _steps(each)] for each in (events, wanted_events))
    assert losses == pytest.approx(wanted_losses, rel=1e-6)
    want, got = _layers(wanted.checkpoint), _layers(found.checkpoint)
    assert max(float((want[name] - got[name]).abs().max()) for name in want) <= 1e-6


def test_each_moment_is_held_by_one_owner_more_of_them_by_the_faster(
    held_of_rank: dict[int, Any], tmp_path: Path
) -> None:
    job = job_of(tmp_path, steps=1)
    fleet, plan = plan_replicas(job, THREE_AND_TWO)
    run_replicas(job, fleet, plan)

    def num_moments(ranks: tuple[int, ...]) -> int:
        held = [one for rank in ranks for one in held_of_rank[rank]]
        return sum(m["exp_avg"].numel() for one in held for m in one.optimizer.state().values())

    slow, fast = (num_moments(replica.ranks) for replica in plan.replicas)
    whole = sum(p.numel() for rank in plan.replicas[0].ranks for p in held_of_rank[rank][0].stage.parameters())
    assert slow + fast == whole
    assert 1.5 < fast / slow < 3


@pytest.mark.parametrize("codec", ["none", "fp8"])
def test_a_resumed_run_of_replicas_goes_on_with_the_same_bits(codec: str, tmp_path: Path) -> None:
    job = job_of(tmp_path, steps=6, checkpoint__every_steps=3, checkpoint__keep=3)
    fleet, plan = plan_replicas(job, THREE_AND_TWO, codec=codec)
    whole, events = run_replicas(job, fleet, plan)
    middle = Path(whole.run) / "checkpoints" / "step-000003"
    resumed, resumed_events = run_replicas(job, fleet, plan, resume=middle)
    assert _steps(resumed_events) == _steps(events)[3:]
    want, got = _layers(whole.checkpoint), _layers(resumed.checkpoint)
    assert [name for name in want if not torch.equal(want[name], got[name])] == []


def test_a_checkpoint_of_replicas_goes_on_under_another_plan_and_in_one_process(tmp_path: Path) -> None:
    job = job_of(tmp_path, steps=6, precision="fp64", checkpoint__every_steps=3, checkpoint__keep=3)
    fleet, plan = plan_replicas(job, THREE_AND_TWO)
    whole, events = run_replicas(job, fleet, plan)
    middle = Path(whole.run) / "checkpoints" / "step-000003"
    others = tuple(
        Cut(layers=cut.layers[::-1], num_microbatches=cut.num_microbatches, microbatch=2) for cut in THREE_AND_TWO
    )
    _, resumed_events = run_replicas(job, *plan_replicas(job, others), resume=middle)
    assert _steps(resumed_events) == _steps(events)[3:]
    single = (Cut(layers=(2, 3), num_microbatches=8, microbatch=2),)
    _, single_events = run_replicas(job, *plan_replicas(job, single), resume=middle)
    assert [loss for loss, _ in _steps(single_events)] == pytest.approx(
        [loss for loss, _ in _steps(events)[3:]], rel=1e-12
    )


def test_narrow_gradients_of_a_float64_job_are_refused(tmp_path: Path) -> None:
    job = job_of(tmp_path, precision="fp64")
    fleet, plan = plan_replicas(job, THREE_AND_TWO, codec="fp8")
    with pytest.raises(PlanError, match="narrow gradients of float64"):
        run_replicas(job, fleet, plan)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_a_bucket_leaves_when_the_last_backward_has_passed_its_layers(
    schedule: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told: list[tuple[str, str]] = []

    def tell(cls: type, name: str) -> None:
        inner = getattr(cls, name)

        def telling(self: Any, *args: Any) -> Any:
            what = self.name if name == "leave" else f"{name} {args[0]}"
            told.append((threading.current_thread().name, what))
            return inner(self, *args)

        monkeypatch.setattr(cls, name, telling)

    tell(BucketExchange, "leave")
    tell(Replicas, "stage_done")
    monkeypatch.setattr(open_replicas, "plan_buckets", partial(plan_buckets, bucket_elements=1))
    job = job_of(tmp_path, steps=1, schedule=schedule, precision="fp64")
    whole = Cut(layers=(5,), num_microbatches=4, microbatch=2)
    fleet, plan = plan_replicas(job, (whole, whole))
    _, events = run_replicas(job, fleet, plan)
    order = [what for rank, what in told if rank == "rank-0"]
    assert sorted(order) == ["layers-0", "layers-1", "layers-2", "layers-3", "layers-4", "stage_done 0"]
    # Tied layers leave behind the rest; the rest one by one during the backward, unless it is split.
    assert order[-2:] == ["layers-4", "layers-0"]
    assert order.index("stage_done 0") == (3 if schedule == "1f1b" else 0)
    assert _steps(events) == _steps(run_reference(job, plan)[1])


@pytest.mark.parametrize("precision", ["fp64", "bf16"])
def test_three_replicas_with_microbatches_of_three_sizes_are_the_bits_of_one_process(
    precision: str, tmp_path: Path
) -> None:
    job = job_of(tmp_path, precision=precision, steps=4)
    cuts = (
        THREE_AND_TWO[0],
        Cut(layers=(1, 4), num_microbatches=2, microbatch=1),
        Cut(layers=(3, 2), num_microbatches=1, microbatch=4),
    )
    fleet, plan = plan_replicas(job, cuts)
    _, events = run_replicas(job, fleet, plan)
    assert _steps(events) == _steps(run_reference(job, plan)[1])
