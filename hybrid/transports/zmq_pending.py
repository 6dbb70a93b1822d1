"""Sends and receives under way on a ZeroMQ edge, as their owner sees them.

May import only `errors`, zmq and this folder.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from copy import copy
from typing import final

import zmq

from hybrid.errors import CommError, CommTimeout
from hybrid.transports.base import Pending
from hybrid.transports.message import Part, Posted
from hybrid.transports.zmq_engine import Engine
from hybrid.transports.zmq_socket import Socket

# As plain numbers: pyzmq's flags are enums, and joining two costs as much as sending a message.
NOW, NOW_AND_MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK | zmq.SNDMORE)
TRACKER_SLICE_S = 0.02
"""How often a wait for the kernel to take a buffer looks at the rest of the node."""


@final
class ZmqSending(Pending):
    """A message on its way out: parts not yet handed to ZeroMQ, then buffers that it still reads."""

    def __init__(self, engine: Engine, peer: int, tag: str, parts: Iterator[Part]) -> None:
        self.failure: CommError | None = None
        self._engine, self._peer, self._tag, self._parts = engine, peer, tag, parts
        self.next_part: Part | None = next(parts)
        self._tracker: zmq.MessageTracker | None = None

    def hand_over(self, socket: Socket) -> bool:
        """Hand the next part to ZeroMQ; return whether it took it."""
        part = self.next_part
        assert part is not None
        following = next(self._parts, None)
        try:
            if part.payload is None:
                socket.send(part.head, NOW)
            else:
                socket.send(part.head, NOW_AND_MORE)
                if part.in_place:
                    last = following is None
                    self._tracker = socket.send(part.payload, NOW, copy=False, track=last)
                else:
                    socket.send(part.payload, NOW)
        except zmq.Again:
            return False
        self.next_part = following
        return True

    def released(self, timeout_s: float) -> bool:
        """Return whether ZeroMQ has let go of the buffers, waiting up to `timeout_s`."""
        tracker = self._tracker
        if tracker is None or tracker.done:
            return True
        if timeout_s > 0:
            with contextlib.suppress(zmq.NotDone):
                tracker.wait(timeout_s)
        return tracker.done

    def done(self) -> bool:
        if not self._ended():
            self._engine.wait_until(self._ended, 0.0)
        return self._ended()

    def wait(self, timeout_s: float) -> None:
        if self.next_part is None and self.failure is None and self.released(0.0):
            return
        deadline_s = time.monotonic() + timeout_s
        handed_over = self._engine.wait_until(lambda: self.next_part is None or self.failure is not None, timeout_s)
        while handed_over and not self._ended():
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                break
            self.released(min(remaining_s, TRACKER_SLICE_S))
            self._engine.wait_until(self._ended, 0.0)
        if not self._ended():
            raise CommTimeout(
                f"rank {self._peer} did not take the message {self._tag!r} for {timeout_s} s",
                fix="see whether it still runs",
            )
        if self.failure is not None:
            raise copy(self.failure)

    def _ended(self) -> bool:
        return self.failure is not None or (self.next_part is None and self.released(0.0))


@final
class ZmqReceiving(Pending):
    """A posted receive."""

    def __init__(self, engine: Engine, peer: int, posted: Posted) -> None:
        self._engine, self._peer, self._posted = engine, peer, posted

    def done(self) -> bool:
        if not self._posted.ended:
            self._engine.wait_until(self._ended, 0.0)
        return self._posted.ended

    def wait(self, timeout_s: float) -> None:
        if not self._posted.ended and not self._engine.wait_until(self._ended, timeout_s):
            raise CommTimeout(
                f"rank {self._peer} was silent for {timeout_s} s over tag {self._posted.tag!r}",
                fix="see whether it still runs",
            )
        if self._posted.failure is not None:
            raise copy(self._posted.failure)

    def _ended(self) -> bool:
        return self._posted.ended
