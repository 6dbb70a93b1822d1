"""Static shapes: a function that is compiled for its first call's shapes refuses every other.

A graph compiler would compile again, for minutes, in the middle of a step; or fail. May import only torch and
`errors`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.utils import _pytree as pytree

from hybrid.errors import DeviceError

T = TypeVar("T")
Signature = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def signature_of(*args: object, **kwargs: object) -> Signature:
    """Return shape and format of every tensor among a call's arguments, in order."""
    leaves = pytree.tree_leaves((args, kwargs))
    return tuple((tuple(x.shape), x.dtype) for x in leaves if isinstance(x, torch.Tensor))


def hold_shapes(fn: Callable[..., T], *, chip: str) -> Callable[..., T]:
    """Return `fn`, which from its first call on takes that call's shapes and formats only.

    Raises:
        DeviceError: (when called) a tensor has another shape or format.
    """
    first: Signature | None = None

    @functools.wraps(fn, updated=())
    def call(*args: object, **kwargs: object) -> T:
        nonlocal first
        found = signature_of(*args, **kwargs)
        if first is None:
            first = found
        elif found != first:
            raise DeviceError(
                f"chip {chip} runs static graphs, and a compiled function was called with other shapes",
                value=_text(found),
                valid=_text(first),
                fix="pad to the first call's shapes, or compile another function for the others",
            )
        return fn(*args, **kwargs)

    return call


def _text(signature: Signature) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in signature) or "no tensor"
