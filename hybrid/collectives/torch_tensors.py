"""Between torch.distributed's arguments and a Group's: host stand-ins of tensors, and reductions by c10d's names.

A Group takes contiguous tensors of the host; torch hands any. May import only torch, `errors`, `collectives.base` and
`collectives.elements`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.distributed
from torch import Tensor

from hybrid.collectives.base import ReduceOp
from hybrid.errors import UnsupportedFormat, UserError

# torch's type stubs of this module lag behind it.
dist: Any = torch.distributed

_OP_OF_NAME = {
    "SUM": ReduceOp.SUM,
    "AVG": ReduceOp.AVG,
    "MIN": ReduceOp.MIN,
    "MAX": ReduceOp.MAX,
    "PRODUCT": ReduceOp.PRODUCT,
    "PREMUL_SUM": ReduceOp.SUM,
}
_BITWISE: dict[str, Callable[..., Tensor]] = {
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """How c10d asks for elements to become one."""

    name: str
    """c10d's own."""
    op: ReduceOp | None
    """None: bit by bit, which a Group does not know; see `bitwise`."""
    scale: float = 1.0
    """What every input is multiplied with first."""

    def bitwise(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Fold `parts` into `out`, bit by bit."""
        function = _BITWISE[self.name]
        total = parts[0].clone()
        for part in parts[1:]:
            function(total, part, out=total)
        out.copy_(total)


def reduction_of(c10d_op: Any) -> Reduction:
    """Return what a c10d ReduceOp asks for.

    Raises:
        UserError: none that we know.
    """
    kind, extra = c10d_op.__getstate__()
    name = str(kind.name)
    if name not in _OP_OF_NAME and name not in _BITWISE:
        raise UserError("no such reduction", value=name, valid=[*_OP_OF_NAME, *_BITWISE])
    if isinstance(extra, Tensor):
        extra = float(extra)
    return Reduction(name=name, op=_OP_OF_NAME.get(name), scale=1.0 if extra is None else float(extra))


@final
class Staging:
    """Host stand-ins of one operation's tensors, and the copies back to those that it writes.

    A contiguous tensor of the host stands for itself. All stand-ins are vectors that want no gradient.
    """

    def __init__(self, operation: str) -> None:
        self._operation = operation
        self._back: list[tuple[Tensor, Tensor]] = []
        self._first: list[Callable[[], None]] = []

    def first(self, act: Callable[[], None]) -> None:
        """Do something more with the stand-ins before they are copied back."""
        self._first.append(act)

    def read(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Return a vector with the elements of `x` times `scale`; not to be written."""
        x = self._plain(x)
        host = x.to("cpu") if x.device.type != "cpu" else x
        host = host.resolve_conj().resolve_neg().contiguous().view(-1)
        return host if scale == 1.0 else host * scale

    def write(self, x: Tensor) -> Tensor:
        """Return a vector for the results that belong in `x`; its elements are not set."""
        x = self._plain(x)
        if x.device.type == "cpu" and x.is_contiguous() and not x.is_conj() and not x.is_neg():
            return x.view(-1)
        host = torch.empty(x.numel(), dtype=x.dtype)
        self._back.append((x, host))
        return host

    def change(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Return a vector with the elements of `x` times `scale`, whose new values belong in `x`."""
        host = self.write(x)
        kept = self.read(x, scale)
        return host if host.data_ptr() == kept.data_ptr() else host.copy_(kept)

    def finish(self) -> None:
        """Copy the results to where they belong."""
        with torch.no_grad():
            for act in self._first:
                act()
            for x, host in self._back:
                x.copy_(host.view(x.shape))
        self._first.clear()
        self._back.clear()

    def _plain(self, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise UserError(f"{self._operation} takes tensors", value=type(x).__name__)
        if x.layout != torch.strided or x.is_quantized or x.is_meta:
            what = "a quantized tensor" if x.is_quantized else "a meta tensor" if x.is_meta else f"layout {x.layout}"
            raise UnsupportedFormat(f"{self._operation} takes dense tensors", value=what, fix="make it dense first")
        return x.detach()


def one(tensors: Sequence[Any], operation: str) -> Any:
    """Return the only tensor of c10d's list of one a device."""
    if len(tensors) != 1:
        raise UserError(f"{operation} takes one tensor a rank", value=len(tensors), fix="call it once for each")
    return tensors[0]


def equal_parts(x: Tensor, count: int, part: Tensor, operation: str) -> list[Tensor]:
    """Return a vector in `count` parts, each of the size of `part`.

    Raises:
        UserError: they do not fit.
    """
    if x.numel() != count * part.numel() or x.dtype != part.dtype:
        raise UserError(
            f"{operation}: the one tensor for all {count} ranks has not {count} times the elements of a rank's",
            value=f"{x.numel()} of {x.dtype} for {part.numel()} of {part.dtype} each",
        )
    size = part.numel()
    return [x[start : start + size] for start in range(0, count * size, size)] if size else [x] * count


def split_parts(host: Tensor, x: Tensor, splits: Sequence[int], count: int, operation: str) -> list[Tensor]:
    """Return a vector of the elements of `x` in one part a rank: equal, or of so many rows of `x` each.

    Raises:
        UserError: they do not fit.
    """
    rows = x.shape[0] if x.dim() else 1
    if not splits:
        if rows % count:
            raise UserError(f"{operation}: {rows} rows do not divide among {count} ranks", fix="give split sizes")
        splits = [rows // count] * count
    if len(splits) != count or sum(splits) != rows:
        raise UserError(
            f"{operation}: split sizes must be one a rank and make up the rows",
            value=list(splits),
            valid=f"{count} numbers whose sum is {rows}",
        )
    width = x.numel() // rows if rows else 0
    return list(torch.split(host, [rows_of_rank * width for rows_of_rank in splits]))
