"""Sum of the ranks' chunks in Triton: up to four chunks a launch, added in rank order.

May import only torch, triton and this package's own modules.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803 - compile-time constants are in capitals, as everywhere in Triton

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.triton_launch import Specimen, handed

BLOCK_ELEMENTS = 1024
CHUNKS_OF_LAUNCH = 4


@triton.jit
def _add(total, a, b, c, d, size, FIRST: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    running = tl.load(a + index, mask=inside, other=0.0).to(tl.float32)
    if not FIRST:
        running = tl.load(total + index, mask=inside, other=0.0) + running
    if COUNT > 1:
        running += tl.load(b + index, mask=inside, other=0.0).to(tl.float32)
    if COUNT > 2:
        running += tl.load(c + index, mask=inside, other=0.0).to(tl.float32)
    if COUNT > 3:
        running += tl.load(d + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + index, running, mask=inside)


def reduce_add(chunks: Sequence[Tensor], *, out: Tensor | None = None) -> Tensor:
    """See `ref.reduce_add`; the same bits."""
    size = chunks[0].numel()
    total = torch.empty(size, dtype=torch.float32, device=chunks[0].device) if out is None else out
    for start in range(0, len(chunks) if size else 0, CHUNKS_OF_LAUNCH):
        part = [handed(chunk) for chunk in chunks[start : start + CHUNKS_OF_LAUNCH]]
        count = len(part)
        part += part[:1] * (CHUNKS_OF_LAUNCH - count)
        grid = (triton.cdiv(size, BLOCK_ELEMENTS),)
        _add[grid](total, *part, size, FIRST=start == 0, COUNT=count, BLOCK=BLOCK_ELEMENTS)
    return total


SPECIMENS = (
    Specimen(
        name="reduce_add 4 chunks bf16",
        kernel=_add,
        signature={"total": "*fp32", **dict.fromkeys("abcd", "*bf16"), "size": "i32"},
        constants={"FIRST": False, "COUNT": 4, "BLOCK": BLOCK_ELEMENTS},
    ),
)
