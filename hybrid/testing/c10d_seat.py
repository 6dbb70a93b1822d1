"""What a clause of the c10d kit is given: its place in the world, the same inputs on every rank, and comparisons.

May import only torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.distributed
from torch import Tensor

# torch's type stubs of this module lag behind it.
dist: Any = torch.distributed

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
ODD = (torch.bool, torch.complex64, torch.float8_e4m3fn)
SIZES = (0, 1, 7, 70_001)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """One rank's place; the default group is the backend's."""

    rank: int
    size: int
    gloo: Any
    """A gloo group of the same ranks."""

    def gloo_takes(self, call: Callable[[Any], None]) -> bool:
        """Return whether gloo ran the operation; it refuses some at the call, on every rank alike."""
        try:
            call(self.gloo)
        except (RuntimeError, ValueError, TypeError):
            return False
        return True


Clause: TypeAlias = Callable[[Seat], None]


def values(rank: int, shape: int | Sequence[int], dtype: torch.dtype, salt: int = 0) -> Tensor:
    """Return rank `rank`'s input, which every rank can make; small, so that no narrow format overflows."""
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    sizes = [shape] if isinstance(shape, int) else list(shape)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(sizes, generator=generator, dtype=torch.float64).to(dtype)
    return torch.randint(0, 2 if dtype == torch.bool else 5, sizes, generator=generator).to(dtype)


def all_values(size: int, shape: int | Sequence[int], dtype: torch.dtype, salt: int = 0) -> list[Tensor]:
    """Return every rank's input."""
    return [values(rank, shape, dtype, salt) for rank in range(size)]


def reduced(parts: Sequence[Tensor], op: str) -> Tensor:
    """Return the plain reduction, in fp64 or int64."""
    wide = torch.complex128 if parts[0].is_complex() else torch.float64
    stack = torch.stack(
        [part.to(wide if part.dtype.is_floating_point or part.is_complex() else torch.int64) for part in parts]
    )
    if op in ("MIN", "MAX"):
        return stack.amin(0) if op == "MIN" else stack.amax(0)
    if op == "PRODUCT":
        return stack.prod(0)
    return stack.sum(0) / (len(parts) if op == "AVG" else 1) if op == "AVG" else stack.sum(0)


def check_close(found: Tensor, wanted: Tensor, what: str) -> None:
    """Compare with a wide reference: integers exactly, floats within a few roundings of their own format."""
    if found.dtype == torch.bool:
        same = torch.equal(found, wanted != 0)
    elif found.dtype.is_floating_point or found.is_complex():
        eps = torch.finfo(found.dtype).eps
        same = torch.allclose(found.to(wanted.dtype), wanted, rtol=4 * eps, atol=8 * eps)
    else:
        same = torch.equal(found.to(torch.int64), wanted.to(torch.int64))
    assert same, f"{what}: {found.flatten()[:6]} is not {wanted.flatten()[:6]}"


def check_same(found: Tensor, wanted: Tensor, what: str) -> None:
    """Compare bit for bit."""
    assert found.dtype == wanted.dtype, what
    assert found.shape == wanted.shape, what
    one, other = (x.contiguous().view(-1).view(torch.uint8) for x in (found, wanted))
    assert torch.equal(one, other), f"{what}: {found.flatten()[:6]} is not {wanted.flatten()[:6]}"


def check_refused(call: Callable[[], Any], kind: type[BaseException], *words: str) -> None:
    """Check that a call raises, and that the message has the words."""
    text = None
    try:
        call()
    except kind as error:
        text = str(error)
    assert text is not None, f"not refused; {kind.__name__} was due, with {words}"
    missing = [word for word in words if word not in text]
    assert not missing, f"{text!r} lacks {missing}"
