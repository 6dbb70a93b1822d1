"""Cross-entropy over logits whose vocabulary is spread over the ranks of an axis. May import torch and `axis`."""

# ruff: noqa: N803 - the capitals at the end of a name are its dims: B samples, T tokens, V vocabulary of one rank
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid.models.axis import Axis


def sharded_loss(logits_BTV: Tensor, targets: Tensor, axis: Axis) -> Tensor:
    """Return the microbatch's mean cross-entropy over logits that are spread over the ranks; the same on all of them.

    Shapes:
        logits_BTV: (B, T, V) of this rank.  targets: (B, T) int64, of the whole vocabulary.  returns: ().

    Cost:
        3 numbers a token and rank on the wire; the logits stay where they are.

    Numerics:
        float32 (float64 for float64). The largest logit of all ranks is subtracted; the ranks' sums of exponentials are
        added by the axis.
    """
    wide = logits_BTV if logits_BTV.dtype == torch.float64 else logits_BTV.float()
    labels = targets.to(logits_BTV.device).flatten()
    loss: Tensor = _CrossEntropy.apply(wide.flatten(0, 1), labels, axis)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, axis: Axis) -> Tensor:
        largest = logits.detach().amax(1)
        all_largest = [torch.empty_like(largest) for _ in range(axis.size)]
        axis.all_gather(all_largest, largest)
        shifted = logits - torch.stack(all_largest).amax(0)[:, None]
        own = labels - axis.rank * logits.shape[1]
        absent = (own < 0) | (own >= logits.shape[1])
        own = own.masked_fill(absent, 0)[:, None]
        label_logits = shifted.gather(1, own)[:, 0].masked_fill(absent, 0.0)
        exponentials = shifted.exp_()
        shared = torch.stack((exponentials.sum(1), label_logits))
        axis.all_reduce(shared)
        ctx.save_for_backward(exponentials.mul_(shared[0].reciprocal()[:, None]), own, absent)
        return (shared[0].log() - shared[1]).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        probabilities, own, absent = ctx.saved_tensors
        one_hot = (~absent).to(probabilities.dtype)[:, None]
        grad_logits = probabilities.scatter_add(1, own, -one_hot).mul_(grad / len(own))
        return grad_logits, None, None
