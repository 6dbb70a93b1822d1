"""The chunked walk over the tokens that the fast variants of cross-entropy share: the logits never exist whole.

A chunk's logits are computed, turned into their own gradient in place, and used at once for the gradients
of the hidden states and of the weights. What differs between devices, the pass over a chunk's rows, comes in as a
function. May import only torch and this package's own modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hybrid_kernels.precision import wide_dtype

CHUNK_BYTES = 64 << 20
"""Size of a chunk of logits: large enough that the matrix products run at full speed."""

RowPass = Callable[[Tensor, Tensor, bool], Tensor]
"""(logits (C, V), labels (C,), whether to overwrite) -> losses (C,); overwrites logits with softmax - one_hot."""


def cross_entropy_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    scale: float,
    needs_hidden: bool,
    needs_weight: bool,
    row_pass: RowPass,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss and the gradients that are needed; see `ref.cross_entropy_with_gradients`.

    Shapes:
        hidden: (N, H).  weight: (V, H).  labels: (N,).  returns: (), (N, H) or None, (V, H) or None

    Numerics:
        A chunk's logits and their gradient are rounded to the format of ``hidden``, as a plain projection
        would. The weights' gradient is rounded to its own format once a chunk, not once in all.
    """
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {weight.dtype}; give both in one format")
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if needs_hidden else None
    grad_weight = torch.zeros_like(weight) if needs_weight else None
    loss = torch.zeros((), dtype=wide_dtype(hidden.dtype), device=hidden.device)
    buffer: Tensor | None = None
    for chunk in chunks(len(hidden), weight.shape[0] * hidden.element_size()):
        if buffer is None:
            buffer = hidden.new_empty(chunk.stop, weight.shape[0])
        rows = hidden[chunk]
        logits = torch.mm(rows, weight.T, out=buffer[: len(rows)])
        loss += row_pass(logits, labels[chunk], needs_hidden or needs_weight).sum()
        if grad_hidden is not None:
            torch.addmm(grad_hidden[chunk], logits, weight, beta=0, alpha=scale, out=grad_hidden[chunk])
        if grad_weight is not None:
            grad_weight.addmm_(logits.T, rows, alpha=scale)
    return loss * scale, grad_hidden, grad_weight


def chunks(num_tokens: int, row_bytes: int) -> Iterator[slice]:
    """Yield slices that cover the tokens in order, even in size and each about `CHUNK_BYTES` of logits."""
    most = max(1, CHUNK_BYTES // max(1, row_bytes))
    num_chunks = -(-num_tokens // most)
    step = -(-num_tokens // max(1, num_chunks))
    for start in range(0, num_tokens, max(1, step)):
        yield slice(start, min(start + step, num_tokens))
