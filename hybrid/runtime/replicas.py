"""Replicas: a rank's gradients reduced with those of the other replicas, updated by their owners, spread to all.

One step: buckets leave as the last backward has passed their layers (`last_backward`, `stage_done`), land in the
owners' gradients (`reduce`), and after the owners' update come back as parameters (`spread`). Decides nothing: who
shares what is `ownership.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hybrid.collectives.base import Group
from hybrid.collectives.error_feedback import ErrorFeedback
from hybrid.runtime.bucket_exchange import BucketExchange
from hybrid.runtime.optimizer import block_squares, sum_in_order
from hybrid.runtime.ownership import SharedLayers
from hybrid.scheduler.reduction import BLOCK, Bucket, Piece


@dataclass(slots=True, kw_only=True)
class SharedBucket:
    """A bucket with what moves it."""

    bucket: Bucket
    exchange: BucketExchange
    stage: int
    """This rank's stage that holds its layers."""
    parameters: tuple[Tensor, ...]
    num_missing: int = 0
    """Parameters whose gradients the last backward has not reached yet."""
    is_whole: bool = False
    """Its gradients are those of the whole step."""


@dataclass(slots=True, kw_only=True)
class SharedGroup:
    """One group's buckets, in the order in which all members send them."""

    shared: SharedLayers
    group: Group
    buckets: tuple[SharedBucket, ...]
    parameters_of_layer: Mapping[int, Mapping[str, Tensor]]
    """Ascending."""
    num_left: int = 0
    """How many buckets of this step have left."""


class Replicas:
    """What one rank has to do with the other replicas.

    Args:
        groups: each group that the rank belongs to.
        feedback: the codec of gradients, which all buckets share.
        num_layers: of the model; the holders of the last layer know their replicas' losses.
        uncounted: parameters whose squares are counted elsewhere: the second copy of a tied weight, what other ranks of
            a stage hold too.

    Numerics:
        Gradients and losses are added over the replicas in their order, in the parameters' format (float32, or
        float64), squares in float64 block by block in the order of the parameters: one process that follows the same
        order gets the same bits, and so does every replica.
    """

    def __init__(
        self, groups: Sequence[SharedGroup], *, feedback: ErrorFeedback, num_layers: int, uncounted: Set[str]
    ) -> None:
        self.groups, self.feedback = tuple(groups), feedback
        self._last_layer, self._uncounted = num_layers - 1, uncounted
        self._watched: int | None = None
        for each in self._buckets():
            for parameter in each.parameters:
                hook = partial(self._on_gradient, each)
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]  # torch has no types for it

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent to other replicas so far; without the squares."""
        return sum(each.exchange.sent_bytes for group in self.groups for each in group.buckets)

    def last_backward(self, stage: int) -> None:
        """Watch a stage's last backward of the step, which is whole: a bucket leaves when it has passed its layers."""
        self._watched = stage
        for each in self._buckets():
            if each.stage == stage:
                each.num_missing = len(each.parameters)

    def stage_done(self, stage: int) -> None:
        """Let the buckets leave that waited for the end of this stage's backwards of the step."""
        self._watched = None
        for each in self._buckets():
            each.is_whole |= each.stage == stage
        self._leave(with_tied=False)

    def reduce(self, loss: float | None) -> tuple[dict[int, float], float | None]:
        """Land every bucket; return the sum of squares of each of the rank's layers, and the loss of all replicas.

        Call it when the copies of tied weights have met within the replica.

        Args:
            loss: this replica's share of the step's loss, where the rank holds the last layer.

        Raises:
            CommTimeout, PeerLost: a member was silent or has gone.
        """
        self._leave(with_tied=True)
        squares: dict[int, float] = {}
        for group in self.groups:
            group.num_left = 0
            for each in group.buckets:
                each.exchange.land()
                each.is_whole = False
            holds_last = self._last_layer in group.shared.group.layers
            found, loss_of_all = self._share_squares(group, loss if holds_last else None)
            squares |= found
            loss = loss_of_all if holds_last else loss
        return squares, loss

    def spread(self) -> None:
        """Send the own parts' parameters to all, and take the others'; after the owners' update."""
        exchanges = [each.exchange for group in self.groups for each in group.buckets]
        for exchange in exchanges:
            exchange.spread()
        for exchange in exchanges:
            exchange.arrive()

    def _buckets(self) -> Iterator[SharedBucket]:
        return (each for group in self.groups for each in group.buckets)

    def _on_gradient(self, each: SharedBucket, parameter: Tensor) -> None:
        """Take the news that a backward has added to a parameter's gradient."""
        if each.stage == self._watched:
            each.num_missing -= 1
            if each.num_missing == 0:
                each.is_whole = True
                self._leave(with_tied=False)

    def _leave(self, *, with_tied: bool) -> None:
        for group in self.groups:
            for each in group.buckets[group.num_left :]:
                if not each.is_whole or (each.bucket.is_tied and not with_tied):
                    # Behind it nothing leaves either: a group's operations have one order on all its members.
                    break
                each.exchange.leave()
                group.num_left += 1

    def _share_squares(self, group: SharedGroup, loss: float | None) -> tuple[dict[int, float], float | None]:
        """Return each layer's sum of squares from all owners' blocks, and the replicas' losses added in their order."""
        layers = {layer: group.shared.pieces(parameters) for layer, parameters in group.parameters_of_layer.items()}
        more = 0 if loss is None else 1
        sizes = [
            sum(self._num_blocks(piece) for pieces in layers.values() for piece in pieces[member])
            for member in range(group.group.size)
        ]
        rows = [torch.zeros(size + more, dtype=torch.float64) for size in sizes]
        own = group.group.rank
        mine = [
            block_squares(_part_of_gradient(group.parameters_of_layer[layer][piece.name], piece))
            for layer, pieces in layers.items()
            for piece in pieces[own]
            if piece.name not in self._uncounted
        ]
        if mine:
            rows[own][: sizes[own]] = torch.cat(mine)
        if loss is not None:
            rows[own][-1] = loss
        group.group.all_gather(rows, rows[own]).wait()
        total = None if loss is None else sum_in_order([row[-1:] for row in rows])
        return self._sum_layers(layers, rows), total

    def _sum_layers(self, layers: Mapping[int, Sequence[Sequence[Piece]]], rows: Sequence[Tensor]) -> dict[int, float]:
        # A layer's blocks are one run a member, in the members' order.
        borders = [
            list(accumulate((sum(map(self._num_blocks, pieces[m])) for pieces in layers.values()), initial=0))
            for m in range(len(rows))
        ]
        spans = [list(pairwise(border)) for border in borders]
        return {
            layer: sum_in_order([row[slice(*spans[m][place])] for m, row in enumerate(rows)])
            for place, layer in enumerate(layers)
        }

    def _num_blocks(self, piece: Piece) -> int:
        return 0 if piece.name in self._uncounted else -(-piece.size // BLOCK)


def _part_of_gradient(parameter: Tensor, piece: Piece) -> Tensor:
    assert parameter.grad is not None, "a parameter has no gradient after a step"
    return parameter.grad.view(-1)[piece.start : piece.end]
