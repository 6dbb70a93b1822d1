"""Sum of the chunks that several ranks sent, slow and obvious: float32, in rank order.

May import only torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reduce_add(chunks: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """Return ``((chunks[0] + chunks[1]) + chunks[2]) + ...``, each widened to float32 first.

    The order is the contract: float32 addition is not associative, and every rank must hold the same bits.
    Every variant gives the very bits of this one.

    Args:
        chunks: one a rank, at least one, in rank order; float32, bfloat16 or float16, all of one format.
        out: written and returned, if given; float32, and none of the chunks.

    Shapes:
        chunks: P times (N,).  out: (N,).  returns: (N,), float32 (float64 for float64)

    Numerics:
        P - 1 float32 additions an element. NaN and infinities pass through.
    """
    dtype = torch.float64 if chunks[0].dtype == torch.float64 else torch.float32
    total = chunks[0].to(dtype, copy=True)
    for chunk in chunks[1:]:
        total += chunk.to(dtype)
    return total if out is None else out.copy_(total)
