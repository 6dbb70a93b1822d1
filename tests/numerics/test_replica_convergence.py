"""What narrow gradients cost a model of real text: measured on the standard library's source, over unequal replicas.

Prints the figures (`pytest -s`) that docs/replicas.md has.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid.observe.events import EvalEvent, StepEvent
from hybrid.runtime import worker
from tests.numerics.replica_plans import Cut, job_of, plan_replicas, run_replicas

STEPS = 300
CUTS = (
    Cut(layers=(1, 1, 2), num_microbatches=5, microbatch=2),
    Cut(layers=(2, 2), num_microbatches=3, microbatch=2, speed=2.0),
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def replicas_of_run(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect what counts the bytes that ranks send to other replicas."""
    torch.set_num_threads(1)
    built: list[Any] = []
    build = worker.build_replicas

    def building(*args: Any) -> Any:
        built.append(build(*args))
        return built[-1]

    monkeypatch.setattr(worker, "build_replicas", building)
    return built


def _run(folder: Path, replicas_of_run: list[Any], codec: str) -> tuple[float, float, int]:
    """Return the held-out loss, the mean training loss of the last tenth, and the bytes sent between replicas."""
    job = job_of(
        folder,
        model={
            "num_blocks": 2,
            "hidden_size": 64,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 128,
            "vocab_size": 512,
            "sequence_length": 64,
        },
        data={"source": "python-stdlib"},
        steps=STEPS,
        optimizer={"learning_rate": 3e-3, "warmup_steps": 20},
        evaluate={"num_microbatches": 64},
        checkpoint={"at_end": False},
    )
    replicas_of_run.clear()
    _, events = run_replicas(job, *plan_replicas(job, CUTS, codec=codec))
    losses = [event.loss for event in events if isinstance(event, StepEvent)]
    last = losses[-STEPS // 10 :]
    held_out = next(event.loss for event in events if isinstance(event, EvalEvent))
    return held_out, sum(last) / len(last), sum(replicas.sent_bytes for replicas in replicas_of_run)


def test_fp8_gradients_with_error_feedback_reach_the_loss_of_whole_ones_within_half_a_percent(
    replicas_of_run: list[Any], tmp_path: Path
) -> None:
    wanted, found = (_run(tmp_path, replicas_of_run, codec) for codec in ("none", "fp8"))
    for name, figures in (("whole", wanted), ("fp8", found)):
        print(f"\n{name} gradients: held-out {figures[0]:.4f}, training {figures[1]:.4f}, {figures[2]:,} bytes", end="")
    assert found[0] == pytest.approx(wanted[0], rel=0.005)
    assert found[1] == pytest.approx(wanted[1], rel=0.005)
    # Gradients are half of what is sent; weights travel whole.
    assert found[2] / wanted[2] == pytest.approx((1 + (1 + 4 / 256) / 4) / 2, rel=0.02)
