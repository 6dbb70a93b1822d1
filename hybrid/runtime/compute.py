"""StageCompute: forward and backward of one stage for one microbatch, on one backend.

A backward runs whole, or in two parts: the input's gradient now, the weights' later. With recompute a forward keeps its
input only and the backward runs it again. Knows torch and the stage; knows nothing of schedules, ranks or wires. One
thread only.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from hybrid.backends.base import Backend
from hybrid.backends.weight_gradients import Deferral
from hybrid.config import Precision
from hybrid.models.stage import Stage, compute_context


@dataclass(slots=True)
class _Traced:
    """A forward that autograd has recorded."""

    x: Tensor | None
    """The leaf whose gradient goes to the stage before; None on the first stage."""
    out: Tensor
    """What the backward starts from: the activation, or the share of the step's loss."""
    deferral: Deferral | None


@dataclass(slots=True)
class _Input:
    """A forward that is to be run again."""

    x: Tensor
    targets: Tensor | None


class StageCompute:
    """One stage's forward and backward.

    Args:
        stage: contiguous layers of the model, with parameters in the master format.
        precision: compute format; callers hold `context()` open around a step.
        num_microbatches: of this size, in the whole step, all replicas together; the step's loss is the mean over the
            samples, so each microbatch's loss is divided by it. A fraction where other replicas' sizes do not fit.
        saved_bytes: what one microbatch holds from forward to backward; counted into the backend's memory.
        splits: backwards may come in two parts. Not for a stage that is compiled: its `backward_input` is the whole
            backward and its `backward_weight` does nothing.
        recompute: keep a forward's input only, and run it again before its backward.
    """

    def __init__(
        self,
        stage: Stage,
        backend: Backend,
        *,
        precision: Precision,
        num_microbatches: float,
        saved_bytes: int = 0,
        splits: bool = False,
        recompute: bool = False,
    ) -> None:
        self.stage, self.backend = stage, backend
        self.is_first, self.is_last = stage.is_first, stage.is_last
        self.splits, self.recompute = splits, recompute
        self.saved_bytes = saved_bytes
        self.input_bytes = 0
        """What of a microbatch is held from its forward to its backward with `recompute`."""
        self.put_off_bytes = 0
        """What of a microbatch is held from its input's gradient to its weights'."""
        self._precision = precision
        # Two graphs: a step's forward keeps what the backward needs, an evaluation's keeps nothing.
        self._run = backend.compile(stage)
        self._run_without_grad = backend.compile(stage)
        self._num_microbatches = num_microbatches
        self._held: dict[int, _Traced | _Input] = {}
        self._put_off: dict[int, Deferral | None] = {}
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
        held_bytes = self.input_bytes if self.recompute else self.saved_bytes
        self.backend.allocate(held_bytes, f"activations of microbatch {microbatch}")
        # Recorded as in the second run, but nothing is saved: without a record other kernels might be chosen.
        with saved_tensors_hooks(_drop, _never) if self.recompute else nullcontext():
            traced, loss = self._trace(x, targets)
        self._held[microbatch] = _Input(x, targets) if self.recompute else traced
        if loss is None:
            return traced.out.detach()
        self._losses[microbatch] = loss.detach()
        return None

    def backward(self, microbatch: int, grad: Tensor | None) -> Tensor | None:
        """Accumulate the parameters' gradients; return the gradient of the stage's input.

        Shapes:
            grad: (B, T, H), None on the last stage.  returns: (B, T, H), None on the first stage.
        """
        grad_x, _ = self._backward(microbatch, grad, puts_off=False)
        self.backend.release(self.saved_bytes)
        return grad_x

    def backward_input(self, microbatch: int, grad: Tensor | None) -> Tensor | None:
        """Return the gradient of the stage's input; products with weights leave theirs to `backward_weight`.

        What only the input's gradient needed is freed. The small weights of norms, whose gradients fall out on the
        way, are done with.

        Shapes:
            grad: (B, T, H), None on the last stage.  returns: (B, T, H), None on the first stage.
        """
        grad_x, deferral = self._backward(microbatch, grad, puts_off=True)
        self._put_off[microbatch] = deferral
        self.backend.release(self.saved_bytes)
        self.backend.allocate(self.put_off_bytes, f"the weights' part of microbatch {microbatch}")
        return grad_x

    def backward_weight(self, microbatch: int) -> None:
        """Accumulate the gradients that `backward_input` left.

        Numerics:
            the bits of a whole backward, where both parts come in microbatch order.
        """
        deferral = self._put_off.pop(microbatch)
        if deferral is not None:
            deferral.run()
        self.backend.release(self.put_off_bytes)

    @torch.no_grad()
    def evaluate(self, x: Tensor, targets: Tensor | None) -> Tensor:
        """Return the activation, or on the last stage the microbatch's mean loss, holding nothing."""
        out: Tensor = self._run_without_grad(x)
        if not self.is_last:
            return out
        assert targets is not None, "the last stage needs targets"
        return self.stage.loss(out, targets)

    def take_loss(self) -> float | None:
        """Return this replica's share of the step's loss, summed over its microbatches in their order in float64.

        Last stage only; of one replica it is the step's mean loss.
        """
        if not self.is_last:
            return None
        total = 0.0
        for microbatch in sorted(self._losses):
            total += self._losses[microbatch].item()
        self._losses.clear()
        return total / self._num_microbatches

    def held_for_weights(self, microbatch: int) -> int:
        """Return the bytes that a microbatch whose weights' gradients are put off really holds."""
        deferral = self._put_off[microbatch]
        return 0 if deferral is None else deferral.held_bytes

    def _trace(self, x: Tensor, targets: Tensor | None) -> tuple[_Traced, Tensor | None]:
        """Return the recorded forward, and the microbatch's loss on the last stage."""
        leaf = None if self.is_first else x.detach().requires_grad_()
        deferral = Deferral() if self.splits else None
        with deferral.catching() if deferral else nullcontext():
            out: Tensor = self._run(x if leaf is None else leaf)
        if not self.is_last:
            return _Traced(leaf, out, deferral), None
        assert targets is not None, "the last stage needs targets"
        loss = self.stage.loss(out, targets)
        return _Traced(leaf, loss / self._num_microbatches, deferral), loss

    def _backward(
        self, microbatch: int, grad: Tensor | None, *, puts_off: bool
    ) -> tuple[Tensor | None, Deferral | None]:
        held = self._held.pop(microbatch)
        if isinstance(held, _Input):
            self.backend.allocate(self.saved_bytes - self.input_bytes, f"activations of microbatch {microbatch} again")
            held, _ = self._trace(held.x, held.targets)
        if held.deferral is not None:
            held.deferral.puts_off = puts_off
        torch.autograd.backward(held.out, grad)
        assert held.x is None or held.x.grad is not None, "backward reached no input"
        return None if held.x is None else held.x.grad, held.deferral


def _drop(x: Tensor) -> None:
    return None


def _never(packed: object) -> Tensor:
    raise AssertionError("a forward that saved nothing has no backward")
