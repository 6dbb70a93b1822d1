"""Cross-entropy fused with the output projection, with its gradient, on whatever device its input is."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.selection import implementation

IGNORE_INDEX = -100
"""Label of a token that has no loss; torch's own."""


def cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = IGNORE_INDEX,
    scale: float | None = None,
    variant: str | None = None,
) -> Tensor:
    """Return ``scale * sum(cross-entropy of softmax(hidden @ weight.T))``; differentiable in the first two.

    The gradients are made in the forward, while a chunk of logits is at hand, and handed over by the
    backward. A second backward through a retained graph makes them again.

    Args:
        hidden: last hidden states, after the final norm.
        weight: of the output projection, in the format of `hidden`.
        labels: integers in [0, V), or `ignore_index`.
        ignore_index: label of a token that has no loss.
        scale: multiplies the sum; None divides by the number of labels that count. With none that counts the
            loss is 0, where torch's mean is NaN: an empty microbatch adds nothing.
        variant: the variant to run, instead of the device's own.

    Shapes:
        hidden: (N, H).  weight: (V, H).  labels: (N,).  returns: (), float32 (float64 for float64)

    Raises:
        ValueError: the named variant cannot run here, or the formats differ.
    """
    if scale is None:
        scale = 1.0 / max(1, int((labels != ignore_index).sum()))
    # Inside the function gradients are always off, so whether any is wanted must be asked here.
    wanted = tuple(torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    loss: Tensor = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, ignore_index, scale, variant, wanted
    )
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ignore_index: int,
        scale: float,
        variant: str | None,
        wanted: tuple[bool, bool],
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, labels)
        kernel = implementation("cross_entropy", hidden, variant)
        ctx.compute = partial(
            kernel.cross_entropy_with_gradients,
            ignore_index=ignore_index,
            scale=scale,
            needs_hidden=wanted[0],
            needs_weight=wanted[1],
        )
        loss: Tensor
        loss, *ctx.grads = ctx.compute(hidden, weight, labels)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        # Held by the context and handed over, not saved: a second copy of the weights' gradient is what this
        # kernel is there to avoid.
        operands = ctx.saved_tensors
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            _, *grads = ctx.compute(*operands)
        # Reading the number is free on a CPU and a synchronisation elsewhere.
        if grad_loss.device.type != "cpu" or grad_loss.item() != 1.0:
            for grad in grads:
                if grad is not None:
                    grad.mul_(grad_loss)
        return *grads, None, None, None, None, None
