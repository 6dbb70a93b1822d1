"""StageCompute: forward and backward of one stage for one microbatch, on one backend.

Knows torch and the stage; knows nothing of schedules, ranks or wires. One thread only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from hybrid.backends.base import Backend
from hybrid.config import Precision
from hybrid.models.stage import Stage, compute_context, microbatch_loss


@dataclass(slots=True)
class _Held:
    """What stays from a microbatch's forward to its backward."""

    x: Tensor | None
    out: Tensor


class StageCompute:
    """One stage's forward and backward.

    Args:
        stage: contiguous layers of the model, with parameters in the master format.
        precision: compute format; callers hold `context()` open around a step.
        num_microbatches: the step's loss is the mean over them, so each loss is divided by it.
        saved_bytes: what one microbatch holds from forward to backward; counted into the backend's memory.
    """

    def __init__(
        self,
        stage: Stage,
        backend: Backend,
        *,
        precision: Precision,
        num_microbatches: int,
        saved_bytes: int = 0,
    ) -> None:
        self.stage, self.backend = stage, backend
        self.is_first, self.is_last = stage.is_first, stage.is_last
        self.saved_bytes = saved_bytes
        self._precision = precision
        # Two graphs: a step's forward keeps what the backward needs, an evaluation's keeps nothing.
        self._run = backend.compile(stage)
        self._run_without_grad = backend.compile(stage)
        self._num_microbatches = num_microbatches
        self._held: dict[int, _Held] = {}
        self._losses: dict[int, Tensor] = {}

    def context(self) -> AbstractContextManager[object]:
        """Return the context in which forwards and backwards run; one for all microbatches of a step."""
        return compute_context(self._precision, self.backend.device.type)

    def forward(self, microbatch: int, x: Tensor, targets: Tensor | None) -> Tensor | None:
        """Run the forward and hold what the backward needs.

        Args:
            x: token ids on the first stage, else the activation of the stage before, on the device.
            targets: next-token ids, on the host or the device; the last stage needs them.

        Shapes:
            x: (B, T) int64 or (B, T, H).  targets: (B, T) int64.  returns: (B, T, H), None on the last stage.

        Raises:
            torch.OutOfMemoryError: the device can hold no further microbatch.
        """
        self.backend.allocate(self.saved_bytes, f"activations of microbatch {microbatch}")
        leaf = None if self.is_first else x.detach().requires_grad_()
        out: Tensor = self._run(x if leaf is None else leaf)
        if not self.is_last:
            self._held[microbatch] = _Held(leaf, out)
            return out.detach()
        assert targets is not None, "the last stage needs targets"
        loss = microbatch_loss(out, targets)
        self._losses[microbatch] = loss.detach()
        self._held[microbatch] = _Held(leaf, loss / self._num_microbatches)
        return None

    def backward(self, microbatch: int, grad: Tensor | None) -> Tensor | None:
        """Accumulate the parameters' gradients; return the gradient of the stage's input.

        Shapes:
            grad: (B, T, H), None on the last stage.  returns: (B, T, H), None on the first stage.
        """
        held = self._held.pop(microbatch)
        torch.autograd.backward(held.out, grad)
        self.backend.release(self.saved_bytes)
        if held.x is None:
            return None
        assert held.x.grad is not None, "backward reached no input"
        return held.x.grad

    @torch.no_grad()
    def evaluate(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """Return the activation, or on the last stage the microbatch's mean loss, holding nothing."""
        out: Tensor = self._run_without_grad(x)
        if not self.is_last:
            return out
        assert targets is not None, "the last stage needs targets"
        return microbatch_loss(out, targets)

    def take_loss(self) -> float | None:
        """Return the step's loss, the mean over its microbatches summed in their order in float64; last stage only."""
        if not self.is_last:
            return None
        total = 0.0
        for microbatch in sorted(self._losses):
            total += self._losses[microbatch].item()
        self._losses.clear()
        return total / self._num_microbatches
