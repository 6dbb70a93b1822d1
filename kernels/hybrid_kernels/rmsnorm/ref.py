"""RMSNorm, slow and obvious: the definition that every other variant is compared with.

Letters: D features. May import only torch and `precision`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.precision import wide


def rmsnorm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight``, in the format of ``x``.

    Shapes:
        x: (..., D).  weight: (D,).  returns: (..., D)

    Numerics:
        Computed in float32 (float64 for float64); rounded once, after the product with the weight.
        A row with a NaN or an infinity gives NaN or zero in that row only.

    Source:
        Zhang and Sennrich 2019, "Root mean square layer normalization".
    """
    x_wide = wide(x)
    inverse_rms = torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
    return (x_wide * inverse_rms * wide(weight)).to(x.dtype)


def rmsnorm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` and of ``weight``.

    Shapes:
        grad_y: (..., D).  x: (..., D).  weight: (D,).  returns: (..., D) and (D,)

    Numerics:
        As the forward; the weight's gradient is summed over all rows in the wide format.
    """
    x_wide, grad_wide = wide(x), wide(grad_y)
    inverse_rms = torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
    x_hat = x_wide * inverse_rms
    grad_x_hat = grad_wide * wide(weight)
    grad_x = (grad_x_hat - x_hat * (grad_x_hat * x_hat).mean(dim=-1, keepdim=True)) * inverse_rms
    grad_weight = (grad_wide * x_hat).reshape(-1, x.shape[-1]).sum(dim=0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)
