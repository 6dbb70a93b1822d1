"""Rotary position embedding in Triton: a few rows a program, both halves of a head at once.

May import only torch, triton and this package's own modules.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803 - compile-time constants are in capitals, as everywhere in Triton

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.triton_launch import Specimen, handed, result_like

TILE_ELEMENTS = 1024


@triton.jit
def _turn(x, cos, sin, y, num_rows, length, half, direction, ROWS: tl.constexpr, HALF: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    pairs = tl.arange(0, HALF)[None, :]
    inside = (rows < num_rows) & (pairs < half)
    first = tl.load(x + rows * 2 * half + pairs, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x + rows * 2 * half + half + pairs, mask=inside, other=0.0).to(tl.float32)
    angle = (rows % length) * half + pairs
    cosine = tl.load(cos + angle, mask=inside, other=0.0)
    sine = tl.load(sin + angle, mask=inside, other=0.0) * direction
    left, right = first * cosine - second * sine, second * cosine + first * sine
    tl.store(y + rows * 2 * half + pairs, left.to(y.dtype.element_ty), mask=inside)
    tl.store(y + rows * 2 * half + half + pairs, right.to(y.dtype.element_ty), mask=inside)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ref.rope`."""
    return _launch(x, cos, sin, 1.0)


def rope_backward(grad_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ref.rope_backward`."""
    return _launch(grad_y, cos, sin, -1.0)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    y = result_like(x)
    if x.numel():
        length, size = x.shape[-2:]
        num_rows, block = x.numel() // size, triton.next_power_of_2(size // 2)
        rows = max(1, TILE_ELEMENTS // block)
        tables = (cos.float().contiguous(), sin.float().contiguous())
        _turn[(triton.cdiv(num_rows, rows),)](
            handed(x), *tables, y, num_rows, length, size // 2, direction, ROWS=rows, HALF=block
        )
    return y.to(x.dtype)


SPECIMENS = (
    Specimen(
        name="rope bf16 D=128",
        kernel=_turn,
        signature={
            "x": "*bf16",
            "cos": "*fp32",
            "sin": "*fp32",
            "y": "*bf16",
            **dict.fromkeys(("num_rows", "length", "half"), "i32"),
            "direction": "fp32",
        },
        constants={"ROWS": 16, "HALF": 64},
    ),
)
