"""SwiGLU's gate with its gradient, on whatever device its input is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.selection import implementation


def swiglu(gate: Tensor, up: Tensor, *, variant: str | None = None) -> Tensor:
    """Return ``silu(gate) * up``; differentiable in both; see `ref.swiglu`.

    Shapes:
        gate: any.  up: the same.  returns: the same

    Raises:
        ValueError: the named variant cannot run here.
    """
    out: Tensor = _SwiGLU.apply(gate, up, variant)  # type: ignore[no-untyped-call]
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, variant: str | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kernel = implementation("swiglu", gate, variant)
        out: Tensor = ctx.kernel.swiglu(gate, up)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = ctx.kernel.swiglu_backward(grad_y, gate, up)
        return grad_gate, grad_up, None
