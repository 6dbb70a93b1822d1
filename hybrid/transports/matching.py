"""Which message goes to which receive: of one tag, first come to first posted.

Pure: no sockets, no locks, no clock. May import only the standard library.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, Protocol, TypeVar, final


class _Tagged(Protocol):
    @property
    def tag(self) -> str: ...


class _Headed(Protocol):
    @property
    def header(self) -> _Tagged: ...


M = TypeVar("M", bound=_Headed)
R = TypeVar("R", bound=_Tagged)
T = TypeVar("T")
K = TypeVar("K")


@final
class Matcher(Generic[M, R]):
    """Messages `M` that wait for receives, and receives `R` that wait for messages."""

    def __init__(self) -> None:
        self._posted: dict[str, deque[R]] = {}
        self._arrived: dict[str, deque[M]] = {}

    def arrive(self, message: M) -> R | None:
        """Return the receive that waits for this message, or None and keep the message."""
        return _take_or_keep(self._posted, self._arrived, message.header.tag, message)

    def post(self, receive: R) -> M | None:
        """Return the message that waits for this receive, or None and keep the receive."""
        return _take_or_keep(self._arrived, self._posted, receive.tag, receive)

    def forget_posted(self) -> tuple[R, ...]:
        """Return the receives that no message has come for, and forget them."""
        posted = tuple(receive for queue in self._posted.values() for receive in queue)
        self._posted.clear()
        return posted

    def forget(self, message: M) -> None:
        """Forget a message that will never be whole."""
        queue = self._arrived.get(message.header.tag, deque())
        if message in queue:
            queue.remove(message)

    def forget_arrived(self) -> None:
        """Forget every message that waits for a receive."""
        self._arrived.clear()


def _take_or_keep(waiting: dict[str, deque[T]], keeping: dict[str, deque[K]], tag: str, item: K) -> T | None:
    queue = waiting.get(tag)
    if not queue:
        keeping.setdefault(tag, deque()).append(item)
        return None
    taken = queue.popleft()
    if not queue:
        del waiting[tag]
    return taken
