"""RMSNorm on the CPU: tile by tile, so that the intermediate values stay in cache.

May import only torch and this package's own modules.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.precision import wide, wide_dtype
from hybrid_kernels.tiles import tiles


def rmsnorm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """See `ref.rmsnorm`."""
    size = x.shape[-1]
    rows, weight_wide = x.reshape(-1, size), wide(weight)
    out = torch.empty(x.shape, dtype=x.dtype)
    out_rows = out.view(-1, size)
    for tile in tiles(len(rows), size):
        x_wide = wide(rows[tile])
        inverse_rms = torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
        out_rows[tile] = (x_wide * inverse_rms).mul_(weight_wide)
    return out


def rmsnorm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """See `ref.rmsnorm_backward`."""
    size = x.shape[-1]
    rows, grad_rows, weight_wide = x.reshape(-1, size), grad_y.reshape(-1, size), wide(weight)
    grad_x = torch.empty(x.shape, dtype=x.dtype)
    out_rows = grad_x.view(-1, size)
    grad_weight = torch.zeros(size, dtype=wide_dtype(x.dtype))
    for tile in tiles(len(rows), size):
        x_wide, grad_wide = wide(rows[tile]), wide(grad_rows[tile])
        inverse_rms = torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
        x_hat = x_wide * inverse_rms
        grad_weight += (grad_wide * x_hat).sum(dim=0)
        grad_x_hat = grad_wide * weight_wide
        along = (grad_x_hat * x_hat).mean(dim=-1, keepdim=True)
        out_rows[tile] = grad_x_hat.sub_(x_hat.mul_(along)).mul_(inverse_rms)
    return grad_x, grad_weight.to(weight.dtype)
