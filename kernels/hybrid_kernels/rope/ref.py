"""Rotary position embedding, slow and obvious; rotates the first half of a head against the second.

Letters: S positions, D head size (even). May import only torch and `precision`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.precision import wide


def rope_tables(
    length: int, head_size: int, *, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of every position and pair; computed in float64 and rounded once.

    Shapes:
        returns: (S, D/2) and (S, D/2), with S = `length` and D = `head_size`
    """
    pairs = torch.arange(head_size // 2, dtype=torch.float64)
    frequencies = theta ** (-2.0 * pairs / head_size)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` with its pair (i, i + D/2) at position s turned by the angle of (s, i).

    Shapes:
        x: (..., S, D).  cos: (S, D/2).  sin: (S, D/2).  returns: (..., S, D)

    Numerics:
        Computed in float32 (float64 for float64), rounded once to the format of ``x``.

    Source:
        Su et al. 2021, "RoFormer"; the pairing is that of Llama in Hugging Face's layout.
    """
    half = x.shape[-1] // 2
    first, second = wide(x[..., :half]), wide(x[..., half:])
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def rope_backward(grad_y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return the gradient of ``x``: the same turn, the other way.

    Shapes:
        grad_y: (..., S, D).  cos: (S, D/2).  sin: (S, D/2).  returns: (..., S, D)
    """
    return rope(grad_y, cos, -sin)
