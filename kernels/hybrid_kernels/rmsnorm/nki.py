"""RMSNorm on a NeuronCore: rows on the partitions, features along them.

Letters: N rows, D features. May import only nki and torch; written for NKI 0.6. Executed only by an interpreter of a
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
PSUM_FREE = 512
"""Features of a matmul's result: one PSUM bank in float32."""


def rmsnorm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight`; see `ref.rmsnorm`."""
    if x.numel() == 0:
        return torch.empty_like(x)
    y: Tensor = rmsnorm_kernel(x.reshape(-1, x.shape[-1]), weight.reshape(1, -1), eps)
    return y.reshape(x.shape)


def rmsnorm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of `x` and of `weight`; see `ref.rmsnorm_backward`."""
    if x.numel() == 0:
        return torch.empty_like(x), torch.zeros_like(weight)
    rows = x.shape[-1]
    grad_x, grad_weight = rmsnorm_backward_kernel(
        grad_y.reshape(-1, rows), x.reshape(-1, rows), weight.reshape(1, -1), eps
    )
    return grad_x.reshape(x.shape), grad_weight.reshape(weight.shape)


def load_weight(weight: nl.NkiTensor) -> nl.NkiTensor:
    """Return the weight in float32 on every partition."""
    pmax, features = nl.tile_size.pmax, weight.shape[1]
    tile = nl.ndarray((pmax, features), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=weight.broadcast(0, pmax))
    return tile


def inverse_rms(x: nl.NkiTensor, eps: float) -> nl.NkiTensor:
    """Return `1 / sqrt(mean(x^2) + eps)` of each row, (rows, 1) in float32."""
    rows, features = x.shape
    inverse = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    squares = nl.ndarray((rows, min(FREE, features)), dtype=nl.float32, buffer=nl.sbuf)
    for start in range(0, features, FREE):
        size = min(FREE, features - start)
        nisa.activation(
            dst=squares[:, 0:size],
            op=nl.square,
            data=x[:, start : start + size],
            reduce_op=nl.add,
            reduce_res=inverse,
            reduce_cmd=nisa.reduce_cmd.reset_reduce if start == 0 else nisa.reduce_cmd.reduce,
        )
    nisa.tensor_scalar(dst=inverse, data=inverse, op0=nl.multiply, operand0=1.0 / features, op1=nl.add, operand1=eps)
    # As a vector operator, not as an activation: exact, and without the Scalar Engine's limits on the input.
    nisa.tensor_scalar(dst=inverse, data=inverse, op0=nl.rsqrt, operand0=0.0)
    return inverse


@nki.jit  # type: ignore[untyped-decorator]
def rmsnorm_kernel(x: nl.NkiTensor, weight: nl.NkiTensor, eps: float) -> nl.NkiTensor:
    """Normalise rows: x (N, D), weight (1, D), returns (N, D) in the format of x."""
    num_rows, features = x.shape
    pmax = nl.tile_size.pmax
    y = nl.ndarray((num_rows, features), dtype=x.dtype, buffer=nl.shared_hbm)
    weight_tile = load_weight(weight)
    for first in range(0, num_rows, pmax):
        rows = min(pmax, num_rows - first)
        x_tile = nl.ndarray((rows, features), dtype=x.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=x_tile, src=x[first : first + rows, :])
        inverse = inverse_rms(x_tile, eps)
        for start in range(0, features, FREE):
            size = min(FREE, features - start)
            y_tile = nl.ndarray((rows, size), dtype=x.dtype, buffer=nl.sbuf)
            nisa.scalar_tensor_tensor(
                dst=y_tile,
                data=x_tile[:, start : start + size],
                op0=nl.multiply,
                operand0=inverse,
                op1=nl.multiply,
                operand1=weight_tile[0:rows, start : start + size],
            )
            nisa.dma_copy(dst=y[first : first + rows, start : start + size], src=y_tile)
    return y


@nki.jit  # type: ignore[untyped-decorator]
def rmsnorm_backward_kernel(
    grad_y: nl.NkiTensor, x: nl.NkiTensor, weight: nl.NkiTensor, eps: float
) -> tuple[nl.NkiTensor, nl.NkiTensor]:
    """Return the gradients of x (N, D) and of the weight (1, D)."""
    num_rows, features = x.shape
    pmax = nl.tile_size.pmax
    num_chunks = (features + FREE - 1) // FREE
    grad_x = nl.ndarray((num_rows, features), dtype=x.dtype, buffer=nl.shared_hbm)
    grad_weight = nl.ndarray((1, features), dtype=weight.dtype, buffer=nl.shared_hbm)
    weight_tile = load_weight(weight)
    # The weight's gradient grows by partition, and is summed over the partitions once, at the end.
    sums = nl.ndarray((pmax, features), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=sums, value=0.0)
    for first in range(0, num_rows, pmax):
        rows = min(pmax, num_rows - first)
        x_tile = nl.ndarray((rows, features), dtype=x.dtype, buffer=nl.sbuf)
        grad_tile = nl.ndarray((rows, features), dtype=grad_y.dtype, buffer=nl.sbuf)
        nisa.dma_copy(dst=x_tile, src=x[first : first + rows, :])
        nisa.dma_copy(dst=grad_tile, src=grad_y[first : first + rows, :])
        inverse = inverse_rms(x_tile, eps)
        parts = nl.ndarray((rows, num_chunks), dtype=nl.float32, buffer=nl.sbuf)
        for i in range(num_chunks):
            start = i * FREE
            size = min(FREE, features - start)
            x_hat = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
            product = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=x_hat, data=x_tile[:, start : start + size], op0=nl.multiply, operand0=inverse)
            nisa.tensor_tensor(dst=product, data1=grad_tile[:, start : start + size], data2=x_hat, op=nl.multiply)
            running = sums[0:rows, start : start + size]
            nisa.tensor_tensor(dst=running, data1=running, data2=product, op=nl.add)
            nisa.tensor_tensor(
                dst=product, data1=product, data2=weight_tile[0:rows, start : start + size], op=nl.multiply
            )
            nisa.tensor_reduce(dst=parts[:, i : i + 1], op=nl.add, data=product, axis=1)
        mean = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_reduce(dst=mean, op=nl.add, data=parts, axis=1)
        nisa.tensor_scalar(dst=mean, data=mean, op0=nl.multiply, operand0=1.0 / features)
        for i in range(num_chunks):
            start = i * FREE
            size = min(FREE, features - start)
            pull = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
            push = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
            out = nl.ndarray((rows, size), dtype=x.dtype, buffer=nl.sbuf)
            nisa.tensor_scalar(
                dst=pull,
                data=x_tile[:, start : start + size],
                op0=nl.multiply,
                operand0=inverse,
                op1=nl.multiply,
                operand1=mean,
            )
            nisa.tensor_tensor(
                dst=push,
                data1=grad_tile[:, start : start + size],
                data2=weight_tile[0:rows, start : start + size],
                op=nl.multiply,
            )
            nisa.tensor_tensor(dst=push, data1=push, data2=pull, op=nl.subtract)
            nisa.tensor_scalar(dst=out, data=push, op0=nl.multiply, operand0=inverse)
            nisa.dma_copy(dst=grad_x[first : first + rows, start : start + size], src=out)
    ones = nl.ndarray((pmax, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=ones, value=1.0)
    for start in range(0, features, PSUM_FREE):
        size = min(PSUM_FREE, features - start)
        total = nl.ndarray((1, size), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=total, stationary=ones, moving=sums[:, start : start + size])
        out = nl.ndarray((1, size), dtype=weight.dtype, buffer=nl.sbuf)
        nisa.tensor_copy(dst=out, src=total)
        nisa.dma_copy(dst=grad_weight[:, start : start + size], src=out)
    return grad_x, grad_weight
