"""SwiGLU's gate, slow and obvious: ``silu(gate) * up``, between the two projections and the third.

May import only torch and `precision`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.precision import wide


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return ``gate * sigmoid(gate) * up``, in the format of ``gate``.

    Shapes:
        gate: any.  up: the same.  returns: the same

    Numerics:
        Computed in float32 (float64 for float64), rounded once. Large negative gates give zero, never NaN.

    Source:
        Shazeer 2020, "GLU variants improve transformer".
    """
    gate_wide = wide(gate)
    return (gate_wide * torch.sigmoid(gate_wide) * wide(up)).to(gate.dtype)


def swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``gate`` and of ``up``.

    Shapes:
        grad_y, gate, up: all the same.  returns: twice the same
    """
    gate_wide, grad_wide = wide(gate), wide(grad_y)
    sigmoid = torch.sigmoid(gate_wide)
    silu = gate_wide * sigmoid
    slope = sigmoid * (1.0 + gate_wide * (1.0 - sigmoid))
    return (grad_wide * wide(up) * slope).to(gate.dtype), (grad_wide * silu).to(up.dtype)
