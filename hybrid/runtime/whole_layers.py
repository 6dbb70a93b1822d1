"""Whole tensors from the parts that tensor-parallel ranks hold of them, and the other way: what a checkpoint needs."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hybrid.models.decoder import layer_name
from hybrid.models.shards import Shard, shard_of
from hybrid.models.stage import Stage


def whole_shape(x: Tensor, shard: Shard) -> tuple[int, ...]:
    """Return the shape of the whole of which a tensor is a part."""
    return (*x.shape[: shard.dim], shard.size, *x.shape[shard.dim + 1 :])


def own_part(whole: Tensor, shard: Shard) -> Tensor:
    """Return this rank's part of a whole tensor, as a view."""
    return whole.narrow(shard.dim, shard.first, shard.end - shard.first)


@final
class WholeLayer:
    """Joins one layer's tensors; every rank of the axis calls `join` for the same names in the same order.

    Args:
        is_kept: whether this rank keeps what is joined.
    """

    def __init__(self, stage: Stage, index: int, *, is_kept: bool) -> None:
        self._config, self._prefix = stage.config, layer_name(stage.config, index) + "."
        self._axis = stage.parallel.axis if stage.parallel else None
        self.is_kept = is_kept

    def join(self, name: str, part: Tensor) -> Tensor:
        """Return the whole tensor on the host, where it is kept; elsewhere this rank's part.

        Args:
            name: of the parameter that the tensor is, or belongs to.

        Raises:
            CommTimeout, PeerLost: a rank was silent or has gone.
        """
        axis = self._axis
        if axis is None:
            return part.cpu()
        local = name.removeprefix(self._prefix)
        shards = [shard_of(self._config, local, degree=axis.size, rank=rank) for rank in range(axis.size)]
        if shards[axis.rank].is_whole:
            return part.cpu()
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in shards]
        axis.all_gather(parts, part.contiguous())
        if not self.is_kept:
            return part
        whole = part.new_empty(whole_shape(part, shards[axis.rank]), device="cpu")
        for shard, each in zip(shards, parts, strict=True):
            own_part(whole, shard).copy_(each)
        return whole
