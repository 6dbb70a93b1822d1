"""RMSNorm with its gradient, on whatever device its input is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.selection import implementation


def rmsnorm(x: Tensor, weight: Tensor, *, eps: float, variant: str | None = None) -> Tensor:
    """Return ``x / sqrt(mean(x^2) + eps) * weight``; differentiable in ``x`` and ``weight``; see `ref.rmsnorm`.

    Shapes:
        x: (..., D).  weight: (D,).  returns: (..., D)

    Raises:
        ValueError: the named variant cannot run here.
    """
    out: Tensor = _RMSNorm.apply(x, weight, eps, variant)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, variant: str | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.kernel = eps, implementation("rmsnorm", x, variant)
        out: Tensor = ctx.kernel.rmsnorm(x, weight, eps=eps)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = ctx.kernel.rmsnorm_backward(grad_y, x, weight, eps=ctx.eps)
        return grad_x, grad_weight, None, None
