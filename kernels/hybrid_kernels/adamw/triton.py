"""AdamW in Triton: one pass over the shard, everything in place.

May import only torch, triton and this package's own modules.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803 - compile-time constants are in capitals, as everywhere in Triton

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.triton_launch import Specimen, handed

BLOCK_ELEMENTS = 1024


@triton.jit
def _update(
    param, grad, exp_avg, exp_avg_sq, size, grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2,
    step_size, root_correction, eps, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    g = tl.load(grad + index, mask=inside, other=0.0).to(tl.float32) * grad_scale
    p = tl.load(param + index, mask=inside, other=0.0) * decay
    first = tl.load(exp_avg + index, mask=inside, other=0.0)
    first += (g - first) * one_minus_beta1
    second = tl.load(exp_avg_sq + index, mask=inside, other=0.0) * beta2 + g * g * one_minus_beta2
    p -= step_size * first / (tl.sqrt(second) / root_correction + eps)
    tl.store(param + index, p, mask=inside)
    tl.store(exp_avg + index, first, mask=inside)
    tl.store(exp_avg_sq + index, second, mask=inside)


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
) -> None:
    """See `ref.adamw_`."""
    if any(x.dtype != torch.float32 or not x.is_contiguous() for x in (param, exp_avg, exp_avg_sq)):
        raise ValueError("the master weights and their moments must be contiguous float32")
    size = param.numel()
    if size:
        _update[(triton.cdiv(size, BLOCK_ELEMENTS),)](
            param,
            handed(grad),
            exp_avg,
            exp_avg_sq,
            size,
            float(grad_scale),
            1.0 - learning_rate * weight_decay,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            learning_rate / (1.0 - beta1**step),
            math.sqrt(1.0 - beta2**step),
            eps,
            BLOCK=BLOCK_ELEMENTS,
        )


_SCALARS = (
    "grad_scale", "decay", "one_minus_beta1", "beta2", "one_minus_beta2", "step_size", "root_correction", "eps"
)  # fmt: skip
SPECIMENS = (
    Specimen(
        name="adamw fp32 state, bf16 gradient",
        kernel=_update,
        signature={
            "param": "*fp32",
            "grad": "*bf16",
            "exp_avg": "*fp32",
            "exp_avg_sq": "*fp32",
            "size": "i32",
            **dict.fromkeys(_SCALARS, "fp32"),
        },
        constants={"BLOCK": BLOCK_ELEMENTS},
    ),
)
