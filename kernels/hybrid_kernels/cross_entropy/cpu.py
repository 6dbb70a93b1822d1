"""Cross-entropy of the output projection on the CPU: chunks of logits, each passed over tile by tile in cache.

May import only torch and this package's own modules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.cross_entropy import chunked
from hybrid_kernels.precision import wide_dtype
from hybrid_kernels.tiles import tiles


def cross_entropy_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    scale: float,
    needs_hidden: bool = True,
    needs_weight: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """See `ref.cross_entropy_with_gradients` and `chunked.cross_entropy_with_gradients`."""
    kept = labels != ignore_index
    every = bool(kept.all())
    # Ignored tokens are left out, not masked: they cost no product.
    loss, grad_kept, grad_weight = chunked.cross_entropy_with_gradients(
        hidden if every else hidden[kept],
        weight,
        (labels if every else labels[kept]).long(),
        scale=scale,
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        row_pass=_softmax_rows,
    )
    if every or grad_kept is None:
        return loss, grad_kept, grad_weight
    grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype)
    grad_hidden[kept] = grad_kept
    return loss, grad_hidden, grad_weight


def _softmax_rows(logits: Tensor, labels: Tensor, overwrite: bool) -> Tensor:
    """Return each row's loss, and make the row its own gradient; see `chunked.RowPass`."""
    dtype = wide_dtype(logits.dtype)
    losses = torch.empty(len(logits), dtype=dtype)
    scratch: Tensor | None = None
    for tile in tiles(*logits.shape):
        if scratch is None and logits.dtype != dtype:
            scratch = torch.empty(tile.stop, logits.shape[1], dtype=dtype)
        narrow, label = logits[tile], labels[tile, None]
        values = narrow if scratch is None else scratch[: len(narrow)].copy_(narrow)
        # Label logits are taken now: `values` is about to be overwritten.
        label_logits, largest = values.gather(1, label), values.amax(dim=1, keepdim=True)
        sums = values.sub_(largest).exp_().sum(dim=1, keepdim=True)
        log_probability = label_logits - largest - sums.log()
        losses[tile] = -log_probability[:, 0]
        if overwrite:
            narrow.copy_(values.mul_(sums.reciprocal()))
            narrow.scatter_(1, label, log_probability.expm1().to(narrow.dtype))
    return losses
