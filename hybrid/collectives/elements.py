"""The elements that collectives work on: what is refused, what is accumulated in which format, how it is reduced.

May import only torch, `errors` and `collectives.base`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybrid.collectives.base import ReduceOp
from hybrid.errors import UnsupportedFormat, UserError

_NARROW = (torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
_COMPLEX = (torch.complex64, torch.complex128)
REDUCED = (torch.float64, torch.float32, *_NARROW, *_INTEGERS, *_COMPLEX)
"""The formats that can be reduced; any format can be moved."""

_TILE_ELEMENTS = 30 << 10
"""Below what torch gives to its pool of threads, which every thread that calls it would get one of; stays in cache."""
_FUNCTION: dict[ReduceOp, Callable[..., Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVG: torch.add,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.PRODUCT: torch.mul,
}


def flat(x: Tensor) -> Tensor:
    """Return `x` as a vector that shares its memory.

    Raises:
        UserError: not contiguous, or not on the host.
    """
    if x.device.type != "cpu":
        raise UserError("a collective takes tensors of the host", value=str(x.device), fix="copy it to the host first")
    if not x.is_contiguous():
        raise UserError(
            "a collective takes contiguous tensors", value=f"strides {x.stride()}", fix="call contiguous() first"
        )
    return x.detach().view(-1)


def check_reducible(dtype: torch.dtype, op: ReduceOp) -> None:
    """Raise UnsupportedFormat where `op` is not defined on the format."""
    names = ", ".join(str(each).removeprefix("torch.") for each in REDUCED)
    if dtype not in REDUCED:
        raise UnsupportedFormat("this format cannot be reduced", value=str(dtype), valid=names)
    if op is ReduceOp.AVG and dtype in _INTEGERS:
        raise UnsupportedFormat("integers have no average", value=str(dtype), fix="sum them, and divide as you like")
    if op in (ReduceOp.MIN, ReduceOp.MAX) and dtype in _COMPLEX:
        raise UnsupportedFormat(f"complex numbers have no {op}", value=str(dtype), valid="sum, avg, product")


def wide_dtype(dtype: torch.dtype, op: ReduceOp) -> torch.dtype:
    """Return the format in which `op` is accumulated: float32 for narrow floats, their own for all others."""
    return torch.float32 if dtype in _NARROW and op not in (ReduceOp.MIN, ReduceOp.MAX) else dtype


def bytes_of(x: Tensor) -> memoryview:
    """Return the bytes of a vector, writable."""
    return x.view(torch.uint8).numpy().data if x.numel() else memoryview(b"")


def combine(op: ReduceOp, parts: Sequence[Tensor], out: Tensor) -> None:
    """Write `((parts[0] op parts[1]) op ...)` into `out`, in `out`'s format.

    `out` may be one of the parts; the first part may be overwritten unless it is `out`'s only use.

    Shapes:
        parts: each (N,), in `out`'s format or a narrower one.  out: (N,)
    """
    function = _FUNCTION[op]
    same = all(part.dtype == out.dtype for part in parts)
    if same and ((len(parts) == 2 and torch.get_num_threads() == 1) or out.numel() <= _TILE_ELEMENTS):
        _fold(function, parts, out)
        return
    for start in range(0, out.numel(), _TILE_ELEMENTS):
        # Two formats in one operation are many times slower than widening a tile that stays in cache.
        tile = slice(start, start + _TILE_ELEMENTS)
        _fold(function, [part[tile] if same else part[tile].to(out.dtype) for part in parts], out[tile])


def combine_tile(op: ReduceOp, parts: Sequence[Tensor], out: Tensor) -> None:
    """Do as `combine` with parts of `out`'s format that the caller has cut to what stays in cache."""
    if torch.get_num_threads() > 1:
        combine(op, parts, out)  # a longer tile would wake torch's pool of threads
    else:
        _fold(_FUNCTION[op], parts, out)


def _fold(function: Callable[..., Tensor], parts: Sequence[Tensor], out: Tensor) -> None:
    late = any(part.data_ptr() == out.data_ptr() for part in parts[2:])
    running = parts[0] if late else out
    function(parts[0], parts[1], out=running if len(parts) > 2 else out)
    for part in parts[2:-1]:
        function(running, part, out=running)
    if len(parts) > 2:
        function(running, parts[-1], out=out)
