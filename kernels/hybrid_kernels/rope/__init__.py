"""Rotary position embedding with its gradient, on whatever device its input is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.rope.ref import rope_tables
from hybrid_kernels.selection import implementation

__all__ = ["rope", "rope_tables"]


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, variant: str | None = None) -> Tensor:
    """Return ``x`` with its pair (i, i + D/2) at position s turned; differentiable in ``x``; see `ref.rope`.

    Shapes:
        x: (..., S, D).  cos, sin: (S, D/2), from `rope_tables`.  returns: (..., S, D)

    Raises:
        ValueError: the named variant cannot run here.
    """
    out: Tensor = _Rope.apply(x, cos, sin, variant)  # type: ignore[no-untyped-call]
    return out


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, variant: str | None) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.kernel = implementation("rope", x, variant)
        out: Tensor = ctx.kernel.rope(x, cos, sin)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return ctx.kernel.rope_backward(grad_y, cos, sin), None, None, None
