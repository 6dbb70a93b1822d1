"""A transport with one fault planted in it, laid around a good one: what a kit must refuse.

Faults of the medium that a training job may meet (a lost peer, a slow link) are not here: these are the mistakes that
the author of a transport makes. May import only `errors` and `transports`.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import final

from hybrid.errors import CommError, CommTimeout, PeerLost, ProtocolError
from hybrid.transports.base import Buffer, Pending, Transport, as_bytes


class Fault(StrEnum):
    """What is wrong with a `FaultyTransport`."""

    CUT = "cut"
    """The last byte of a message is not received."""
    CORRUPT = "corrupt"
    """A bit of a message flips on the way."""
    READ_LATE = "read late"
    """A send ends before the buffers were read."""
    LOSE = "lose"
    """Some messages vanish."""
    DOUBLE = "double"
    """Some messages come twice."""
    REORDER = "reorder"
    """Some messages overtake the one before."""
    MIX_TAGS = "mix tags"
    """A receive takes the next message of whatever tag."""
    RECEIVE_AT_ONCE = "receive at once"
    """Posting a receive blocks until its message comes."""
    NO_WINDOW = "no window"
    """Sends end at once, however many messages nobody has received."""
    WAIT_FOR_RECEIVER = "wait for receiver"
    """A send ends only when its message was received."""
    CROP = "crop"
    """A message that does not fit is cropped or padded without a word."""
    SWALLOW_TIMEOUT = "swallow timeout"
    """A wait that timed out returns as if all were well."""
    OVERSTAY = "overstay"
    """A wait goes on after its time-out."""
    ONE_WAIT = "one wait"
    """After a time-out the operation cannot be waited for again."""
    DEAF = "deaf"
    """The loss of the peer shows as silence."""
    DROP_LAST = "drop last"
    """A close drops what was sent just before it."""
    CLOSE_ONCE = "close once"
    """A second close is an error."""
    CLOSE_LATE = "close late"
    """A close leaves pending operations waiting."""
    LEAK = "leak"
    """A close leaves a file open."""


CLAUSE_OF_FAULT: dict[Fault, str] = {
    Fault.CUT: "whole",
    Fault.CORRUPT: "whole",
    Fault.READ_LATE: "whole",
    Fault.LOSE: "once",
    Fault.DOUBLE: "once",
    Fault.REORDER: "ordered",
    Fault.MIX_TAGS: "tagged",
    Fault.RECEIVE_AT_ONCE: "posted ahead",
    Fault.NO_WINDOW: "window",
    Fault.WAIT_FOR_RECEIVER: "window",
    Fault.CROP: "fits",
    Fault.SWALLOW_TIMEOUT: "bounded waits",
    Fault.OVERSTAY: "bounded waits",
    Fault.ONE_WAIT: "bounded waits",
    Fault.DEAF: "loss is told",
    Fault.DROP_LAST: "loss is told",
    Fault.CLOSE_ONCE: "close",
    Fault.CLOSE_LATE: "close",
    Fault.LEAK: "close",
}
"""The clause of the transport kit that refuses each fault."""

LEAKED_FDS: list[int] = []
"""What `Fault.LEAK` left open; for the test to close."""

_EVERY = 7
_LATE_S = 0.03
_OVERSTAY_S = 0.8


@final
class FaultyTransport(Transport):
    """`inner` with `fault` planted; with None a wrapper that changes nothing."""

    def __init__(self, inner: Transport, fault: Fault | None) -> None:
        self.peer, self.window_bytes = inner.peer, inner.window_bytes
        self._inner, self._fault = inner, fault
        self._num_sent = 0
        self._held_back: tuple[str, list[bytes]] | None = None
        self._late: list[threading.Timer] = []
        self._closed = False

    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        self._num_sent += 1
        chosen = self._num_sent % _EVERY == 0
        copies = [bytes(buffer) for buffer in buffers]
        match self._fault:
            case Fault.CORRUPT:
                return self._inner.send(tag, _with_a_bit_flipped(copies))
            case Fault.READ_LATE | Fault.DROP_LAST:
                timer = threading.Timer(_LATE_S, self._send_quietly, (tag, buffers))
                timer.start()
                self._late.append(timer)
                return _Done()
            case Fault.LOSE if chosen:
                return _Done()
            case Fault.DOUBLE if chosen:
                self._inner.send(tag, copies)
            case Fault.REORDER:
                return self._send_reordered(tag, copies, chosen)
            case Fault.MIX_TAGS:
                tag = "any"
            case Fault.NO_WINDOW:
                self._inner.send(tag, copies)
                return _Done()
            case Fault.WAIT_FOR_RECEIVER:
                receipt = self._inner.recv(f"receipt {tag}", [])
                self._inner.send(tag, copies)
                return receipt
        return _FaultyPending(self._inner.send(tag, buffers), self._fault)

    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        tag = "any" if self._fault is Fault.MIX_TAGS else tag
        if self._fault is Fault.CUT:
            whole = [memoryview(bytearray(view.nbytes)) for view in into]
            return _CutReceive(self._inner.recv(tag, whole), whole, into)
        pending = self._inner.recv(tag, into)
        if self._fault is Fault.RECEIVE_AT_ONCE:
            with contextlib.suppress(CommError):
                pending.wait(_OVERSTAY_S)
        if self._fault is Fault.WAIT_FOR_RECEIVER:
            return _ReceiptGiver(pending, self._inner, f"receipt {tag}")
        return _FaultyPending(pending, self._fault)

    def close(self) -> None:
        if self._fault is Fault.CLOSE_ONCE and self._closed:
            raise OSError("this transport was closed before")
        if self._fault is Fault.LEAK and not self._closed:
            LEAKED_FDS.append(os.open(os.devnull, os.O_RDONLY))
        if self._fault is Fault.DROP_LAST:
            for timer in self._late:
                timer.cancel()
        self._closed = True
        if self._fault is not Fault.CLOSE_LATE:
            self._inner.close()

    def _send_quietly(self, tag: str, buffers: Sequence[Buffer]) -> None:
        with contextlib.suppress(CommError):
            self._inner.send(tag, [bytes(buffer) for buffer in buffers])

    def _send_reordered(self, tag: str, copies: list[bytes], chosen: bool) -> Pending:
        if chosen:
            self._held_back = (tag, copies)
            return _Done()
        pending = self._inner.send(tag, copies)
        if self._held_back is not None:
            self._inner.send(*self._held_back)
            self._held_back = None
        return pending


def _with_a_bit_flipped(message: list[bytes]) -> list[Buffer]:
    flipped: list[Buffer] = [bytearray(buffer) for buffer in message]
    for buffer in flipped:
        if len(buffer):
            as_bytes(buffer)[len(buffer) // 2] ^= 1
    return flipped


@final
class _Done(Pending):
    """An operation that claims to have ended."""

    def done(self) -> bool:
        return True

    def wait(self, timeout_s: float) -> None:
        """Claim so."""


@final
class _FaultyPending(Pending):
    def __init__(self, inner: Pending, fault: Fault | None) -> None:
        self._inner, self._fault = inner, fault
        self._timed_out = False

    def done(self) -> bool:
        return self._inner.done()

    def wait(self, timeout_s: float) -> None:
        if self._timed_out and self._fault is Fault.ONE_WAIT:
            raise CommTimeout("this operation was given up")
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
            if self._fault is not Fault.CROP:
                raise
        except PeerLost:
            if self._fault is Fault.DEAF:
                raise CommTimeout("the peer is silent") from None
            raise


@final
class _CutReceive(Pending):
    """Receives into buffers of its own and copies all but the last byte."""

    def __init__(self, inner: Pending, whole: list[memoryview], into: Sequence[memoryview]) -> None:
        self._inner, self._whole, self._into = inner, whole, into

    def done(self) -> bool:
        return self._inner.done()

    def wait(self, timeout_s: float) -> None:
        self._inner.wait(timeout_s)
        for source, target in zip(self._whole, self._into, strict=True):
            if source.nbytes > 1:
                target[:-1] = source[:-1]


@final
class _ReceiptGiver(Pending):
    """Tells the sender that its message was received."""

    def __init__(self, inner: Pending, edge: Transport, receipt: str) -> None:
        self._inner, self._edge, self._receipt = inner, edge, receipt

    def done(self) -> bool:
        return self._inner.done()

    def wait(self, timeout_s: float) -> None:
        self._inner.wait(timeout_s)
        self._edge.send(self._receipt, [])
