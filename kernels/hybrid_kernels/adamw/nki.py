"""One AdamW update of a shard on a NeuronCore: one pass over the four arrays, element by element.

Letters: N elements. May import only nki and torch; written for NKI 0.6. Executed only by an interpreter of a documented
NKI subset, never on a Trainium.
"""

from __future__ import annotations

import math

import nki
import nki.isa as nisa
import nki.language as nl
from torch import Tensor

FREE = 2048
"""Elements a partition that one instruction takes: 8 KiB in float32."""


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
    """Update the parameter and its two moments in place; see `ref.adamw`.

    The step's factors go in as a tensor: were they hyper-parameters, every step would compile anew.
    """
    if param.numel() == 0:
        return
    factors = param.new_tensor(
        [
            grad_scale,
            1.0 - learning_rate * weight_decay,
            1.0 - beta1,
            beta2,
            1.0 - beta2,
            1.0 / math.sqrt(1.0 - beta2**step),
            eps,
            learning_rate / (1.0 - beta1**step),
        ]
    )
    new = adamw_kernel(
        param.reshape(-1), grad.reshape(-1), exp_avg.reshape(-1), exp_avg_sq.reshape(-1), factors.reshape(1, -1)
    )
    for old, value in zip((param, exp_avg, exp_avg_sq), new, strict=True):
        old.copy_(value.reshape(old.shape))


@nki.jit  # type: ignore[untyped-decorator]
def adamw_kernel(
    param: nl.NkiTensor,
    grad: nl.NkiTensor,
    exp_avg: nl.NkiTensor,
    exp_avg_sq: nl.NkiTensor,
    factors: nl.NkiTensor,
) -> tuple[nl.NkiTensor, nl.NkiTensor, nl.NkiTensor]:
    """Return parameter and moments after one step: all (N,); factors (1, 8) as `adamw_` lists them."""
    num_elements = param.shape[0]
    pmax = nl.tile_size.pmax
    new_param = nl.ndarray((num_elements,), dtype=nl.float32, buffer=nl.shared_hbm)
    new_avg = nl.ndarray((num_elements,), dtype=nl.float32, buffer=nl.shared_hbm)
    new_avg_sq = nl.ndarray((num_elements,), dtype=nl.float32, buffer=nl.shared_hbm)
    factor = nl.ndarray((pmax, 8), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=factor, src=factors.broadcast(0, pmax))
    first = 0
    while first < num_elements:
        # Whole partitions of FREE elements while they last, then one partition with the rest.
        rows = min(pmax, (num_elements - first) // FREE)
        free = FREE if rows > 0 else num_elements - first
        rows = max(rows, 1)
        last = first + rows * free
        p = nl.ndarray((rows, free), dtype=nl.float32, buffer=nl.sbuf)
        g = nl.ndarray((rows, free), dtype=nl.float32, buffer=nl.sbuf)
        m = nl.ndarray((rows, free), dtype=nl.float32, buffer=nl.sbuf)
        v = nl.ndarray((rows, free), dtype=nl.float32, buffer=nl.sbuf)
        work = nl.ndarray((rows, free), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=p, src=param[first:last])
        nisa.dma_copy(dst=g, src=grad[first:last])
        nisa.dma_copy(dst=m, src=exp_avg[first:last])
        nisa.dma_copy(dst=v, src=exp_avg_sq[first:last])
        nisa.tensor_scalar(dst=g, data=g, op0=nl.multiply, operand0=factor[0:rows, 0:1])
        nisa.tensor_scalar(dst=p, data=p, op0=nl.multiply, operand0=factor[0:rows, 1:2])
        # m += (g - m) * (1 - beta1)
        nisa.tensor_tensor(dst=work, data1=g, data2=m, op=nl.subtract)
        nisa.scalar_tensor_tensor(
            dst=m, data=work, op0=nl.multiply, operand0=factor[0:rows, 2:3], op1=nl.add, operand1=m
        )
        # v = v * beta2 + g * g * (1 - beta2)
        nisa.tensor_tensor(dst=work, data1=g, data2=g, op=nl.multiply)
        nisa.tensor_scalar(dst=work, data=work, op0=nl.multiply, operand0=factor[0:rows, 4:5])
        nisa.scalar_tensor_tensor(
            dst=v, data=v, op0=nl.multiply, operand0=factor[0:rows, 3:4], op1=nl.add, operand1=work
        )
        # As a power, not as the activation sqrt, whose valid range leaves out zero.
        nisa.tensor_scalar(dst=work, data=v, op0=nl.power, operand0=0.5)
        nisa.tensor_scalar(
            dst=work,
            data=work,
            op0=nl.multiply,
            operand0=factor[0:rows, 5:6],
            op1=nl.add,
            operand1=factor[0:rows, 6:7],
        )
        nisa.reciprocal(dst=work, data=work)
        nisa.scalar_tensor_tensor(
            dst=work, data=work, op0=nl.multiply, operand0=factor[0:rows, 7:8], op1=nl.multiply, operand1=m
        )
        nisa.tensor_tensor(dst=p, data1=p, data2=work, op=nl.subtract)
        nisa.dma_copy(dst=new_param[first:last], src=p)
        nisa.dma_copy(dst=new_avg[first:last], src=m)
        nisa.dma_copy(dst=new_avg_sq[first:last], src=v)
        first = last
    return new_param, new_avg, new_avg_sq
