"""What every Triton variant shares: how operands are handed over, and which kernels are compiled ahead of time.

The only file besides the `triton.py` ones that imports triton; imported by those alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Specimen:
    """One kernel at one set of types and constants, to be compiled ahead of time."""

    name: str
    kernel: Any
    signature: dict[str, str]
    """Triton's type of each argument that is not a constant, in order: `*bf16`, `i32`, `fp32`, …"""
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4


def interpreting() -> bool:
    """Return whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when Triton was imported)."""
    return bool(triton.knobs.runtime.interpret)


def handed(x: Tensor) -> Tensor:
    """Return `x` as a kernel may read it: contiguous, and never bfloat16 in the interpreter.

    Triton 3.7's interpreter is silently wrong for bfloat16 (a product multiplies raw bits, a cast truncates):
    it gets the same values in float32. Can go when a release rounds and multiplies bfloat16 there.
    """
    return x.contiguous().float() if interpreting() and x.dtype == torch.bfloat16 else x.contiguous()


def result_like(x: Tensor) -> Tensor:
    """Return an uninitialised tensor of the shape of `x` that a kernel may write; see `handed`."""
    dtype = torch.float32 if interpreting() and x.dtype == torch.bfloat16 else x.dtype
    return torch.empty(x.shape, dtype=dtype, device=x.device)
