"""Rotary position embedding on the CPU: written straight into the result, tile by tile where it must be widened.

May import only torch and this package's own modules.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybrid_kernels.precision import wide_dtype
from hybrid_kernels.tiles import tiles


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ref.rope`."""
    return _turn(x, cos, sin, direction=1)


def rope_backward(grad_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `ref.rope_backward`."""
    return _turn(grad_y, cos, sin, direction=-1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, direction: int) -> Tensor:
    length, size = x.shape[-2:]
    half = size // 2
    out = torch.empty(x.shape, dtype=x.dtype)
    shape = (math.prod(x.shape[:-2]), length, size)  # -1 is ambiguous where a dim is 0
    planes, out_planes = x.reshape(shape), out.view(shape)
    narrow = x.dtype != wide_dtype(x.dtype)
    for tile in tiles(len(planes), length * size):
        source = planes[tile].float() if narrow else planes[tile]
        target = torch.empty_like(source) if narrow else out_planes[tile]
        first, second = source[..., :half], source[..., half:]
        torch.mul(first, cos, out=target[..., :half]).addcmul_(second, sin, value=-direction)
        torch.mul(second, cos, out=target[..., half:]).addcmul_(first, sin, value=direction)
        if narrow:
            out_planes[tile] = target
    return out
