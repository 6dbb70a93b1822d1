"""Rotary position embedding on a NeuronCore: positions on the partitions, a head's features along them.

Letters: H heads of all samples, S positions, D head size (even). May import only nki and torch; written for NKI 0.6.
Executed only by an interpreter of a documented NKI subset, never on a Trainium.
"""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl
import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x` turned by the angles; see `ref.rope`."""
    return _turn(x, cos, sin, direction=1)


def rope_backward(grad_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of `x`: the same turn, the other way; see `ref.rope_backward`."""
    return _turn(grad_y, cos, sin, direction=-1)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, *, direction: int) -> Tensor:
    if x.numel() == 0:
        return torch.empty_like(x)
    y: Tensor = rope_kernel(x.reshape(-1, *x.shape[-2:]), cos, sin, direction)
    return y.reshape(x.shape)


@nki.jit  # type: ignore[untyped-decorator]
def rope_kernel(x: nl.NkiTensor, cos: nl.NkiTensor, sin: nl.NkiTensor, direction: int) -> nl.NkiTensor:
    """Turn every head: x (H, S, D), cos and sin (S, D/2), direction 1 or -1; returns (H, S, D)."""
    num_heads, length, size = x.shape
    half = size // 2
    pmax = nl.tile_size.pmax
    minus, plus = (nl.subtract, nl.add) if direction == 1 else (nl.add, nl.subtract)
    y = nl.ndarray((num_heads, length, size), dtype=x.dtype, buffer=nl.shared_hbm)
    for first in range(0, length, pmax):
        rows = min(pmax, length - first)
        cos_tile = nl.ndarray((rows, half), dtype=cos.dtype, buffer=nl.sbuf)
        sin_tile = nl.ndarray((rows, half), dtype=sin.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=cos_tile, src=cos[first : first + rows, :])
        nisa.dma_copy(dst=sin_tile, src=sin[first : first + rows, :])
        for head in range(num_heads):
            x_tile = nl.ndarray((rows, size), dtype=x.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=x_tile, src=x[head, first : first + rows, :])
            left, right = x_tile[:, 0:half], x_tile[:, half:size]
            straight = nl.ndarray((rows, half), dtype=nl.float32, buffer=nl.sbuf)
            crossed = nl.ndarray((rows, half), dtype=nl.float32, buffer=nl.sbuf)
            y_tile = nl.ndarray((rows, size), dtype=x.dtype, buffer=nl.sbuf)
            nisa.tensor_tensor(dst=straight, data1=left, data2=cos_tile, op=nl.multiply)
            nisa.tensor_tensor(dst=crossed, data1=right, data2=sin_tile, op=nl.multiply)
            nisa.tensor_tensor(dst=y_tile[:, 0:half], data1=straight, data2=crossed, op=minus)
            nisa.tensor_tensor(dst=straight, data1=right, data2=cos_tile, op=nl.multiply)
            nisa.tensor_tensor(dst=crossed, data1=left, data2=sin_tile, op=nl.multiply)
            nisa.tensor_tensor(dst=y_tile[:, half:size], data1=straight, data2=crossed, op=plus)
            nisa.dma_copy(dst=y[head, first : first + rows, :], src=y_tile)
    return y
