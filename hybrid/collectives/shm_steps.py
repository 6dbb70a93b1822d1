"""The programs of a group on one host: what each member writes to the board and reads from it, round after round.

Each is an iterator that yields what it waits for, and ends when the operation has. The first round carries the header
by which members see that they have called the same thing. Nothing here decides which program runs.
May import only torch, `errors`, `transports.base` and this folder.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from hybrid.collectives.base import ReduceOp
from hybrid.collectives.elements import combine, combine_tile, wide_dtype
from hybrid.collectives.header import HEADER_BYTES, Header
from hybrid.collectives.scratch import Scratch
from hybrid.collectives.shm_board import Board
from hybrid.errors import ProtocolError
from hybrid.transports.base import Pending

_ALIGN_BYTES = 64
_PLACE = struct.Struct("<qqQ")
"""Number of a bucket (-1: none), where in it, and how many rounds this member needs."""
REDUCED_BYTES = 256 << 10
"""What a member reduces at a time in a bucket: small enough to stay in its cache until it is written to the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One operation as this member calls it."""

    board: Board
    header: Header
    scratch: Scratch
    op: ReduceOp = ReduceOp.SUM
    bucket: int = -1
    offset: int = 0

    def write_header(self, num_rounds: int, sizes: Sequence[int]) -> None:
        """Show what is called, and how many bytes go to each member."""
        place = _PLACE.pack(self.bucket, self.offset, num_rounds)
        self.board.write_header(self.header.encode() + place + struct.pack(f"<{len(sizes)}Q", *sizes))

    def read_headers(self, expected: Sequence[int | None]) -> tuple[bool, int]:
        """Check every member's header, once all have posted.

        Args:
            expected: bytes that this member takes from each; None: nothing.

        Returns:
            Whether all have their tensor at the same place of the same bucket, and how many rounds are needed.

        Raises:
            ProtocolError: a member called something else.
        """
        board, size = self.board, self.board.size
        same_place, num_rounds = self.bucket >= 0, 1
        for member in range(size):
            shown = board.header_of(member, HEADER_BYTES + _PLACE.size + 8 * size)
            self.header.check(shown[:HEADER_BYTES], member)
            bucket, offset, rounds = _PLACE.unpack_from(shown, HEADER_BYTES)
            (sent,) = struct.unpack_from("<Q", shown, HEADER_BYTES + _PLACE.size + 8 * board.rank)
            wanted = expected[member]
            if member != board.rank and wanted is not None and sent != wanted:
                raise ProtocolError(
                    f"member {member} gives another size than this one takes",
                    value=f"{sent} bytes",
                    valid=f"{wanted} bytes",
                    fix="name the same sizes at both ends of each transfer",
                )
            same_place = same_place and (bucket, offset) == (self.bucket, self.offset)
            num_rounds = max(num_rounds, rounds)
        return same_place, num_rounds


def fold(call: Call, parts: Sequence[Tensor], out: Tensor) -> None:
    """Reduce equally long parts in the order of ranks into `out`, accumulated as the contract says.

    Shapes:
        parts: each (N,).  out: (N,), in the same format; may be one of the parts.
    """
    if len(parts) == 1:
        out.copy_(parts[0])
        return
    wide = wide_dtype(out.dtype, call.op)
    divisor = len(parts) if call.op is ReduceOp.AVG else 1
    if wide == out.dtype:
        combine_tile(call.op, parts, out)
        if divisor > 1:
            out.div_(divisor)
        return
    running = call.scratch.take(out.numel(), wide)
    combine(call.op, parts, running)
    if divisor > 1:
        running.div_(divisor)
    out.copy_(running)
    call.scratch.give_back(running)


def all_reduce_small(call: Call, x: Tensor) -> Iterator[Pending]:
    """Show all of `x`, and reduce all of it on every member.

    Cost:
        One round; P x.nbytes read a member.
    """
    board = call.board
    board.begin()
    _copy(board.own[: x.nbytes], x.view(torch.uint8))
    call.write_header(1, [x.nbytes] * board.size)
    yield board.post()
    call.read_headers([x.nbytes] * board.size)
    fold(call, [board.of(member)[: x.nbytes].view(x.dtype) for member in range(board.size)], x)


def all_reduce_bucket(
    call: Call, x: Tensor, places: Sequence[Tensor], otherwise: Callable[[], Iterator[Pending]]
) -> Iterator[Pending]:
    """Reduce where the members' tensors lie: each member one part of all, written to all.

    Args:
        places: every member's tensor, in rank order.
        otherwise: what runs where not all members have theirs at the same place of the same bucket.

    Cost:
        Two rounds; x.nbytes read and written a member, nothing copied.
    """
    board = call.board
    board.begin()
    call.write_header(1, [x.nbytes] * board.size)
    yield board.post()
    same_place, _ = call.read_headers([x.nbytes] * board.size)
    if not same_place:
        yield from otherwise()
        return
    start, stop = _borders(x.numel(), board.size)[board.rank]
    step = REDUCED_BYTES // x.dtype.itemsize
    for low in range(start, stop, step):
        tile = slice(low, min(low + step, stop))
        parts = [place[tile] for place in places]
        fold(call, parts, parts[board.rank])
        for member, part in enumerate(parts):
            if member != board.rank:
                _copy(part, parts[board.rank])
    board.begin()
    yield board.post()


def all_reduce_staged(call: Call, x: Tensor) -> Iterator[Pending]:
    """Reduce tensors that lie anywhere: each member gives the others their tiles, reduces its own, shows the result.

    Cost:
        ceil(x.nbytes / (P tile)) + 2 rounds; (P-1)/P x.nbytes copied to the board and (P-1)/P back a member.
    """
    board, tile = call.board, call.board.layout.tile_bytes // x.dtype.itemsize
    tile_bytes = tile * x.dtype.itemsize
    tile_of = [_cut(part, tile) for part in _parts(x, board.size)]
    num_tiles = max(len(tiles) for tiles in tile_of)

    def region(buffer: Tensor, at: int, like: Tensor) -> Tensor:
        start = at * board.layout.tile_bytes
        return buffer[start : start + like.nbytes].view(x.dtype)

    assert tile_bytes <= board.layout.tile_bytes, "a tile fits its region"
    for number in range(num_tiles + 1):
        board.begin()
        for member, tiles in enumerate(tile_of):
            if member != board.rank and number < len(tiles):
                _copy(region(board.own, member, tiles[number]), tiles[number])
        if 0 < number <= len(tile_of[board.rank]):
            done = tile_of[board.rank][number - 1]
            _copy(region(board.own, board.size, done), done)
        if number == 0:
            call.write_header(1, [x.nbytes] * board.size)
        yield board.post()
        if number == 0:
            call.read_headers([x.nbytes] * board.size)
        if number < len(tile_of[board.rank]):
            mine = tile_of[board.rank][number]
            fold(call, _gathered(board, mine, region), mine)
        for member, tiles in enumerate(tile_of):
            if member != board.rank and 0 < number <= len(tiles):
                _copy(tiles[number - 1], region(board.of(member), board.size, tiles[number - 1]))


def reduce_scatter(call: Call, out: Tensor, inputs: Sequence[Tensor]) -> Iterator[Pending]:
    """Give each member its input tile by tile, and reduce one's own into `out`.

    Cost:
        ceil(largest input / tile) rounds; every input but one's own is copied to the board once.
    """
    board, tile = call.board, call.board.layout.tile_bytes // out.dtype.itemsize
    given, taken, own = [_cut(x, tile) for x in inputs], _cut(out, tile), _cut(inputs[call.board.rank], tile)
    sizes = [x.nbytes for x in inputs]

    def region(buffer: Tensor, at: int, like: Tensor) -> Tensor:
        start = at * board.layout.tile_bytes
        return buffer[start : start + like.nbytes].view(out.dtype)

    def write(number: int) -> None:
        for member, tiles in enumerate(given):
            if member != board.rank and number < len(tiles):
                _copy(region(board.own, member, tiles[number]), tiles[number])

    def read(number: int) -> None:
        if number < len(taken):
            fold(call, _gathered(board, own[number], region), taken[number])

    yield from _rounds(call, max(map(len, given)), sizes, [out.nbytes] * board.size, write, read)


def reduce_to_root(call: Call, x: Tensor, root: int) -> Iterator[Pending]:
    """Show all of `x`, and reduce it on the root.

    Cost:
        ceil(x.nbytes / buffer) rounds; P x.nbytes read at the root.
    """
    board = call.board
    tiles = _cut(x, board.layout.buffer_bytes // x.dtype.itemsize)

    def write(number: int) -> None:
        if board.rank != root and number < len(tiles):
            _copy(board.own[: tiles[number].nbytes], tiles[number].view(torch.uint8))

    def read(number: int) -> None:
        if board.rank == root and number < len(tiles):
            tile = tiles[number]
            parts = [board.of(member)[: tile.nbytes].view(tile.dtype) for member in range(board.size)]
            parts[root] = tile
            fold(call, parts, tile)

    yield from _rounds(call, len(tiles), [x.nbytes] * board.size, [x.nbytes] * board.size, write, read)


def show_to_all(call: Call, given: Tensor | None, taken: Sequence[Tensor | None]) -> Iterator[Pending]:
    """Show the same bytes to everyone: broadcast, gather and all_gather.

    Args:
        given: what this member shows, as bytes; None: nothing.
        taken: where each member's bytes go; None: nowhere.

    Cost:
        ceil(largest / buffer) rounds; each member's bytes are copied to the board once and from it by each taker.
    """
    board, step = call.board, call.board.layout.buffer_bytes
    shown = [] if given is None else _cut(given, step)
    landing = [[] if place is None else _cut(place, step) for place in taken]

    def write(number: int) -> None:
        if number < len(shown):
            _copy(board.own[: shown[number].nbytes], shown[number])

    def read(number: int) -> None:
        for member, places in enumerate(landing):
            if member != board.rank and number < len(places):
                _copy(places[number], board.of(member)[: places[number].nbytes])

    sizes = [0 if given is None else given.nbytes] * board.size
    expected = [None if place is None else place.nbytes for place in taken]
    yield from _rounds(call, len(shown), sizes, expected, write, read)


def give_to_each(call: Call, given: Sequence[Tensor | None], taken: Sequence[Tensor | None]) -> Iterator[Pending]:
    """Show each member other bytes: scatter and all_to_all.

    Args:
        given: what goes to each member, as bytes.  taken: where each member's bytes go.

    Cost:
        ceil(largest / tile) rounds; all bytes but one's own are copied to the board once and from it once.
    """
    board, step = call.board, call.board.layout.tile_bytes
    shown = [[] if x is None or member == board.rank else _cut(x, step) for member, x in enumerate(given)]
    landing = [[] if x is None else _cut(x, step) for x in taken]

    def write(number: int) -> None:
        for member, tiles in enumerate(shown):
            if number < len(tiles):
                _copy(board.own[member * step : member * step + tiles[number].nbytes], tiles[number])

    def read(number: int) -> None:
        for member, places in enumerate(landing):
            if member != board.rank and number < len(places):
                start = board.rank * step
                _copy(places[number], board.of(member)[start : start + places[number].nbytes])

    sizes = [0 if x is None else x.nbytes for x in given]
    expected = [None if x is None else x.nbytes for x in taken]
    yield from _rounds(call, max(map(len, shown)), sizes, expected, write, read)


def barrier(call: Call) -> Iterator[Pending]:
    """End when every member has called.

    Cost:
        One round.
    """
    nothing = [0] * call.board.size
    yield from _rounds(call, 1, nothing, nothing, lambda number: None, lambda number: None)


def _rounds(
    call: Call,
    num_rounds: int,
    sizes: Sequence[int],
    expected: Sequence[int | None],
    write: Callable[[int], None],
    read: Callable[[int], None],
) -> Iterator[Pending]:
    """Write, post, wait and read, as often as the member with the most to give needs."""
    board = call.board
    most, number = 1, 0
    while number < most:
        board.begin()
        if number < num_rounds:
            write(number)
        if number == 0:
            call.write_header(num_rounds, sizes)
        yield board.post()
        if number == 0:
            _, most = call.read_headers(expected)
        read(number)
        number += 1


def _copy(target: Tensor, source: Tensor) -> None:
    """Copy equally many bytes in this thread: torch would wake its pool, whose threads spin where cores are scarce."""
    np.copyto(target.view(torch.uint8).numpy(), source.view(torch.uint8).numpy())


def _gathered(board: Board, own: Tensor, region: Callable[[Tensor, int, Tensor], Tensor]) -> list[Tensor]:
    """Return every member's part for this one, in rank order."""
    return [own if member == board.rank else region(board.of(member), board.rank, own) for member in range(board.size)]


def _borders(num_elements: int, count: int) -> list[tuple[int, int]]:
    """Return begin and end of `count` parts, each but the last a multiple of a cache line's elements."""
    at = [
        min(num_elements, -(-num_elements * index // (count * _ALIGN_BYTES)) * _ALIGN_BYTES) for index in range(count)
    ]
    return list(pairwise([*at, num_elements]))


def _parts(x: Tensor, count: int) -> list[Tensor]:
    return [x[start:stop] for start, stop in _borders(x.numel(), count)]


def _cut(x: Tensor, step: int) -> list[Tensor]:
    """Return a vector in tiles; none where it is empty."""
    return [x[start : start + step] for start in range(0, x.numel(), step)]
