"""Sends and receives under way on a TCP edge, as their owner sees them. May import only `errors` and this folder."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import final

from hybrid.errors import CommError, CommTimeout
from hybrid.transports.base import Pending
from hybrid.transports.message import Part, Posted
from hybrid.transports.tcp_engine import Engine


@final
class TcpSending(Pending):
    """A message on its way out: parts that no stream has taken yet, and parts that the kernel has not wholly taken."""

    def __init__(self, engine: Engine, peer: int, tag: str, parts: Iterator[Part]) -> None:
        self._engine, self._peer, self._tag, self._parts = engine, peer, tag, parts
        self.next_part: Part | None = next(parts)
        self.is_new = True
        """Whether its header is still to be taken."""
        self._num_under_way = 0
        self._failure: CommError | None = None

    def take(self) -> Part:
        """Return the next part; it is under way from now on."""
        part = self.next_part
        assert part is not None
        self.next_part, self.is_new = next(self._parts, None), False
        self._num_under_way += 1
        return part

    def written(self) -> bool:
        """Take note that the kernel has a part; return whether the send has ended by it."""
        self._num_under_way -= 1
        return self.ended

    def fail(self, failure: CommError, *, at_once: bool) -> None:
        """End with `failure` when nothing is under way any more, or at once; what was wholly taken goes on."""
        if self.ended or (self.next_part is None and not at_once):
            return
        self._failure = failure
        if at_once:
            self._num_under_way = 0

    @property
    def ended(self) -> bool:
        """Whether the kernel has all of it, or it has failed."""
        return self._num_under_way <= 0 and (self.next_part is None or self._failure is not None)

    def done(self) -> bool:
        return self.ended or self._engine.wait_until(self._has_ended, 0.0)

    def wait(self, timeout_s: float) -> None:
        if not self.ended and not self._engine.wait_until(self._has_ended, timeout_s):
            raise CommTimeout(
                f"rank {self._peer} did not take the message {self._tag!r} for {timeout_s} s",
                fix="see whether it still runs",
            )
        if self._failure is not None:
            raise copy(self._failure)

    def _has_ended(self) -> bool:
        return self.ended


@final
class TcpReceiving(Pending):
    """A posted receive."""

    def __init__(self, engine: Engine, peer: int, posted: Posted) -> None:
        self._engine, self._peer, self._posted = engine, peer, posted

    def done(self) -> bool:
        return self._posted.ended or self._engine.wait_until(self._has_ended, 0.0)

    def wait(self, timeout_s: float) -> None:
        if not self._posted.ended and not self._engine.wait_until(self._has_ended, timeout_s):
            raise CommTimeout(
                f"rank {self._peer} was silent for {timeout_s} s over tag {self._posted.tag!r}",
                fix="see whether it still runs",
            )
        if self._posted.failure is not None:
            raise copy(self._posted.failure)

    def _has_ended(self) -> bool:
        return self._posted.ended
