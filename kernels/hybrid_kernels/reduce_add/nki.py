"""Sum of the chunks of several ranks on a NeuronCore: float32, in rank order, so the reference's very bits.

Letters: P ranks, N elements. May import only nki and torch; written for NKI 0.6. Executed only by an interpreter of a
documented NKI subset, never on a Trainium.
"""

from __future__ import annotations

from collections.abc import Sequence

import nki
import nki.isa as nisa
import nki.language as nl
import torch
from torch import Tensor

FREE = 2048
"""Elements a partition that one instruction takes: 8 KiB in float32."""


def reduce_add(chunks: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """Return `((chunks[0] + chunks[1]) + ...)` in float32; see `ref.reduce_add`."""
    if chunks[0].numel() == 0:
        return torch.empty(0, device=chunks[0].device) if out is None else out
    total: Tensor = reduce_add_kernel(torch.stack(list(chunks)))
    return total if out is None else out.copy_(total)


@nki.jit  # type: ignore[untyped-decorator]
def reduce_add_kernel(chunks: nl.NkiTensor) -> nl.NkiTensor:
    """Return the sum over the first dimension, in order: chunks (P, N), returns (N,) in float32."""
    num_ranks, num_elements = chunks.shape
    pmax = nl.tile_size.pmax
    total = nl.ndarray((num_elements,), dtype=nl.float32, buffer=nl.shared_hbm)
    first = 0
    while first < num_elements:
        # Whole partitions of FREE elements while they last, then one partition with the rest.
        rows = min(pmax, (num_elements - first) // FREE)
        free = FREE if rows > 0 else num_elements - first
        rows = max(rows, 1)
        size = rows * free
        running = nl.ndarray((rows, free), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=running, src=chunks[0, first : first + size])
        for rank in range(1, num_ranks):
            chunk = nl.ndarray((rows, free), dtype=chunks.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=chunk, src=chunks[rank, first : first + size])
            nisa.tensor_tensor(dst=running, data1=running, data2=chunk, op=nl.add)
        nisa.dma_copy(dst=total[first : first + size], src=running)
        first += size
    return total
