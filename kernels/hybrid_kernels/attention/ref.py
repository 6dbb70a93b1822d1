"""Causal grouped-query attention, slow and obvious: here the scores do exist whole.

Letters: B batch, Q query heads, K key-value heads (Q is a multiple of K), S positions, D head size. Query
head q reads key-value head q // (Q/K). May import only torch and `precision`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.precision import wide


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Return ``softmax(scale * query @ key.T, over the positions up to one's own) @ value``.

    Shapes:
        query: (B, Q, S, D).  key: (B, K, S, D).  value: (B, K, S, D).  returns: (B, Q, S, D)

    Numerics:
        Computed in float32 (float64 for float64), rounded once to the format of ``query``. A NaN in a query
        stays in its row and one in a key reaches the rows from its position on; a NaN or inf in a value reaches
        at least those, and may reach the rows before (a weight of zero times NaN is NaN).
    """
    return attention_with_logsumexp(query, key, value, scale=scale)[0]


def attention_with_logsumexp(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Return the attention and, for its backward, the logsumexp of each row of scores in the wide format.

    Shapes:
        query: (B, Q, S, D).  key, value: (B, K, S, D).  returns: (B, Q, S, D) and (B, Q, S)
    """
    scores, _, _, value_wide = _scores(query, key, value, scale)
    return (torch.softmax(scores, dim=-1) @ value_wide).to(query.dtype), torch.logsumexp(scores, dim=-1)


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None = None,
    logsumexp: Tensor | None = None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``query``, ``key`` and ``value``.

    Args:
        grad_out: gradient of the attention.
        query: as given to the forward.
        key: as given to the forward.
        value: as given to the forward.
        out: what the forward returned; spares faster variants a second forward, not used here.
        logsumexp: the same.
        scale: as given to the forward.

    Shapes:
        grad_out, query, out: (B, Q, S, D).  key, value: (B, K, S, D).  logsumexp: (B, Q, S).
        returns: as query, key and value
    """
    scores, query_wide, key_wide, value_wide = _scores(query, key, value, scale)
    weights = torch.softmax(scores, dim=-1)
    grad_wide = wide(grad_out)
    grad_weights = grad_wide @ value_wide.mT
    row_sums = (grad_weights * weights).sum(dim=-1, keepdim=True)
    grad_scores = weights * (grad_weights - row_sums) * scale
    grad_query = grad_scores @ key_wide
    grad_key = _sum_groups(grad_scores.mT @ query_wide, key.shape[1])
    grad_value = _sum_groups(weights.mT @ grad_wide, key.shape[1])
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def _scores(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scores (B, Q, S, S) and the widened operands, key and value with a head a query head."""
    group = query.shape[1] // key.shape[1]
    query_wide = wide(query)
    key_wide, value_wide = (wide(x).repeat_interleave(group, dim=1) for x in (key, value))
    length = query.shape[2]
    later = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(diagonal=1)
    scores = (query_wide @ key_wide.mT * scale).masked_fill(later, float("-inf"))
    return scores, query_wide, key_wide, value_wide


def _sum_groups(x: Tensor, num_kv_heads: int) -> Tensor:
    """Return (B, Q, S, D) summed over the query heads of each key-value head: (B, K, S, D)."""
    return x.view(x.shape[0], num_kv_heads, x.shape[1] // num_kv_heads, *x.shape[2:]).sum(dim=2)
