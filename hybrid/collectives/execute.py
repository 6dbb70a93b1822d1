"""The interpreter of collective programs: posts sends and receives, reduces what came in; yields what it waits for.

The elements are cut into segments that go through the program one behind the other, so that one segment's reduction
overlaps with others' transfers. May import only torch, `errors`, `transports.base` and this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hybrid.collectives.algorithms.program import Program, Step, Transfer
from hybrid.collectives.base import ReduceOp
from hybrid.collectives.elements import bytes_of, combine
from hybrid.collectives.header import HEADER_BYTES, Header
from hybrid.collectives.scratch import Scratch
from hybrid.transports.base import Pending, Transport

_SPACING = 2
"""How many segments start between two steps of one segment: that many are under way at each step."""
_AHEAD = 4
"""How many steps ahead receives are posted, so that messages land where they belong."""


@dataclass(slots=True, kw_only=True)
class Segment:
    """Part of an operation's blocks on its way through the program; None is a block that this member does not hold."""

    inputs: Sequence[Tensor | None]
    results: Sequence[Tensor | None]
    """Where finished blocks land; may be the inputs themselves."""
    shapes: Sequence[int]
    """Elements of each block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One operation of one member."""

    program: Program
    segments: Sequence[Segment]
    header: Header
    wide: torch.dtype
    """The accumulation's format."""
    op: ReduceOp = ReduceOp.SUM
    divisor: int = 1


class Mail:
    """One operation's messages over the edges; the first to each peer carries the header."""

    def __init__(self, edges: Mapping[int, Transport], tag: str, header: Header) -> None:
        self._edges, self._tag, self._header = edges, tag, header
        self._encoded = header.encode()
        self._written: set[int] = set()
        self._read: set[int] = set()

    def send(self, peer: int, buffers: list[memoryview]) -> Pending:
        """Start sending one message."""
        if peer in self._written:
            return self._edges[peer].send(self._tag, buffers)
        self._written.add(peer)
        return self._edges[peer].send(self._tag, [self._encoded, *buffers])

    def receive(self, peer: int, buffers: list[memoryview]) -> tuple[Pending, Callable[[], None]]:
        """Post one receive; call what is returned beside it once it has come."""
        if peer in self._read:
            return self._edges[peer].recv(self._tag, buffers), _nothing
        self._read.add(peer)
        landing = bytearray(HEADER_BYTES)
        pending = self._edges[peer].recv(self._tag, [memoryview(landing), *buffers])
        return pending, lambda: self._header.check(bytes(landing), self._edges[peer].peer)


def _nothing() -> None:
    pass


@dataclass(slots=True)
class _Receipt:
    """A receive under way."""

    transfer: Transfer
    pending: Pending
    check: Callable[[], None]
    parts: list[Tensor]
    """Scratch, one a block; empty where the blocks are received in place."""


@dataclass(slots=True)
class _Lane:
    """A segment and where each of its blocks is now."""

    segment: Segment
    now: list[Tensor | None]
    receipts: dict[int, list[_Receipt]] = field(default_factory=dict)
    sends: list[tuple[Pending, tuple[int, ...]]] = field(default_factory=list)
    scratch: dict[int, Tensor] = field(default_factory=dict)
    """Accumulators, by block."""


def execute(job: Job, mail: Mail, scratch: Scratch, rank: int) -> Iterator[Pending]:
    """Run one member's program; yields each pending transfer that must have ended before it is asked to go on.

    Cost:
        Scratch for the blocks of about `_SPACING + _AHEAD` steps.
    """
    run = _Run(job, mail, scratch, rank)
    items = _wavefront(len(job.segments), len(job.program.steps))
    posted = 0
    for at, (segment, step) in enumerate(items):
        while posted < len(items) and posted <= at + _AHEAD:
            run.post(*items[posted])
            posted += 1
        yield from run.finish_step(segment, step - 1)
        if step < len(job.program.steps):
            run.send(segment, step)
        else:
            yield from run.leave(segment)


def _wavefront(num_segments: int, num_steps: int) -> list[tuple[int, int]]:
    """Return (segment, step) in the order of execution, the same on every member; step `num_steps` ends a segment."""
    pairs = [(segment, step) for segment in range(num_segments) for step in range(num_steps + 1)]
    return sorted(pairs, key=lambda pair: (pair[0] + _SPACING * pair[1], pair[0]))


class _Run:
    """The state of `execute`."""

    def __init__(self, job: Job, mail: Mail, scratch: Scratch, rank: int) -> None:
        self._job, self._mail, self._scratch, self._rank = job, mail, scratch, rank
        self._steps = job.program.steps
        self._num_reduce = len(job.program.reduce)
        self._lanes = [_Lane(segment, list(segment.inputs)) for segment in job.segments]

    def post(self, segment: int, step: int) -> None:
        """Post the receives of one step."""
        if step < len(self._steps):
            lane = self._lanes[segment]
            lane.receipts[step] = [self._receive(lane, step, each) for each in self._steps[step].receives]

    def send(self, segment: int, step: int) -> None:
        """Start the sends of one step."""
        lane = self._lanes[segment]
        for transfer in self._steps[step].sends:
            buffers = [bytes_of(_held(lane.now[block])) for block in transfer.blocks]
            lane.sends.append((self._mail.send(transfer.peer, buffers), transfer.blocks))

    def finish_step(self, segment: int, step: int) -> Iterator[Pending]:
        """Wait for one step's receives, and take them in; after the last reduction, finish the member's blocks."""
        lane = self._lanes[segment]
        if step >= 0:
            for receipt in lane.receipts[step]:
                yield receipt.pending
                receipt.check()
            receipts = lane.receipts.pop(step)
            if self._steps[step].combine:
                yield from self._reduce(lane, self._steps[step], receipts)
            else:
                self._store(lane, receipts)
        if step == self._num_reduce - 1:
            for block in self._job.program.finish:
                yield from self._finish(lane, block)

    def leave(self, segment: int) -> Iterator[Pending]:
        """Wait for a segment's sends, and give its memory back."""
        lane = self._lanes[segment]
        for pending, _ in lane.sends:
            yield pending
        for part in lane.scratch.values():
            self._scratch.give_back(part)
        lane.sends.clear()
        lane.scratch.clear()

    def _receive(self, lane: _Lane, step: int, transfer: Transfer) -> _Receipt:
        parts: list[Tensor] = []
        if self._steps[step].combine:
            dtype = self._job.wide if transfer.partial else self._job.header.dtype
            parts = [self._scratch.take(lane.segment.shapes[block], dtype) for block in transfer.blocks]
            targets = parts
        elif transfer.partial:
            targets = [self._accumulator(lane, block) for block in transfer.blocks]
        else:
            targets = [_held(lane.segment.results[block]) for block in transfer.blocks]
        pending, check = self._mail.receive(transfer.peer, [bytes_of(target) for target in targets])
        return _Receipt(transfer, pending, check, parts)

    def _reduce(self, lane: _Lane, step: Step, receipts: list[_Receipt]) -> Iterator[Pending]:
        for index, block in enumerate(receipts[0].transfer.blocks):
            yield from self._unsent(lane, block)
            part_of = {receipt.transfer.peer: receipt.parts[index] for receipt in receipts}
            part_of[self._rank] = _held(lane.now[block])
            out = self._accumulator(lane, block)
            combine(self._job.op, [part_of[position] for position in step.combine], out)
            lane.now[block] = out
        for receipt in receipts:
            for part in receipt.parts:
                self._scratch.give_back(part)

    def _store(self, lane: _Lane, receipts: list[_Receipt]) -> None:
        for receipt in receipts:
            for block in receipt.transfer.blocks:
                kept = lane.scratch.get(block) if receipt.transfer.partial else None
                lane.now[block] = lane.segment.results[block] if kept is None else kept

    def _accumulator(self, lane: _Lane, block: int) -> Tensor:
        """Return where a block is summed: in its result, if that has the format, else in scratch."""
        result = lane.segment.results[block]
        if result is not None and result.dtype == self._job.wide:
            return result
        if block not in lane.scratch:
            lane.scratch[block] = self._scratch.take(lane.segment.shapes[block], self._job.wide)
        return lane.scratch[block]

    def _finish(self, lane: _Lane, block: int) -> Iterator[Pending]:
        value, result = _held(lane.now[block]), _held(lane.segment.results[block])
        yield from self._unsent(lane, block)
        if self._job.divisor != 1:
            value = torch.div(value, self._job.divisor, out=self._accumulator(lane, block))
        if value.data_ptr() != result.data_ptr() or value.dtype != result.dtype:
            result.copy_(value)
        lane.now[block] = result

    def _unsent(self, lane: _Lane, block: int) -> Iterator[Pending]:
        """Wait until no send reads the block any more."""
        for pending, blocks in lane.sends:
            if block in blocks:
                yield pending


def _held(x: Tensor | None) -> Tensor:
    assert x is not None, "a program uses a block that this member does not hold"
    return x
