"""What the ranks of an axis exchange in a stage's forward, and what follows from it in its backward.

Each function is differentiable; every rank calls the same ones in the same order. May import torch, `axis` and
`scheduler.reshard`.

Legend: B samples, T tokens, S tokens of one rank, H hidden.
"""

# ruff: noqa: N803 - the capitals at the end of a name are its dims; see the legend above
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hybrid.models.axis import Axis
from hybrid.scheduler.reshard import cut


def _sum(x: Tensor, axis: Axis) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    axis.all_reduce(total)
    return total


def _gather_tokens(x_BSH: Tensor, axis: Axis) -> Tensor:
    """Return all ranks' tokens, in the order of the ranks."""
    parts = x_BSH.new_empty(axis.size, *x_BSH.shape)
    axis.all_gather(list(parts), x_BSH.contiguous())
    return parts.transpose(0, 1).flatten(1, 2)


def _scatter_tokens(x_BTH: Tensor, axis: Axis) -> Tensor:
    """Return this rank's tokens of the sum over all ranks."""
    parts = x_BTH.reshape(len(x_BTH), axis.size, -1, x_BTH.shape[2]).transpose(0, 1).contiguous()
    out = torch.empty_like(parts[0])
    axis.reduce_scatter(out, list(parts))
    return out


def _join(x_BSH: Tensor, num_tokens: int, axis: Axis) -> Tensor:
    """Return all ranks' tokens, of which some may have one more than others."""
    ranges = cut(num_tokens, axis.size)
    most = max(end - first for first, end in ranges)
    padded = F.pad(x_BSH, (0, 0, 0, most - x_BSH.shape[1]))
    whole = _gather_tokens(padded, axis)
    if num_tokens == most * axis.size:
        return whole
    kept = [whole[:, rank * most : rank * most + end - first] for rank, (first, end) in enumerate(ranges)]
    return torch.cat(kept, 1)


def _cut(x_BTH: Tensor, axis: Axis) -> Tensor:
    first, end = cut(x_BTH.shape[1], axis.size)[axis.rank]
    return x_BTH[:, first:end].contiguous()


class SumBackward(torch.autograd.Function):
    """Forward: x. Backward: the sum over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _sum(grad, ctx.axis), None


class SumForward(torch.autograd.Function):
    """Forward: the sum over the ranks. Backward: the gradient, which is the same on all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return _sum(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Gather(torch.autograd.Function):
    """Forward: all ranks' tokens. Backward: the sum over the ranks of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _gather_tokens(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _scatter_tokens(grad, ctx.axis), None


class SumScatter(torch.autograd.Function):
    """Forward: this rank's tokens of the sum over the ranks. Backward: all ranks' tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _scatter_tokens(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _gather_tokens(grad, ctx.axis), None


class Join(torch.autograd.Function):
    """Forward: all ranks' tokens. Backward: this rank's of the gradient, of which all hold the same."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, num_tokens: int, axis: Axis) -> Tensor:
        ctx.axis = axis
        return _join(x, num_tokens, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _cut(grad, ctx.axis), None, None


class Cut(torch.autograd.Function):
    """Forward: this rank's tokens of what all hold. Backward: all ranks' tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.num_tokens = axis, x.shape[1]
        return _cut(x, axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _join(grad, ctx.num_tokens, ctx.axis), None
