"""SwiGLU's gate on the CPU: tile by tile, so that the intermediate values stay in cache.

May import only torch and this package's own modules.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_kernels.precision import wide
from hybrid_kernels.tiles import tiles


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """See `ref.swiglu`."""
    out = torch.empty(gate.shape, dtype=gate.dtype)
    gates, ups, outs = gate.reshape(-1), up.reshape(-1), out.view(-1)
    for tile in tiles(len(gates)):
        # Widened first: an operation on two formats at once is many times slower than a cast and one on one.
        outs[tile] = F.silu(wide(gates[tile])).mul_(wide(ups[tile]))
    return out


def swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See `ref.swiglu_backward`."""
    grad_gate, grad_up = torch.empty(gate.shape, dtype=gate.dtype), torch.empty(up.shape, dtype=up.dtype)
    grads, gates, ups = grad_y.reshape(-1), gate.reshape(-1), up.reshape(-1)
    grad_gates, grad_ups = grad_gate.view(-1), grad_up.view(-1)
    for tile in tiles(len(gates)):
        gate_wide, grad_wide = wide(gates[tile]), wide(grads[tile])
        grad_ups[tile] = F.silu(gate_wide).mul_(grad_wide)
        grad_gates[tile] = torch.ops.aten.silu_backward(grad_wide * wide(ups[tile]), gate_wide)
    return grad_gate, grad_up
