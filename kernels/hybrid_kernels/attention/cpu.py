"""Causal attention on the CPU: torch's own blocked kernel with online softmax; the scores never exist whole.

May import only torch and this package's own modules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.precision import wide_dtype


def attention_with_logsumexp(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """See `ref.attention_with_logsumexp`."""
    if query.numel() == 0:  # the operator divides by the length
        return torch.empty_like(query), query.new_empty(query.shape[:-1], dtype=wide_dtype(query.dtype))
    # Called by name, not through scaled_dot_product_attention: the backward needs the logsumexp.
    out, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, True, scale=scale
    )
    return out, logsumexp


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ref.attention_backward`."""
    if query.numel() == 0:
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, query, key, value, out, logsumexp, 0.0, True, scale=scale
    )
    return grads
