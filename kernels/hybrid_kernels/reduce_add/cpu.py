"""Sum of the ranks' chunks on the CPU: all of them tile by tile, so that the running sum stays in cache.

May import only torch and this package's own modules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid_kernels.precision import wide_dtype
from hybrid_kernels.tiles import tiles


def reduce_add(chunks: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """See `ref.reduce_add`; the same bits."""
    total = torch.empty(chunks[0].shape, dtype=wide_dtype(chunks[0].dtype)) if out is None else out
    for tile in tiles(len(total)):
        part = total[tile].copy_(chunks[0][tile])
        for chunk in chunks[1:]:
            part += chunk[tile].to(part.dtype)  # many times faster than adding two formats
    return total
