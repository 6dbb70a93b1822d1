"""DiLoCo as a job: pipelines of unequal shape that meet now and then, evaluated, written, resumed, refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hybrid.errors import ConfigError, PlanError
from hybrid.models.tokens import prepare_data
from hybrid.observe.events import EvalEvent, StepEvent
from tests.numerics.replica_plans import Cut, job_of, plan_replicas, run_reference, run_replicas
from tests.numerics.test_diloco import run_replicas as run_by_hand
from tests.numerics.test_diloco import train_replica

THREE_AND_TWO = (
    Cut(layers=(2, 2, 1), num_microbatches=5, microbatch=2),
    Cut(layers=(1, 4), num_microbatches=3, microbatch=2),
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    torch.set_num_threads(1)


def layers_of(checkpoint: str) -> dict[str, torch.Tensor]:
    return {key: x for file in sorted(Path(checkpoint).glob("layer-*")) for key, x in load_file(file).items()}


def run(job, cuts, resume=None):
    fleet, plan = plan_replicas(job, cuts)
    return run_replicas(job, fleet, plan, resume)


def test_a_job_computes_what_the_same_steps_compute_by_hand(tmp_path):
    job = job_of(tmp_path, steps=5, batch__microbatch=8, diloco__every_steps=2, diloco__codec="fp8")
    one_stage = Cut(layers=(5,), num_microbatches=1, microbatch=8)
    found, _ = run(job, (one_stage, one_stage))
    tokens = prepare_data(job.data, job.model)

    def by_hand(rank, group):
        return train_replica(job, tokens, rank, group, codec="fp8", every=2, number=1, overlap=0)

    (_, _, mine), (_, _, theirs) = run_by_hand(by_hand)
    got = layers_of(found.checkpoint)
    assert {key for key in got if key.startswith("weight:")} == {f"weight:{name}" for name in mine}
    for name, weight in mine.items():
        assert torch.equal(weight, theirs[name])
        assert torch.equal(weight, got[f"weight:{name}"])


def test_unequal_replicas_learn_report_the_mean_of_their_losses_and_hold_the_same_weights_when_they_meet(tmp_path):
    job = job_of(tmp_path, steps=12, evaluate__every_steps=6, checkpoint__every_steps=6, diloco__every_steps=4)
    _, events = run(job, THREE_AND_TWO)
    losses = [event.loss for event in events if isinstance(event, StepEvent)]
    held_out = [event.loss for event in events if isinstance(event, EvalEvent)]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3
    assert held_out[1] < held_out[0]
    # Before anyone has moved, the mean of the replicas' losses is the loss of the whole batch.
    _, together = run_reference(job.model_copy(update={"diloco": None, "steps": 1}), None)
    first = next(event.loss for event in together if isinstance(event, StepEvent))
    assert losses[0] == pytest.approx(first, rel=1e-6)


@pytest.mark.parametrize("overlap", [0, 2])
def test_streamed_fragments_run_overlapped_with_the_inner_steps(tmp_path, overlap):
    job = job_of(
        tmp_path,
        steps=10,
        diloco__every_steps=4,
        diloco__num_fragments=3,
        diloco__overlap_steps=overlap,
        diloco__codec="int4",
        diloco__warmup_steps=2,
    )
    _, events = run(job, THREE_AND_TWO)
    losses = [event.loss for event in events if isinstance(event, StepEvent)]
    assert losses[-1] < losses[0] - 0.2


def test_a_resumed_job_goes_on_with_the_outer_momentum_of_the_checkpoint(tmp_path):
    job = job_of(tmp_path, steps=8, checkpoint__every_steps=4, checkpoint__keep=5, diloco__every_steps=2)
    whole, _ = run(job, THREE_AND_TWO)
    half = Path(whole.run) / "checkpoints" / "step-000004"
    momentum = {key: x for key, x in layers_of(str(half)).items() if key.startswith("outer_momentum:")}
    assert momentum
    assert any(bool(x.any()) for x in momentum.values())
    resumed, events = run(job, THREE_AND_TWO, resume=half)
    assert [event.step for event in events if isinstance(event, StepEvent)] == [4, 5, 6, 7]
    # The inner moments are the first replica's on both: near the run that was never interrupted, not equal to it.
    want, got = layers_of(whole.checkpoint), layers_of(resumed.checkpoint)
    assert want.keys() == got.keys()
    for name, x in want.items():
        if name.startswith("weight:"):
            torch.testing.assert_close(got[name], x, rtol=0.05, atol=0.01)


def test_one_replica_and_the_reference_are_refused(tmp_path):
    job = job_of(tmp_path, diloco__every_steps=2, batch__global_batch=8)
    with pytest.raises(PlanError, match="2 replicas or more"):
        run(job, [Cut(layers=(5,), num_microbatches=4, microbatch=2)])
    with pytest.raises(ConfigError, match="Leave the section out"):
        run_reference(job, None)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"diloco__num_fragments": 9}, "valid: num_fragments 1 to 4|valid: 1 to 5"),
        ({"diloco__num_fragments": 6, "diloco__every_steps": 8}, "valid: 1 to 5"),
        ({"diloco__overlap_steps": 4}, "valid: overlap_steps 0 to 3"),
    ],
)
def test_impossible_sections_are_refused_when_the_job_is_read(tmp_path, change, match):
    with pytest.raises(ConfigError, match=match):
        job_of(tmp_path, **{"diloco__every_steps": 4, **change})
