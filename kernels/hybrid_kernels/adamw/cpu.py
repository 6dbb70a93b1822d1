"""AdamW on the CPU: torch's own fused update, tile by tile where the gradient must be scaled or widened first.

May import only torch and this package's own modules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.tiles import tiles


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
    """See `ref.adamw_`."""
    # The operator corrects the bias by the step it is given; it does not count.
    steps = [torch.tensor(float(step))]
    as_it_is = grad.dtype == param.dtype and grad_scale == 1.0
    for tile in [slice(None)] if as_it_is else tiles(len(param)):
        grad_tile = grad[tile] if as_it_is else grad[tile].to(param.dtype, copy=True).mul_(grad_scale)
        torch._fused_adamw_(
            [param[tile]],
            [grad_tile],
            [exp_avg[tile]],
            [exp_avg_sq[tile]],
            [],
            steps,
            lr=learning_rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
