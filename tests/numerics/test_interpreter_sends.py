"""What the interpreter holds of its sends: an activation that has left is let go within the step."""

import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hybrid.backends.cpu import CpuBackend
from hybrid.config import ModelConfig
from hybrid.hardware import load_catalog
from hybrid.models.stage import boundary_shape, build_stage
from hybrid.runtime.capabilities import capabilities_of
from hybrid.runtime.compute import StageCompute
from hybrid.runtime.interpreter import Interpreter
from hybrid.scheduler.lowering import lower_communication
from hybrid.scheduler.schedules import one_f_one_b
from hybrid.transports.arrival import ArrivalHistory
from hybrid.transports.base import Buffer, Pending, Transport

NUM_MICROBATCHES = 6
MODEL = ModelConfig(
    num_blocks=1, hidden_size=16, num_heads=1, num_kv_heads=1, vocab_size=300, sequence_length=8, tied_embeddings=False
)


class Done(Pending):
    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float) -> None:
        pass


class QuickEdge(Transport):
    """Takes every message at once and leaves what is received as it was."""

    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        return Done()

    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        return Done()

    def close(self) -> None:
        pass


def test_a_step_holds_no_more_than_two_activations_that_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = build_stage(MODEL, 0, 2, seed=1, dtype=torch.float32)
    backend = CpuBackend(capabilities_of(load_catalog().chip("cpu"), None))
    compute = StageCompute(stage, backend, precision="fp32", num_microbatches=NUM_MICROBATCHES)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    forward = compute.forward

    def counting_forward(microbatch: int, x: Tensor, targets: Tensor | None) -> Tensor | None:
        alive.append(sum(ref() is not None for ref in made))
        out = forward(microbatch, x, targets)
        assert out is not None
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(compute, "forward", counting_forward)
    interpreter = Interpreter(
        lower_communication(one_f_one_b(2, NUM_MICROBATCHES)),
        0,
        {0: compute},
        {1: QuickEdge()},
        shape=boundary_shape(MODEL, 1),
        dtype=torch.float32,
        seconds_of=lambda action: 0.0,
        waits=ArrivalHistory(fixed_s=1.0),
    )
    ids = torch.zeros(1, MODEL.sequence_length, dtype=torch.int64)
    for step in range(2):
        interpreter.run(step, lambda microbatch: (ids, ids))
    assert len(alive) == 2 * NUM_MICROBATCHES
    assert max(alive) <= 2
