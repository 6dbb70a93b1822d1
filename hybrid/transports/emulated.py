"""An emulated link around any transport: latency, bandwidth, jitter, and a peer that is lost as planned.

Each message carries the time at which it arrives, and its receive ends no sooner. Messages queue behind each other for
the time that they fill the link, also those of other edges that share it. For tests and rehearsals: both ends read the
same clock, so they are on one host. Wraps, and changes nothing else. May import only `errors` and this folder.
"""

from __future__ import annotations

import math
import random
import struct
import threading
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Protocol, final

from hybrid.errors import CommTimeout, PeerLost
from hybrid.transports.base import Buffer, Pending, Transport, TransportNode, as_bytes

_STAMP = struct.Struct("<d")


class Clock(Protocol):
    """What a link keeps time by; `time` is one."""

    def monotonic(self) -> float:
        """Return seconds."""

    def sleep(self, seconds: float, /) -> None:
        """Return after `seconds`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkShape:
    """What a link is like in one direction."""

    latency_s: float = 0.0
    bandwidth_bytes_per_s: float = math.inf
    jitter_s: float = 0.0
    """Up to this is added to a message's latency, evenly distributed; no message overtakes another of its edge."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLoss:
    """When an edge is cut: both ends find the other gone."""

    at_message: int | None = None
    """Before the sending of this one, counted from 0."""
    at_s: float | None = None
    """By the link's clock."""


@final
class SharedLink:
    """One direction of a link, shared by every edge that is given it: all of a process, or of a host's card.

    Args:
        seed: of the jitter.
        clock: `time`, or a test's own.
    """

    def __init__(self, shape: LinkShape, *, seed: int = 0, clock: Clock = time) -> None:
        self.clock = clock
        self._shape, self._chance = shape, random.Random(seed)
        self._free_s = -math.inf
        self._lock = threading.Lock()

    def carry(self, size_bytes: int) -> float:
        """Return when a message that is sent now arrives; the link is busy with it from its turn on."""
        shape = self._shape
        with self._lock:
            start_s = max(self.clock.monotonic(), self._free_s)
            self._free_s = start_s + size_bytes / shape.bandwidth_bytes_per_s
            return self._free_s + shape.latency_s + shape.jitter_s * self._chance.random()


@final
class EmulatedTransport(Transport):
    """See `Transport`. Both ends of an edge must be wrapped.

    Args:
        inner: what really carries the bytes; it is closed with this one. A message weighs 64 bytes more in its window.
        link: what this end sends through.
        loss: when to cut the edge, if at all.
    """

    def __init__(self, inner: Transport, link: SharedLink, *, loss: PlannedLoss | None = None) -> None:
        self.peer, self.window_bytes = inner.peer, inner.window_bytes
        self._inner, self._link = inner, link
        self._loss = loss if loss is not None else PlannedLoss()
        self._lock = threading.Lock()
        self._num_sent = 0
        self._last_arrival_s = -math.inf
        self._cut: PeerLost | None = None

    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        with self._lock:
            self._look_for_loss(self._num_sent)
            self._num_sent += 1
            size_bytes = sum(as_bytes(buffer).nbytes for buffer in buffers)
            arrival_s = self._last_arrival_s = max(self._link.carry(size_bytes), self._last_arrival_s)
            if self._cut is None:
                return _Guarded(self, self._inner.send(tag, [_STAMP.pack(arrival_s), *buffers]))
        raise copy(self._cut)

    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        stamp = bytearray(_STAMP.size)
        return _Guarded(self, self._inner.recv(tag, [memoryview(stamp), *into]), stamp)

    def close(self) -> None:
        self._inner.close()

    def remaining_s(self, arrival_s: float) -> float:
        """Return how long a message is still on its way."""
        return arrival_s - self._link.clock.monotonic()

    def until_loss_s(self) -> float:
        """Cut the edge if its time has come; return how long it still holds."""
        if self._loss.at_s is None:
            return math.inf
        remaining_s = self._loss.at_s - self._link.clock.monotonic()
        if remaining_s <= 0:
            with self._lock:
                self._look_for_loss(0)
        return max(remaining_s, 0.0)

    def sleep(self, seconds: float) -> None:
        """Sleep by the link's clock."""
        self._link.clock.sleep(seconds)

    def _look_for_loss(self, number: int) -> None:
        at_message, at_s = self._loss.at_message, self._loss.at_s
        is_time = at_s is not None and self._link.clock.monotonic() >= at_s
        if self._cut is None and (is_time or (at_message is not None and number >= at_message)):
            self._cut = PeerLost(f"the emulated link to rank {self.peer} was cut as planned")
            self._inner.close()


@final
class _Guarded(Pending):
    """An operation of the inner transport that ends no sooner than its message's arrival (`stamp`), if it has one."""

    def __init__(self, edge: EmulatedTransport, inner: Pending, stamp: bytearray | None = None) -> None:
        self._edge, self._inner, self._stamp = edge, inner, stamp

    def done(self) -> bool:
        self._edge.until_loss_s()
        if not self._inner.done():
            return False
        try:
            self._inner.wait(0.0)
        except CommTimeout:
            return False
        except Exception:
            return True  # what has failed does not arrive later
        return self._late_s() <= 0

    def wait(self, timeout_s: float) -> None:
        began_s = time.monotonic()
        while True:
            left_s = max(timeout_s - (time.monotonic() - began_s), 0.0)
            held_s = self._edge.until_loss_s()
            try:
                self._inner.wait(min(left_s, held_s))
                break
            except CommTimeout:
                if held_s >= left_s:
                    raise
        left_s = max(timeout_s - (time.monotonic() - began_s), 0.0)
        late_s = self._late_s()
        if late_s > 0:
            self._edge.sleep(min(late_s, left_s))
        if late_s > left_s:
            raise CommTimeout(f"a message of rank {self._edge.peer} is on its way for another {late_s - left_s:.3g} s")

    def _late_s(self) -> float:
        return 0.0 if self._stamp is None else self._edge.remaining_s(_STAMP.unpack(self._stamp)[0])


@final
class EmulatedNode(TransportNode):
    """See `TransportNode`: a node whose edges are emulated links.

    Args:
        inner: opened with at least an eighth more window than is to be had.
        link_to: what this rank sends to a peer through; may be one link for all.
        loss_of: which edges are cut, and when.
    """

    def __init__(
        self,
        inner: TransportNode,
        link_to: Callable[[int], SharedLink],
        *,
        loss_of: Callable[[int], PlannedLoss | None] = lambda peer: None,
    ) -> None:
        self.rank, self.address = inner.rank, inner.address
        self._inner, self._link_to, self._loss_of = inner, link_to, loss_of

    @property
    def refused(self) -> tuple[str, ...]:
        return self._inner.refused

    def open(self, peer: int, address: str, *, timeout_s: float) -> Transport:
        edge = self._inner.open(peer, address, timeout_s=timeout_s)
        return EmulatedTransport(edge, self._link_to(peer), loss=self._loss_of(peer))

    def close(self) -> None:
        self._inner.close()
