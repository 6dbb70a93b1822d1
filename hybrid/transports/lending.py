"""Lending: receiving a message where the medium has put it, without a copy.

A medium whose messages already lie in this process's memory can show them there. `lend` works over every transport:
where the medium cannot lend, the message is received into memory of its own, and releasing it does nothing.
May import only `errors` and `transports.base`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

from hybrid.transports.base import Pending, Transport


class Lent(Pending):
    """A receive whose message stays where it lies until it is released.

    It takes its place in the order of the receives of its tag, and weighs in the window until its release.
    """

    @property
    @abstractmethod
    def buffers(self) -> tuple[memoryview, ...]:
        """The message, read-only, each buffer in one piece at a multiple of 64 bytes; only after a wait has ended well.

        Nothing derived from them, such as a tensor, may be read after `release`.
        """

    @abstractmethod
    def release(self) -> None:
        """Give the bytes back to the medium; idempotent. After a failed wait there is nothing to release."""


class Lender(ABC):
    """What a Transport is too when it can lend."""

    @abstractmethod
    def lend(self, tag: str, sizes: Sequence[int]) -> Lent:
        """Post a receive of the next message tagged `tag`, of buffers of `sizes` bytes; see `Transport.recv`."""


def lend(edge: Transport, tag: str, sizes: Sequence[int]) -> Lent:
    """Return a receive whose message can be read where the medium has put it, over any transport.

    A message of more than half the window is received into memory of its own: two of them, lent, would leave the
    medium no room for the rest of either.

    Args:
        sizes: bytes of each buffer; another message raises ProtocolError at the wait, as with `Transport.recv`.
    """
    if isinstance(edge, Lender) and sum(sizes) <= edge.window_bytes // 2:
        return edge.lend(tag, sizes)
    return _Received(edge, tag, sizes)


@final
class _Received(Lent):
    """A message in memory of its own."""

    def __init__(self, edge: Transport, tag: str, sizes: Sequence[int]) -> None:
        self._targets = tuple(_aligned_buffer(size) for size in sizes)
        self._pending = edge.recv(tag, self._targets)

    @property
    def buffers(self) -> tuple[memoryview, ...]:
        return tuple(target.toreadonly() for target in self._targets)

    def done(self) -> bool:
        return self._pending.done()

    def wait(self, timeout_s: float) -> None:
        self._pending.wait(timeout_s)

    def release(self) -> None:
        self._targets = ()


def _aligned_buffer(size_bytes: int) -> memoryview:
    return memoryview(bytearray(size_bytes))
