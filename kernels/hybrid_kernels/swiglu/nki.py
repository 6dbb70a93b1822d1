"""SwiGLU's gate on a NeuronCore, element by element.

Letters: N rows, F features. May import only nki and torch; written for NKI 0.6. Executed only by an interpreter of a
documented NKI subset, never on a Trainium.
"""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl
import torch
from torch import Tensor

FREE = 2048
"""Features that one instruction takes: 8 KiB of a partition in float32."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`; see `ref.swiglu`."""
    if gate.numel() == 0:
        return torch.empty_like(gate)
    y: Tensor = swiglu_kernel(_matrix(gate), _matrix(up))
    return y.reshape(gate.shape)


def swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate` and `up`; see `ref.swiglu_backward`."""
    if gate.numel() == 0:
        return torch.empty_like(gate), torch.empty_like(up)
    grad_gate, grad_up = swiglu_backward_kernel(_matrix(grad_y), _matrix(gate), _matrix(up))
    return grad_gate.reshape(gate.shape), grad_up.reshape(up.shape)


def _matrix(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) if x.dim() else x.reshape(1, 1)


@nki.jit  # type: ignore[untyped-decorator]
def swiglu_kernel(gate: nl.NkiTensor, up: nl.NkiTensor) -> nl.NkiTensor:
    """Return silu(gate) * up, all (N, F)."""
    num_rows, features = gate.shape
    pmax = nl.tile_size.pmax
    y = nl.ndarray((num_rows, features), dtype=gate.dtype, buffer=nl.shared_hbm)
    for first in range(0, num_rows, pmax):
        rows = min(pmax, num_rows - first)
        for start in range(0, features, FREE):
            size = min(FREE, features - start)
            gate_tile = nl.ndarray((rows, size), dtype=gate.dtype, buffer=nl.sbuf)
            up_tile = nl.ndarray((rows, size), dtype=up.dtype, buffer=nl.sbuf)
            silu = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
            y_tile = nl.ndarray((rows, size), dtype=gate.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=gate_tile, src=gate[first : first + rows, start : start + size])
            nisa.dma_copy(dst=up_tile, src=up[first : first + rows, start : start + size])
            nisa.activation(dst=silu, op=nl.silu, data=gate_tile)
            nisa.tensor_tensor(dst=y_tile, data1=silu, data2=up_tile, op=nl.multiply)
            nisa.dma_copy(dst=y[first : first + rows, start : start + size], src=y_tile)
    return y


@nki.jit  # type: ignore[untyped-decorator]
def swiglu_backward_kernel(
    grad_y: nl.NkiTensor, gate: nl.NkiTensor, up: nl.NkiTensor
) -> tuple[nl.NkiTensor, nl.NkiTensor]:
    """Return the gradients of gate and up, all (N, F)."""
    num_rows, features = gate.shape
    pmax = nl.tile_size.pmax
    grad_gate = nl.ndarray((num_rows, features), dtype=gate.dtype, buffer=nl.shared_hbm)
    grad_up = nl.ndarray((num_rows, features), dtype=up.dtype, buffer=nl.shared_hbm)
    for first in range(0, num_rows, pmax):
        rows = min(pmax, num_rows - first)
        for start in range(0, features, FREE):
            size = min(FREE, features - start)
            grad_tile = nl.ndarray((rows, size), dtype=grad_y.dtype, buffer=nl.sbuf)
            gate_tile = nl.ndarray((rows, size), dtype=gate.dtype, buffer=nl.sbuf)
            up_tile = nl.ndarray((rows, size), dtype=up.dtype, buffer=nl.sbuf)
            curve = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
            product = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
            out_gate = nl.ndarray((rows, size), dtype=gate.dtype, buffer=nl.sbuf)
            out_up = nl.ndarray((rows, size), dtype=up.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=grad_tile, src=grad_y[first : first + rows, start : start + size])
            nisa.dma_copy(dst=gate_tile, src=gate[first : first + rows, start : start + size])
            nisa.dma_copy(dst=up_tile, src=up[first : first + rows, start : start + size])
            nisa.activation(dst=curve, op=nl.silu, data=gate_tile)
            nisa.tensor_tensor(dst=out_up, data1=curve, data2=grad_tile, op=nl.multiply)
            nisa.activation(dst=curve, op=nl.silu_dx, data=gate_tile)
            nisa.tensor_tensor(dst=product, data1=grad_tile, data2=up_tile, op=nl.multiply)
            nisa.tensor_tensor(dst=out_gate, data1=product, data2=curve, op=nl.multiply)
            nisa.dma_copy(dst=grad_gate[first : first + rows, start : start + size], src=out_gate)
            nisa.dma_copy(dst=grad_up[first : first + rows, start : start + size], src=out_up)
    return grad_gate, grad_up
