"""One AdamW update of a shard, slow and obvious.

May import only torch.
"""

from __future__ import annotations

import math

from torch import Tensor


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parameter and its two moments after step number `step` (from 1); nothing is modified.

    Args:
        param: master weights, float32 or float64.
        grad: gradient in any float format.
        exp_avg: first moment, in the format of `param`.
        exp_avg_sq: second moment, in the format of `param`.
        step: number of this update, counted from 1; corrects the moments' bias.
        learning_rate: of this step.
        beta1: share of the first moment that is kept.
        beta2: share of the second moment that is kept.
        eps: added to the root of the corrected second moment.
        weight_decay: decoupled: ``param -= learning_rate * weight_decay * param`` before the update.
        grad_scale: multiplies the gradient before use; the clipping factor.

    Shapes:
        all: (N,).  returns: three times (N,)

    Numerics:
        In the format of `param`. A NaN or infinite gradient reaches its own element only; the caller checks
        the gradient's norm first.

    Source:
        Loshchilov and Hutter 2019, "Decoupled weight decay regularization"; the order of operations is that
        of torch.optim.AdamW.
    """
    grad_wide = grad.to(param.dtype) * grad_scale
    decayed = param * (1.0 - learning_rate * weight_decay)
    new_avg = exp_avg + (grad_wide - exp_avg) * (1.0 - beta1)
    new_avg_sq = exp_avg_sq * beta2 + grad_wide * grad_wide * (1.0 - beta2)
    step_size = learning_rate / (1.0 - beta1**step)
    denominator = new_avg_sq.sqrt() / math.sqrt(1.0 - beta2**step) + eps
    return decayed - step_size * new_avg / denominator, new_avg, new_avg_sq


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """Update the parameter and its two moments in place; see `adamw`."""
    new = adamw(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        step=step,
        learning_rate=learning_rate,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        grad_scale=grad_scale,
    )
    for old, value in zip((param, exp_avg, exp_avg_sq), new, strict=True):
        old.copy_(value)
