"""One chunk of a tensor on its way through a hierarchical all-reduce: inside, across, inside.

May import only torch and this folder.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from hybrid.collectives.base import Group, ReduceOp, Work
from hybrid.collectives.codecs import NARROW_FORMATS, Codec
from hybrid.collectives.elements import combine, wide_dtype
from hybrid.collectives.progress import Waitable
from hybrid.collectives.scratch import Scratch
from hybrid.collectives.striping import Piece, borders_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Layout:
    """Where a member stands in the hierarchy; see `HierarchicalGroup`."""

    pieces: tuple[Piece, ...]
    island: tuple[int, ...]
    """The positions of this member's island."""
    at: int
    """Which island that is."""
    rank: int
    size: int
    inner: Group
    cross: Mapping[tuple[int, ...], tuple[Group, ...]]
    codec: Codec | None
    scratch: Scratch


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Letter:
    """A piece on its way between the islands in a codec's bytes."""

    piece: Tensor
    encoded: tuple[Tensor, ...]
    """One an island."""


@final
class IslandChunk:
    """The three phases; each is begun on every member of the island in the same order.

    Shapes:
        x: (N,), written in place.
    """

    def __init__(self, layout: Layout, x: Tensor, op: ReduceOp) -> None:
        self._layout, self._x = layout, x
        self._mean = op is ReduceOp.AVG
        self._op = ReduceOp.SUM if self._mean else op
        self._wide = wide_dtype(x.dtype, op)
        self._sums: Tensor = x
        self._scattered: Work | None = None
        self._crossing: list[Work] = []
        self._letters: list[_Letter] = []

    def scatter(self) -> None:
        """Begin the reduce-scatter inside the island, in place."""
        if self._wide != self._x.dtype:
            self._sums = self._layout.scratch.take(len(self._x), self._wide).copy_(self._x)
        runs = self._runs(self._sums)
        self._scattered = self._layout.inner.reduce_scatter(runs[self._place], runs, self._op)

    def cross(self, lane: int) -> Iterator[Waitable]:
        """Wait for that, and begin the exchange of this member's pieces with the other islands' owners."""
        assert self._scattered is not None, "a chunk crosses after it was scattered"
        yield self._scattered
        for piece, part in zip(self._layout.pieces, self._cut(self._sums), strict=True):
            if self._layout.rank in piece.owners and part.numel() and len(piece.owners) > 1:
                self._crossing.append(self._exchange(self._layout.cross[piece.owners][lane], part))

    def gather(self) -> Generator[Waitable, None, Work]:
        """Wait for that, finish this member's run, and begin the all-gather inside; returns its work."""
        yield from self._crossing
        for letter in self._letters:
            self._decode(letter)
        runs, sums = self._runs(self._x), self._runs(self._sums)
        if self._mean:
            sums[self._place].div_(self._layout.size)
        if self._sums is not self._x:
            runs[self._place].copy_(sums[self._place])
            self._layout.scratch.give_back(self._sums)
        return self._layout.inner.all_gather(runs, runs[self._place])

    @property
    def _place(self) -> int:
        return self._layout.island.index(self._layout.rank)

    def _cut(self, x: Tensor) -> list[Tensor]:
        """Return the pieces of a vector."""
        borders = [0, *borders_of(self._layout.pieces, len(x))]
        return [x[start:stop] for start, stop in pairwise(borders)]

    def _runs(self, x: Tensor) -> list[Tensor]:
        """Return what each member of this island owns of a vector: one run of pieces."""
        borders = [0, *borders_of(self._layout.pieces, len(x))]
        runs = []
        for member in self._layout.island:
            owned = [at for at, piece in enumerate(self._layout.pieces) if piece.owners[self._layout.at] == member]
            runs.append(x[borders[owned[0]] : borders[owned[-1] + 1]])
        return runs

    def _exchange(self, group: Group, part: Tensor) -> Work:
        codec = self._layout.codec
        if codec is None or self._op is not ReduceOp.SUM or part.dtype not in NARROW_FORMATS:
            return group.all_reduce(part, self._op)
        size_bytes = codec.encoded_bytes(len(part), part.dtype)
        encoded = tuple(self._layout.scratch.take(size_bytes, torch.uint8) for _ in group.ranks)
        codec.encode(part, encoded[group.rank])
        self._letters.append(_Letter(piece=part, encoded=encoded))
        return group.all_gather(encoded, encoded[group.rank])

    def _decode(self, letter: _Letter) -> None:
        """Add up what every island has sent, this one's own bytes too: the same bits at every owner."""
        assert self._layout.codec is not None, "a letter is in a codec's bytes"
        decoded = [self._layout.scratch.take(len(letter.piece), letter.piece.dtype) for _ in letter.encoded]
        for data, numbers in zip(letter.encoded, decoded, strict=True):
            self._layout.codec.decode(data, numbers)
        combine(ReduceOp.SUM, decoded, letter.piece)
        for part in (*letter.encoded, *decoded):
            self._layout.scratch.give_back(part)
