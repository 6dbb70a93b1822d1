"""The waits of a node: whoever waits moves every socket of the node on. No thread of its own.

libzmq's own thread, or the kernel, or shared memory carries the bytes; the engine only decides when Python looks at
which socket. One lock guards all sockets of a node (a ZeroMQ socket is not thread-safe), and no thread blocks while
it holds the lock. Knows nothing of messages. May import only the standard library.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Protocol, final


class Moving(Protocol):
    """Something with sockets that the engine moves on."""

    fds: tuple[int, ...]
    """What to poll; each is readable when `ready` has something to look at."""

    def ready(self, fd: int) -> None:
        """Note that `fd` was readable; called under the lock."""

    def move(self, enough: Callable[[], bool]) -> bool:
        """Take what has come in until nothing is left or `enough`; return whether anything moved.

        Called under the lock; never blocks.
        """


class Resting(Moving, Protocol):
    """Something whose news may come without a signal, as long as nobody has said that he sleeps."""

    def rest(self) -> bool:
        """Ask the peer for a signal from now on; return whether there is news already. Called under the lock."""


@final
class _Waiter:
    """One blocked thread: a poll set, and a bell that another thread rings when it moved something."""

    def __init__(self) -> None:
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.version = -1
        self._poll = select.poll()

    def watch(self, version: int, fds: tuple[int, ...]) -> None:
        self.version, self._poll = version, select.poll()
        for fd in (self.bell, *fds):
            self._poll.register(fd, select.POLLIN)

    def block(self, timeout_s: float) -> list[int]:
        # Rounded up: a poll that ends a fraction early would spin through the rest of the wait.
        ready = [fd for fd, _ in self._poll.poll(int(min(max(timeout_s, 0.0), 3600.0) * 1000 + 0.999))]
        if self.bell in ready:
            os.eventfd_read(self.bell)
            ready.remove(self.bell)
        return ready

    def close(self) -> None:
        os.close(self.bell)


@final
class Engine:
    """The lock of a node and the waits under it.

    Args:
        spin_s: how long after the last movement a wait looks again and again before it blocks: waking up costs more
            than a short look.
    """

    def __init__(self, *, spin_s: float = 0.0) -> None:
        self.lock = threading.Lock()
        self._spin_s = spin_s
        self._resting: list[Resting] = []
        self._moving: dict[int, Moving] = {}
        self._members: list[Moving] = []
        self._version = 0
        self._blocked: list[_Waiter] = []
        self._spare: list[_Waiter] = []
        self._closed = False

    def add(self, member: Moving) -> None:
        """Move `member` on from now; call under the lock."""
        self._members.append(member)
        self._watch_anew()

    def add_resting(self, member: Resting) -> None:
        """Move `member` on from now, and let it rest before a wait blocks; call under the lock."""
        self._resting.append(member)
        self.add(member)

    def remove(self, member: Moving) -> None:
        """Forget `member`; call under the lock, before its sockets close."""
        if member in self._members:
            self._members.remove(member)
            self._resting = [resting for resting in self._resting if resting is not member]
            self._watch_anew()

    def moved(self) -> None:
        """Say that a socket was used or an operation ended outside of a wait; call under the lock.

        Using a socket may swallow the signal that a blocked thread is polling for.
        """
        if self._blocked:
            self._move(_never)
            self._ring(None)

    def wait_until(self, met: Callable[[], bool], timeout_s: float) -> bool:
        """Move the node on until `met`, which is asked under the lock; return whether it was met in time."""
        began_s = time.monotonic()
        deadline_s, spin_until_s = began_s + timeout_s, began_s + min(self._spin_s, timeout_s)
        waiter: _Waiter | None = None
        ready: list[int] = []
        try:
            while True:
                with self.lock:
                    for fd in ready:
                        if fd in self._moving:
                            self._moving[fd].ready(fd)
                    if self._move(met):
                        self._ring(waiter)
                        spin_until_s = min(time.monotonic() + self._spin_s, deadline_s)
                    if met() or self._closed:
                        return met()
                    spins = time.monotonic() < spin_until_s
                    if not spins:
                        waiter = self._enlist(waiter)
                        spins = self._news_before_rest()
                if spins or waiter is None:
                    ready = []
                    os.sched_yield()
                    continue
                remaining_s = deadline_s - time.monotonic()
                ready = waiter.block(remaining_s)
                if remaining_s <= 0 and not ready:
                    with self.lock:
                        return met()
        finally:
            if waiter is not None:
                with self.lock:
                    self._blocked.remove(waiter)
                    self._put_away(waiter)

    def close(self) -> None:
        """Wake who waits, and free the bells."""
        with self.lock:
            self._closed = True
            self._members.clear()
            self._resting.clear()
            self._watch_anew()
            for waiter in self._spare:
                waiter.close()
            self._spare.clear()

    def _move(self, enough: Callable[[], bool]) -> bool:
        moved = False
        for member in tuple(self._members):
            moved = member.move(enough) or moved
        return moved

    def _enlist(self, waiter: _Waiter | None) -> _Waiter:
        """Return who blocks, with the sockets of now in its poll set."""
        if waiter is None:
            waiter = self._spare.pop() if self._spare else _Waiter()
            self._blocked.append(waiter)
        if waiter.version != self._version:
            waiter.watch(self._version, tuple(self._moving))
        return waiter

    def _news_before_rest(self) -> bool:
        # All of them, also behind the first that has news: each asks its own peer for a signal.
        news = [member.rest() for member in self._resting]
        return any(news)

    def _ring(self, myself: _Waiter | None) -> None:
        for waiter in self._blocked:
            if waiter is not myself:
                os.eventfd_write(waiter.bell, 1)

    def _watch_anew(self) -> None:
        self._version += 1
        self._moving = {fd: member for member in self._members for fd in member.fds}
        self._ring(None)

    def _put_away(self, waiter: _Waiter) -> None:
        if self._closed or len(self._spare) >= 4:
            waiter.close()
        else:
            self._spare.append(waiter)


def _never() -> bool:
    return False
