"""Cross-entropy of the output projection in Triton: a chunk of logits becomes its own gradient in one pass.

May import only torch, triton and this package's own modules.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803 - compile-time constants are in capitals, as everywhere in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.cross_entropy import chunked
from hybrid_kernels.triton_launch import Specimen, handed

BLOCK_ELEMENTS = 4096


@triton.jit
def _rows(logits, labels, losses, vocab, ignore_index, OVERWRITE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * vocab
    label = tl.load(labels + row)
    columns = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(losses + row, 0.0)
        if OVERWRITE:
            for first in range(0, vocab, BLOCK):
                zeros = tl.zeros([BLOCK], dtype=tl.float32).to(logits.dtype.element_ty)
                tl.store(start + first + columns, zeros, mask=first + columns < vocab)
    else:
        label_logit = tl.load(start + label).to(tl.float32)
        # Online: the sum so far is rescaled whenever a larger logit turns up. A NaN spreads through the sum.
        largest, total = -float("inf"), 0.0
        for first in range(0, vocab, BLOCK):
            inside = first + columns < vocab
            x = tl.load(start + first + columns, mask=inside, other=-float("inf")).to(tl.float32)
            larger = tl.maximum(largest, tl.max(x, axis=0))
            total = total * tl.exp(largest - larger) + tl.sum(tl.exp(x - larger), axis=0)
            largest = larger
        logsumexp = largest + tl.log(total)
        tl.store(losses + row, logsumexp - label_logit)
        if OVERWRITE:
            # Every thread must have read the label's logit before any thread overwrites it.
            tl.debug_barrier()
            for first in range(0, vocab, BLOCK):
                inside = first + columns < vocab
                x = tl.load(start + first + columns, mask=inside, other=-float("inf")).to(tl.float32)
                grad = tl.exp(x - logsumexp) - tl.where(first + columns == label, 1.0, 0.0)
                tl.store(start + first + columns, grad.to(logits.dtype.element_ty), mask=inside)


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

    def row_pass(logits: Tensor, chunk_labels: Tensor, overwrite: bool) -> Tensor:
        losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        _rows[(len(logits),)](
            logits, chunk_labels, losses, logits.shape[1], ignore_index, OVERWRITE=overwrite, BLOCK=BLOCK_ELEMENTS
        )
        return losses

    loss, grad_hidden, grad_weight = chunked.cross_entropy_with_gradients(
        handed(hidden),
        handed(weight),
        labels.contiguous(),
        scale=scale,
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        row_pass=row_pass,
    )
    return (
        loss,
        None if grad_hidden is None else grad_hidden.to(hidden.dtype),
        None if grad_weight is None else grad_weight.to(weight.dtype),
    )


SPECIMENS = tuple(
    Specimen(
        name=f"cross_entropy rows {dtype}",
        kernel=_rows,
        signature={
            "logits": f"*{dtype}",
            "labels": "*i64",
            "losses": "*fp32",
            **dict.fromkeys(("vocab", "ignore_index"), "i32"),
        },
        constants={"OVERWRITE": True, "BLOCK": BLOCK_ELEMENTS},
        num_warps=4,
    )
    for dtype in ("bf16", "fp32")
)
