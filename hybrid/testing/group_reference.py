"""What collectives must give, slow and obvious, and inputs that show it: floats in float64, integers exactly.

Pure but for torch. May import only torch and `collectives.base`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hybrid.collectives.base import ReduceOp

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_NARROW = (torch.float16, torch.bfloat16)


def ops_of(dtype: torch.dtype) -> tuple[ReduceOp, ...]:
    """Return the reductions that a format has."""
    return tuple(op for op in ReduceOp if dtype.is_floating_point or op is not ReduceOp.AVG)


def random_tensor(dtype: torch.dtype, count: int, seed: int) -> Tensor:
    """Return elements over much of the format's range; integers so large that sums and products wrap around.

    Shapes:
        returns: (count,)
    """
    chance = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.rand(count, generator=chance) < 0.5
    if dtype in _INTEGERS:
        limits = torch.iinfo(dtype)
        return torch.randint(max(limits.min, -(2**62)), min(limits.max, 2**62), (count,), generator=chance, dtype=dtype)
    return torch.randn(count, generator=chance, dtype=torch.float64).mul_(3).to(dtype)


def reduced(xs: Sequence[Tensor], op: ReduceOp) -> Tensor:
    """Return the reduction of several tensors: float64 for floats, their own format for integers, which wrap around.

    Shapes:
        xs: each (N,).  returns: (N,)
    """
    if xs[0].dtype is torch.bool:
        stack = torch.stack(list(xs))
        return stack.all(0) if op in (ReduceOp.MIN, ReduceOp.PRODUCT) else stack.any(0)
    total = xs[0].double() if xs[0].dtype.is_floating_point else xs[0].clone()
    for x in xs[1:]:
        part = x.to(total.dtype)
        match op:
            case ReduceOp.MIN:
                total = torch.minimum(total, part)
            case ReduceOp.MAX:
                total = torch.maximum(total, part)
            case ReduceOp.PRODUCT:
                total = total * part
            case _:
                total = total + part
    return total / len(xs) if op is ReduceOp.AVG else total


def complaint(got: Tensor, xs: Sequence[Tensor], op: ReduceOp) -> str | None:
    """Return how `got` is wrong as the reduction of `xs`, or None.

    Numerics:
        Allowed of the true value: half a unit in the last place of the format for the one rounding, and for each
        addition or multiplication one of float32's (float64's for float64), as if all had the same sign.
    """
    wanted = reduced(xs, op)
    if not got.dtype.is_floating_point:
        wrong = got != wanted
    else:
        slack = _slack(xs, op, got.dtype) + wanted.abs() * torch.finfo(got.dtype).eps * (0.5 + 2**-12)
        exact = op in (ReduceOp.MIN, ReduceOp.MAX)
        slack = torch.zeros_like(slack) if exact else slack + torch.finfo(got.dtype).smallest_normal
        wrong = ((got.double() - wanted).abs() > slack) & ~(wanted.abs() > torch.finfo(got.dtype).max)
        wrong |= got.isnan() & ~wanted.isnan()
    if not wrong.any():
        return None
    at = int(wrong.nonzero()[0])
    return f"element {at} of {got.numel()} is {got[at].item()!r} and not {wanted[at].item()!r}"


def _slack(xs: Sequence[Tensor], op: ReduceOp, dtype: torch.dtype) -> Tensor:
    wide = torch.float32 if dtype in _NARROW else dtype
    magnitudes = [x.abs() for x in xs]
    return reduced(magnitudes, op) * torch.finfo(wide).eps * len(xs)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors of one format hold the very same bytes, NaN payloads and signs of zero among them."""
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
