"""HierarchicalGroup: sums inside each island first, then across, so that slow links carry each element once.

All-reduce in three phases, chunk by chunk, so that they overlap: reduce-scatter inside (by whatever group the island
has: the vendor's, shared memory), exchange across striped over every rank's own link, all-gather inside. May import
only torch, `errors`, `transports` (its base) and this folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import final

from torch import Tensor

from hybrid.collectives.base import Group, PointToPoint, ReduceOp, Work
from hybrid.collectives.codecs import Codec
from hybrid.collectives.elements import check_reducible, flat
from hybrid.collectives.island_chunk import IslandChunk, Layout
from hybrid.collectives.progress import Waitable
from hybrid.collectives.scratch import Scratch
from hybrid.collectives.striping import stripe
from hybrid.collectives.transport_group import TransportGroup
from hybrid.errors import UserError


@final
class HierarchicalGroup(Group):
    """See `Group`. All-reduce goes by islands; the other operations go over the flat group, in their turn.

    Closing it closes all the groups that it was given.

    Args:
        flat: all members, over transports; its positions are this group's.
        islands: positions; every member gives the same.
        inner: the members of this one's island, in the island's order.
        cross: for each set of owners that this member is one of (see `stripe`), groups of these, in the order of
            the islands: as many as chunks shall be under way between the islands at once.
        weight_of_position: each member's bandwidth to the other islands, in whatever unit.
        chunk_bytes: how much of a tensor is in one phase at a time.
        codec: how float sums travel between islands; None: as they are (narrow floats as float32, so that they are
            rounded once).
    """

    def __init__(
        self,
        *,
        flat: TransportGroup,
        islands: Sequence[Sequence[int]],
        inner: Group,
        cross: Mapping[tuple[int, ...], Sequence[Group]],
        weight_of_position: Sequence[float],
        chunk_bytes: int = 4 << 20,
        codec: Codec | None = None,
    ) -> None:
        self.rank, self.ranks = flat.rank, flat.ranks
        self._flat, self._inner = flat, inner
        pieces = stripe(islands, weight_of_position)
        self._chunk_bytes = chunk_bytes
        wanted = {piece.owners for piece in pieces if self.rank in piece.owners}
        num_lanes = {len(groups) for groups in cross.values()}
        if set(cross) != wanted or len(num_lanes) != 1 or inner.size != len(_island_of(islands, self.rank)):
            raise UserError(
                "a hierarchical group takes its island's group, and as many groups for each set of owners that this "
                "member is one of",
                value=f"{inner.size} members inside; { ({owners: len(groups) for owners, groups in cross.items()}) }",
                valid=f"{len(_island_of(islands, self.rank))} members inside; one or more for each of {sorted(wanted)}",
            )
        self._num_lanes = num_lanes.pop()
        self._layout = Layout(
            pieces=pieces,
            island=_island_of(islands, self.rank),
            at=next(at for at, island in enumerate(islands) if self.rank in island),
            rank=self.rank,
            size=flat.size,
            inner=inner,
            cross={owners: tuple(groups) for owners, groups in cross.items()},
            codec=codec if codec is not None and codec.max_error > 0 else None,
            scratch=Scratch(),
        )

    def all_reduce(self, x: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        x = flat(x)
        check_reducible(x.dtype, op)
        return self._flat.run_in_turn("all_reduce isles", x, op, lambda: self._phases(x, op))

    def reduce_scatter(self, out: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM) -> Work:
        return self._flat.reduce_scatter(out, inputs, op)

    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> Work:
        return self._flat.all_gather(outs, x)

    def broadcast(self, x: Tensor, root: int) -> Work:
        return self._flat.broadcast(x, root)

    def reduce(self, x: Tensor, root: int, op: ReduceOp = ReduceOp.SUM) -> Work:
        return self._flat.reduce(x, root, op)

    def gather(self, outs: Sequence[Tensor] | None, x: Tensor, root: int) -> Work:
        return self._flat.gather(outs, x, root)

    def scatter(self, out: Tensor, inputs: Sequence[Tensor] | None, root: int) -> Work:
        return self._flat.scatter(out, inputs, root)

    def all_to_all(self, outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Work:
        return self._flat.all_to_all(outs, inputs)

    def barrier(self) -> Work:
        return self._flat.barrier()

    def send(self, x: Tensor, peer: int, tag: int = 0) -> Work:
        return self._flat.send(x, peer, tag)

    def recv(self, x: Tensor, peer: int, tag: int = 0) -> Work:
        return self._flat.recv(x, peer, tag)

    def batch(self, operations: Sequence[PointToPoint]) -> Work:
        return self._flat.batch(operations)

    def close(self) -> None:
        self._flat.close()
        for groups in self._layout.cross.values():
            for group in groups:
                group.close()
        self._inner.close()

    def _phases(self, x: Tensor, op: ReduceOp) -> Iterator[Waitable]:
        """Run all chunks through the three phases; yields what it waits for.

        `num_lanes` chunks are between the islands at once, and the next one's reduce-scatter has begun: the links
        always have something to carry. The inner group gets its operations in the same order on every member.

        Cost:
            Between islands 2(I-1)/I * bytes of the accumulation's format over all links of an island (bytes where
            I = 2), each link its share; inside, a reduce-scatter and an all-gather.

        Numerics:
            Summed inside each island by the inner group, then over the islands in their order; with a codec, each
            island's sum is rounded once to it first, its own too.
        """
        count = -(-x.nbytes // self._chunk_bytes)
        borders = [x.numel() * at // count for at in range(count + 1)] if count else []
        chunks = [IslandChunk(self._layout, x[start:stop], op) for start, stop in pairwise(borders)]
        gathers = []
        for at in range(len(chunks) + self._num_lanes):
            if at < len(chunks):
                chunks[at].scatter()
            if 0 <= at - 1 < len(chunks):
                yield from chunks[at - 1].cross((at - 1) % self._num_lanes)
            if 0 <= at - self._num_lanes < len(chunks):
                gathers.append((yield from chunks[at - self._num_lanes].gather()))
        yield from gathers


def _island_of(islands: Sequence[Sequence[int]], position: int) -> tuple[int, ...]:
    return next(tuple(island) for island in islands if position in island)
