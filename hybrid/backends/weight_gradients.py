"""Split backwards: products with weights that put their weights' gradients off.

While a forward runs under `catching()`, each `F.linear` and `F.embedding` with a parameter becomes one whose backward
computes its input's gradient and notes the rest: which input met which gradient. `run()` computes the rest later. All
else of the graph (norms with their weights, attention, activations) is done in the backward and its memory freed then.
What PyTorch's own backward of these products computes is computed here by the same operations on the same operands, so
that the bits are the same. May import torch only.

Not under `torch.compile`: a compiled backward is one function and cannot be put off in part.

Source:
    Qi et al. 2024, "Zero bubble pipeline parallelism": the two parts of a backward. (PyTorch's own pipelining splits
    the autograd graph instead, and holds the whole of it until the weights' part.)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


@dataclass(slots=True)
class _Part:
    """One weight's gradient from one product, still to be computed."""

    weight: Tensor
    compute: Callable[[], Tensor]
    held: Sequence[Tensor]


class _Active(threading.local):
    deferral: Deferral | None = None


_ACTIVE = _Active()


@final
class Deferral:
    """The weight gradients of one microbatch that are put off.

    A backward through the caught products puts them off where `puts_off` is set, else it is a whole backward.
    """

    def __init__(self) -> None:
        self.puts_off = False
        self._parts: list[_Part] = []

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Catch the products of the forward that runs in this block, on this thread."""
        before, _ACTIVE.deferral = _ACTIVE.deferral, self
        try:
            with _Catching(self):
                yield
        finally:
            _ACTIVE.deferral = before

    def add(self, weight: Tensor, compute: Callable[[], Tensor], held: Sequence[Tensor]) -> None:
        """Note a gradient to be computed by `compute`, in the weight's format, from the tensors `held`."""
        self._parts.append(_Part(weight, compute, held))

    @property
    def held_bytes(self) -> int:
        """Bytes held for what is put off, each storage once."""
        storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for part in self._parts for x in part.held}
        return sum(storages.values())

    @torch.no_grad()
    def run(self) -> None:
        """Add what was put off to the weights' gradients, in the order of the backward, and let go of what was held."""
        parts, self._parts = self._parts[::-1], []
        while parts:
            part = parts.pop()
            gradient = part.compute()
            if part.weight.grad is None:
                part.weight.grad = gradient
            else:
                part.weight.grad += gradient


def active_deferral() -> Deferral | None:
    """Return the deferral that catches this thread's forward now, for products that are not PyTorch's own."""
    return _ACTIVE.deferral


class _Catching(TorchFunctionMode):
    """Puts our products in the place of PyTorch's, where the weight is a parameter that needs a gradient."""

    def __init__(self, deferral: Deferral) -> None:
        super().__init__()
        self._deferral = deferral

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A bias, or an embedding's other options: left to PyTorch, whose backward is then whole.
        plain = len(args) == 2 or args[2:] == (None,)
        if func in _PRODUCTS and plain and not kwargs and _is_weight(args[1]):
            return _PRODUCTS[func].apply(args[0], args[1], self._deferral)
        return func(*args, **(kwargs or {}))


def _is_weight(x: Tensor) -> bool:
    return isinstance(x, torch.nn.Parameter) and x.requires_grad


class _Linear(torch.autograd.Function):
    """x @ weightᵀ; under autocast both in its format, as PyTorch's own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, deferral: Deferral) -> Tensor:
        kind = x.device.type
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        ctx.save_for_backward(x, weight)
        ctx.deferral = deferral
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        flat = grad.reshape(-1, grad.shape[-1])
        # Autocast is on here too, and holds one narrow copy of the weight for the whole step.
        grad_x = flat.mm(weight).view(x.shape) if ctx.needs_input_grad[0] else None
        x = x.detach()

        def grad_weight() -> Tensor:
            return flat.t().mm(x.reshape(-1, x.shape[-1])).to(weight.dtype)

        if not ctx.deferral.puts_off:
            return grad_x, grad_weight(), None
        ctx.deferral.add(weight, grad_weight, (flat, x))
        return grad_x, None, None


class _Embedding(torch.autograd.Function):
    """Rows of a table by their numbers; there is no gradient but the weight's."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, deferral: Deferral) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.deferral = deferral
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        ids, weight = ctx.saved_tensors

        def grad_weight() -> Tensor:
            rows: Tensor = torch.ops.aten.embedding_dense_backward(grad, ids, weight.shape[0], -1, False)
            return rows

        if not ctx.deferral.puts_off:
            return None, grad_weight(), None
        ctx.deferral.add(weight, grad_weight, (grad, ids))
        return None, None, None


_PRODUCTS: dict[Any, Any] = {F.linear: _Linear, F.embedding: _Embedding}
