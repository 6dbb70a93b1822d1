"""SwiGLU's gate in Triton, element by element.

May import only torch, triton and this package's own modules.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803 - compile-time constants are in capitals, as everywhere in Triton

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.triton_launch import Specimen, handed, result_like

BLOCK_ELEMENTS = 1024


@triton.jit
def _sigmoid(x):
    # exp of a non-positive number only: nothing overflows, whatever the sign.
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _forward(gate, up, y, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    x = tl.load(gate + index, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + index, (x * _sigmoid(x) * other).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad_y, gate, up, grad_gate, grad_up, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    grad = tl.load(grad_y + index, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(gate + index, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + index, mask=inside, other=0.0).to(tl.float32)
    sigmoid = _sigmoid(x)
    slope = sigmoid * (1.0 + x * (1.0 - sigmoid))
    tl.store(grad_gate + index, (grad * other * slope).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + index, (grad * x * sigmoid).to(grad_up.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `ref.swiglu`."""
    y, size = result_like(gate), gate.numel()
    if size:
        _forward[(triton.cdiv(size, BLOCK_ELEMENTS),)](handed(gate), handed(up), y, size, BLOCK=BLOCK_ELEMENTS)
    return y.to(gate.dtype)


def swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See `ref.swiglu_backward`."""
    grad_gate, grad_up, size = result_like(gate), result_like(up), gate.numel()
    if size:
        operands = (handed(grad_y), handed(gate), handed(up))
        _backward[(triton.cdiv(size, BLOCK_ELEMENTS),)](*operands, grad_gate, grad_up, size, BLOCK=BLOCK_ELEMENTS)
    return grad_gate.to(gate.dtype), grad_up.to(up.dtype)


SPECIMENS = (
    Specimen(
        name="swiglu forward bf16",
        kernel=_forward,
        signature={**dict.fromkeys(("gate", "up", "y"), "*bf16"), "size": "i32"},
        constants={"BLOCK": BLOCK_ELEMENTS},
    ),
    Specimen(
        name="swiglu backward bf16",
        kernel=_backward,
        signature={**dict.fromkeys(("grad_y", "gate", "up", "grad_gate", "grad_up"), "*bf16"), "size": "i32"},
        constants={"BLOCK": BLOCK_ELEMENTS},
    ),
)
