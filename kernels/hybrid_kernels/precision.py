"""In which format a kernel computes: float64 stays, everything narrower is widened to float32.

Every variant of every kernel keeps to this rule: operands are widened element by element, sums are taken
in the wide format, and only the result is narrowed. May import only torch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """Return `x` in the format that kernels compute in: float64 as it is, anything else as float32."""
    return x if x.dtype == torch.float64 else x.float()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the format that kernels compute in for operands of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32
