"""A group with one fault planted in it, laid around a good one: what the group kit must refuse.

These are the mistakes that the author of a group makes. May import only torch, `errors` and `collectives`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import final

import torch
from torch import Tensor

from hybrid.collectives.base import Group, PointToPoint, ReduceOp, Work
from hybrid.errors import CommError, CommTimeout, PeerLost, ProtocolError, UserError


class Fault(StrEnum):
    """What is wrong with a `FaultyGroup`."""

    WRONG_ELEMENT = "wrong element"
    """The last element of a reduction is wrong on every rank."""
    DROPPED = "dropped"
    """The last rank's contribution is left out."""
    WRONG_BLOCK = "wrong block"
    """An all_gather's tensors stand in another order."""
    OTHER_BITS = "other bits"
    """One rank's sum differs in the last place."""
    NARROW = "narrow"
    """Narrow floats are accumulated in their own format."""
    INTEGER_AVERAGE = "integer average"
    """The average of integers is rounded and not refused."""
    COPY = "copy"
    """The result of a tensor with several dims stands in a copy."""
    WRITE_INPUT = "write input"
    """A reduction writes into what is only an input."""
    BLOCK = "block"
    """A call waits for its end."""
    DONE_EARLY = "done early"
    """An operation says that it is done before it is."""
    NO_WAIT = "no wait"
    """A wait returns before the end."""
    REORDER = "reorder"
    """Every second all_reduce overtakes the one before."""
    MIX_TAGS = "mix tags"
    """Sends and receives forget their tags."""
    IN_TURN = "in turn"
    """A batch ends each of its sends before it starts a receive."""
    EVEN_ONLY = "even only"
    """Sizes that differ by rank are cut to the first's."""
    READ_LATE = "read late"
    """An all_gather ends before its input was read."""
    SWALLOW_TIMEOUT = "swallow timeout"
    """A wait that timed out returns as if all were well."""
    OVERSTAY = "overstay"
    """A wait goes on after its time-out."""
    ONE_WAIT = "one wait"
    """After a time-out an operation cannot be waited for again."""
    DEAF = "deaf"
    """The loss of a member shows as silence."""
    SWALLOW_LOSS = "swallow loss"
    """An operation that failed with a member ends as if all were well."""
    SWALLOW_MISUSE = "swallow misuse"
    """An operation that did not fit the peer's ends as if all were well."""
    TAKE_ANYTHING = "take anything"
    """A tensor that is not contiguous is taken, and a copy of it reduced."""
    CLOSE_ONCE = "close once"
    """A second close is an error."""
    CLOSE_LATE = "close late"
    """A close leaves pending operations waiting."""
    LEAK = "leak"
    """A close leaves a thread."""


CLAUSE_OF_FAULT: dict[Fault, str] = {
    Fault.WRONG_ELEMENT: "reductions",
    Fault.DROPPED: "reductions",
    Fault.WRONG_BLOCK: "moves",
    Fault.OTHER_BITS: "same bits",
    Fault.NARROW: "numerics",
    Fault.INTEGER_AVERAGE: "numerics",
    Fault.COPY: "in place",
    Fault.WRITE_INPUT: "reductions",
    Fault.BLOCK: "asynchronous",
    Fault.DONE_EARLY: "asynchronous",
    Fault.NO_WAIT: "asynchronous",
    Fault.REORDER: "order",
    Fault.MIX_TAGS: "point to point",
    Fault.IN_TURN: "point to point",
    Fault.EVEN_ONLY: "uneven",
    Fault.READ_LATE: "large",
    Fault.SWALLOW_TIMEOUT: "bounded waits",
    Fault.OVERSTAY: "bounded waits",
    Fault.ONE_WAIT: "bounded waits",
    Fault.DEAF: "loss is told",
    Fault.SWALLOW_LOSS: "loss is told",
    Fault.SWALLOW_MISUSE: "misuse is refused",
    Fault.TAKE_ANYTHING: "misuse is refused",
    Fault.CLOSE_ONCE: "close",
    Fault.CLOSE_LATE: "close",
    Fault.LEAK: "close",
}
"""The clause of the group kit that refuses each fault."""

LEAKED: list[threading.Event] = []
"""What ends the threads that `Fault.LEAK` left; for the test to set."""

_OVERSTAY_S = 0.8
_BLOCK_S = 1.0


@final
class FaultyGroup(Group):
    """`inner` with `fault` planted; with None a wrapper that changes nothing."""

    def __init__(self, inner: Group, fault: Fault | None) -> None:
        self.rank, self.ranks = inner.rank, inner.ranks
        self._inner, self._fault = inner, fault
        self._closed = False
        self._num_reduced = 0
        self._held_back: tuple[Tensor, ReduceOp, _Deferred] | None = None

    def all_reduce(self, x: Tensor, op: ReduceOp = ReduceOp.SUM) -> Work:
        last = self.rank == self.size - 1
        match self._fault:
            case Fault.WRONG_ELEMENT if x.numel():
                return self._then(self._inner.all_reduce(x, op), lambda: x.view(-1)[-1:].zero_())
            case Fault.DROPPED if last and self.size > 1:
                return self._inner.all_reduce(x.zero_(), op)
            case Fault.OTHER_BITS if last and x.is_floating_point():
                return self._then(self._inner.all_reduce(x, op), lambda: _next(x))
            case Fault.NARROW if x.is_floating_point() and x.element_size() == 2 and op is ReduceOp.SUM:
                return self._add_one_by_one(x)
            case Fault.INTEGER_AVERAGE if op is ReduceOp.AVG and not x.is_floating_point():
                return self._inner.all_reduce(x, ReduceOp.SUM)
            case Fault.COPY if x.dim() > 1:
                return self._inner.all_reduce(x.clone(), op)
            case Fault.TAKE_ANYTHING:
                return self._inner.all_reduce(x.contiguous(), op)
            case Fault.REORDER:
                return self._reordered(x, op)
        return self._faulty(self._inner.all_reduce(x, op))

    def reduce_scatter(self, out: Tensor, inputs: Sequence[Tensor], op: ReduceOp = ReduceOp.SUM) -> Work:
        if self._fault is Fault.EVEN_ONLY:
            count = min(x.numel() for x in inputs)
            return self._inner.reduce_scatter(out[:count], [x[:count] for x in inputs], op)
        return self._faulty(self._inner.reduce_scatter(out, inputs, op))

    def all_gather(self, outs: Sequence[Tensor], x: Tensor) -> Work:
        if self._fault is Fault.WRONG_BLOCK and len({out.numel() for out in outs}) == 1:
            return self._inner.all_gather(outs, x) if self.size == 1 else self._shuffled(outs, x)
        if self._fault is Fault.READ_LATE:
            # The others' tensors come when they come: what they hold at the end of the wait is not looked at.
            return _Deferred(self._inner.all_gather(outs, x), early=True)
        return self._faulty(self._inner.all_gather(outs, x))

    def broadcast(self, x: Tensor, root: int) -> Work:
        return self._faulty(self._inner.broadcast(x, root))

    def reduce(self, x: Tensor, root: int, op: ReduceOp = ReduceOp.SUM) -> Work:
        if self._fault is Fault.WRITE_INPUT and self.rank != root:
            return self._then(self._inner.reduce(x, root, op), lambda: x.zero_())
        return self._faulty(self._inner.reduce(x, root, op))

    def gather(self, outs: Sequence[Tensor] | None, x: Tensor, root: int) -> Work:
        return self._faulty(self._inner.gather(outs, x, root))

    def scatter(self, out: Tensor, inputs: Sequence[Tensor] | None, root: int) -> Work:
        return self._faulty(self._inner.scatter(out, inputs, root))

    def all_to_all(self, outs: Sequence[Tensor], inputs: Sequence[Tensor]) -> Work:
        return self._faulty(self._inner.all_to_all(outs, inputs))

    def barrier(self) -> Work:
        return self._faulty(self._inner.barrier())

    def send(self, x: Tensor, peer: int, tag: int = 0) -> Work:
        return self._faulty(self._inner.send(x, peer, 0 if self._fault is Fault.MIX_TAGS else tag))

    def recv(self, x: Tensor, peer: int, tag: int = 0) -> Work:
        return self._faulty(self._inner.recv(x, peer, 0 if self._fault is Fault.MIX_TAGS else tag))

    def batch(self, operations: Sequence[PointToPoint]) -> Work:
        if self._fault is Fault.IN_TURN:
            return _InTurn(self._inner, operations)
        return self._faulty(self._inner.batch(operations))

    def close(self) -> None:
        if self._fault is Fault.CLOSE_ONCE and self._closed:
            raise OSError("this group was closed before")
        if self._fault is Fault.LEAK and not self._closed:
            LEAKED.append(threading.Event())
            threading.Thread(target=LEAKED[-1].wait, args=(60.0,), name="leaked", daemon=True).start()
        self._closed = True
        if self._fault is not Fault.CLOSE_LATE:
            self._inner.close()

    def _faulty(self, work: Work) -> Work:
        if self._fault is Fault.BLOCK:
            with contextlib.suppress(CommError):
                work.wait(_BLOCK_S)
        return _FaultyWork(work, self._fault)

    def _then(self, work: Work, spoil: Callable[[], object]) -> Work:
        return _Deferred(work, spoil=spoil)

    def _add_one_by_one(self, x: Tensor) -> Work:
        parts = [torch.empty_like(x) for _ in self.ranks]

        def add() -> None:
            x.zero_()
            for part in parts:
                x.add_(part)

        return _Deferred(self._inner.all_gather(parts, x.clone()), spoil=add)

    def _shuffled(self, outs: Sequence[Tensor], x: Tensor) -> Work:
        if any(out.data_ptr() == x.data_ptr() for out in outs):
            x = x.clone()
        return self._inner.all_to_all([outs[self.rank - at] for at in range(self.size)], [x] * self.size)

    def _reordered(self, x: Tensor, op: ReduceOp) -> Work:
        """Start every second reduction before the one before it, on all ranks alike."""
        if self._held_back is None:
            self._held_back = (x, op, _Deferred(None))
            return self._held_back[2]
        work = self._inner.all_reduce(x, op)
        held, held_op, handle = self._held_back
        self._held_back = None
        handle.begin(self._inner.all_reduce(held, held_op))
        return work


def _next(x: Tensor) -> None:
    x.copy_(torch.nextafter(x, torch.full_like(x, float("inf"))) if x.element_size() > 2 else x * 1.01)


@final
class _Deferred(Work):
    """Does something to the result at the end; or begins late; or ends before the end."""

    def __init__(self, inner: Work | None, *, spoil: Callable[[], object] | None = None, early: bool = False) -> None:
        self._inner, self._spoil, self._early = inner, spoil, early
        self._begun = threading.Event()
        if inner is not None:
            self._begun.set()

    def begin(self, inner: Work) -> None:
        self._inner = inner
        self._begun.set()

    def done(self) -> bool:
        return self._early or (self._inner is not None and self._inner.done())

    def wait(self, timeout_s: float | None = None) -> None:
        if self._early:
            return
        if not self._begun.wait(timeout_s) or self._inner is None:
            raise CommTimeout("the operation was held back")
        self._inner.wait(timeout_s)
        if self._spoil is not None:
            self._spoil()
            self._spoil = None


@final
class _InTurn(Work):
    """Sends, and only then receives."""

    def __init__(self, inner: Group, operations: Sequence[PointToPoint]) -> None:
        self._inner, self._operations = inner, operations

    def done(self) -> bool:
        return False

    def wait(self, timeout_s: float | None = None) -> None:
        for each in sorted(self._operations, key=lambda each: each.kind, reverse=True):
            if each.kind == "send":
                # A receipt says that the peer has it, which it says only when its own send has ended.
                self._inner.send(each.x, each.peer, each.tag).wait(timeout_s)
                self._inner.recv(torch.empty(0), each.peer, each.tag + 1).wait(timeout_s)
            else:
                self._inner.recv(each.x, each.peer, each.tag).wait(timeout_s)
                self._inner.send(torch.empty(0), each.peer, each.tag + 1).wait(timeout_s)


@final
class _FaultyWork(Work):
    def __init__(self, inner: Work, fault: Fault | None) -> None:
        self._inner, self._fault = inner, fault
        self._timed_out = False

    def done(self) -> bool:
        return self._fault is Fault.DONE_EARLY or self._inner.done()

    def wait(self, timeout_s: float | None = None) -> None:
        if self._fault is Fault.NO_WAIT:
            return
        if self._timed_out and self._fault is Fault.ONE_WAIT:
            raise UserError("this operation was given up")
        try:
            self._inner.wait(timeout_s)
        except CommTimeout:
            self._timed_out = True
            if self._fault is Fault.OVERSTAY:
                deadline_s = time.monotonic() + _OVERSTAY_S
                while time.monotonic() < deadline_s and not self._inner.done():
                    with contextlib.suppress(CommError):
                        self._inner.wait(0.1)
            if self._fault is not Fault.SWALLOW_TIMEOUT:
                raise
        except ProtocolError:
            if self._fault is not Fault.SWALLOW_MISUSE:
                raise
        except PeerLost:
            if self._fault is Fault.DEAF:
                raise CommTimeout("a member is silent") from None
            if self._fault is not Fault.SWALLOW_LOSS:
                raise
