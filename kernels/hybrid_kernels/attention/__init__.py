"""Causal grouped-query attention with its gradient, on whatever device its input is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.selection import implementation


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | None = None, variant: str | None = None
) -> Tensor:
    """Return causal attention; differentiable in all three; see `ref.attention`.

    Args:
        query: Q heads.
        key: K heads; Q is a multiple of K.
        value: as many heads as `key`.
        scale: multiplies the scores; ``1 / sqrt(D)`` if None.
        variant: the variant to run, instead of the device's own.

    Shapes:
        query: (B, Q, S, D).  key: (B, K, S, D).  value: (B, K, S, D).  returns: (B, Q, S, D)

    Raises:
        ValueError: heads that do not divide, or the named variant cannot run here.
    """
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"{query.shape[1]} query heads are not a multiple of {key.shape[1]} key-value heads")
    if scale is None:
        scale = query.shape[-1] ** -0.5
    out: Tensor = _Attention.apply(query, key, value, scale, variant)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, variant: str | None) -> Tensor:
        ctx.scale, ctx.kernel = scale, implementation("attention", query, variant)
        out: Tensor
        out, logsumexp = ctx.kernel.attention_with_logsumexp(query, key, value, scale=scale)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.kernel.attention_backward(grad_out, *ctx.saved_tensors, scale=ctx.scale)
        return *grads, None, None
