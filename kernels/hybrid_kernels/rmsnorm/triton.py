"""RMSNorm in Triton: a row a program forward, a fixed set of rows a program backward.

May import only torch, triton and this package's own modules.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803 - compile-time constants are in capitals, as everywhere in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.triton_launch import Specimen, handed, result_like

NUM_PROGRAMS = 256
"""Programs of the backward: fixed, so that the weights' gradient is summed in the same order on every GPU."""


@triton.jit
def _forward(x, weight, y, size, eps, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < size
    values = tl.load(x + row * size + columns, mask=inside, other=0.0).to(tl.float32)
    inverse_rms = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / size + eps)
    scaled = values * inverse_rms * tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * size + columns, scaled.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad_y, x, weight, grad_x, partial, num_rows, size, eps, BLOCK: tl.constexpr):
    program, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < size
    scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(program, num_rows, tl.num_programs(0)):
        start = row * size
        values = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_y + start + columns, mask=inside, other=0.0).to(tl.float32)
        inverse_rms = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / size + eps)
        x_hat = values * inverse_rms
        grad_weight += grad * x_hat
        grad_x_hat = grad * scale
        along = tl.sum(grad_x_hat * x_hat, axis=0) / size
        out = (grad_x_hat - x_hat * along) * inverse_rms
        tl.store(grad_x + start + columns, out.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(partial + program * size + columns, grad_weight, mask=inside)


def rmsnorm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """See `ref.rmsnorm`."""
    size, y = x.shape[-1], result_like(x)
    if x.numel():
        block = triton.next_power_of_2(size)
        _forward[(x.numel() // size,)](handed(x), handed(weight), y, size, eps, BLOCK=block, num_warps=_warps(block))
    return y.to(x.dtype)


def rmsnorm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """See `ref.rmsnorm_backward`."""
    size, grad_x = x.shape[-1], result_like(x)
    num_rows = x.numel() // size
    programs = min(NUM_PROGRAMS, num_rows)
    partial = torch.empty(programs, size, dtype=torch.float32, device=x.device)
    if programs:
        block = triton.next_power_of_2(size)
        operands = (handed(grad_y), handed(x), handed(weight))
        _backward[(programs,)](*operands, grad_x, partial, num_rows, size, eps, BLOCK=block, num_warps=_warps(block))
    return grad_x.to(x.dtype), partial.sum(dim=0).to(weight.dtype)


def _warps(block: int) -> int:
    """Return the warps of a program: enough that a row fits in its registers."""
    return min(16, max(4, block // 512))


SPECIMENS = (
    Specimen(
        name="rmsnorm forward bf16 D=4096",
        kernel=_forward,
        signature={"x": "*bf16", "weight": "*bf16", "y": "*bf16", "size": "i32", "eps": "fp32"},
        constants={"BLOCK": 4096},
        num_warps=_warps(4096),
    ),
    Specimen(
        name="rmsnorm backward bf16 D=4096",
        kernel=_backward,
        signature={
            **dict.fromkeys(("grad_y", "x", "weight", "grad_x"), "*bf16"),
            "partial": "*fp32",
            **dict.fromkeys(("num_rows", "size"), "i32"),
            "eps": "fp32",
        },
        constants={"BLOCK": 4096},
        num_warps=_warps(4096),
    ),
)
