"""One AdamW update of a shard in place, in one pass, on whatever device it is."""

from __future__ import annotations

from torch import Tensor

from hybrid_kernels.selection import implementation


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
    variant: str | None = None,
) -> None:
    """Update the parameter and its two moments in place; the arguments are those of `ref.adamw`.

    Shapes:
        param, grad, exp_avg, exp_avg_sq: (N,), contiguous; all but `grad` in one format

    Raises:
        ValueError: the named variant cannot run here.
    """
    implementation("adamw", param, variant).adamw_(
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
