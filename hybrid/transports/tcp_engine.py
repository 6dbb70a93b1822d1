"""The waits of a TCP node: one thread at a time looks at the sockets, whoever waits or else one of the engine's own.

The thread that waits for an operation reads and writes itself, so that nothing is handed over between threads; while
nobody waits, the engine's thread does it, and it alone keeps the time. One lock guards the state of a node; it is let
go of around every system call that moves bytes. Knows nothing of messages. May import only the standard library.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Protocol, final

READABLE, WRITABLE = select.EPOLLIN, select.EPOLLOUT
_QUIET_S = 0.02
"""Whoever waits comes back soon, mostly: only this long after the last wait the engine's thread takes over for good."""
_NAP_S = 0.002
"""Until then it looks this often."""


class Member(Protocol):
    """A socket that the engine looks at."""

    def ready(self, events: int) -> None:
        """Move what can be moved without blocking, not for long; called under the lock, by one thread at a time."""


class Ticking(Protocol):
    """Something with deadlines."""

    def tick(self, now_s: float) -> None:
        """Look at the clock; called under the lock every `tick_s`."""


@final
class Engine:
    """The lock of a node, the waits under it, and the thread that works while nobody waits."""

    def __init__(self, name: str, *, tick_s: float) -> None:
        self.lock = threading.Lock()
        self._changed = threading.Condition(self.lock)
        self._over = threading.Condition(self.lock)
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._bell, READABLE)
        self._members: dict[int, Member] = {}
        self._tickers: list[Ticking] = []
        self._leading = self._polling = self._sleeps_deep = self._closed = False
        self._num_following = 0
        self._lead_began_s = self._led_s = 0.0
        self._tick_s, self._next_tick_s = tick_s, time.monotonic() + tick_s
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    # Called under the lock -------------------------------------------------------------------------------

    def watch(self, fd: int, member: Member, events: int) -> None:
        """Look at `fd` from now on, or look for other events."""
        if fd in self._members:
            self._epoll.modify(fd, events)
        else:
            self._epoll.register(fd, events)
        self._members[fd] = member

    def forget(self, fd: int) -> None:
        """Look at `fd` no more; call before it is closed."""
        if self._members.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def add_ticker(self, ticker: Ticking) -> None:
        """Tell `ticker` the time from now on."""
        self._tickers.append(ticker)

    def remove_ticker(self, ticker: Ticking) -> None:
        """Tell it no more."""
        if ticker in self._tickers:
            self._tickers.remove(ticker)

    def tell(self) -> None:
        """Say that an operation has ended: who waits looks again."""
        if self._num_following:
            self._changed.notify_all()
        if self._polling:
            self._ring()

    # Called without it -----------------------------------------------------------------------------------

    def wait_until(self, met: Callable[[], bool], timeout_s: float) -> bool:
        """Move the node on until `met`, which is asked under the lock; return whether it was met in time."""
        deadline_s = time.monotonic() + timeout_s
        looked = False
        with self.lock:
            while not met():
                left_s = deadline_s - time.monotonic()
                if self._closed or (left_s <= 0 and looked):
                    return False
                looked = True
                if self._leading:
                    self._follow(left_s)
                else:
                    self._lead(met, deadline_s)
            return True

    def close(self) -> None:
        """Wake who waits and end the thread; call once."""
        with self.lock:
            self._closed = True
            self._changed.notify_all()
            self._over.notify_all()
            self._ring()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        with self.lock:
            while self._leading:
                self._changed.wait(_NAP_S)
            self._epoll.close()
            os.close(self._bell)

    # Leading and following -------------------------------------------------------------------------------

    def _lead(self, met: Callable[[], bool], deadline_s: float) -> None:
        self._leading = True
        self._lead_began_s = time.monotonic()
        try:
            while True:
                self._turn(deadline_s - time.monotonic(), met)
                if met() or self._closed or time.monotonic() >= deadline_s:
                    return
        finally:
            self._leading = False
            self._led_s = time.monotonic()
            if self._num_following:
                self._changed.notify_all()
            if self._sleeps_deep:
                self._over.notify()

    def _follow(self, left_s: float) -> None:
        self._num_following += 1
        try:
            if self._polling:
                self._ring()
            self._changed.wait(max(left_s, 0.0))
        finally:
            self._num_following -= 1

    def _turn(self, timeout_s: float, enough: Callable[[], bool]) -> bool:
        """Wait for news and take it; return whether there was any."""
        self._polling = timeout_s > 0
        self.lock.release()
        try:
            news = self._epoll.poll(max(timeout_s, 0.0), 64)
        finally:
            self.lock.acquire()
            self._polling = False
        for fd, events in news:
            if fd == self._bell:
                os.eventfd_read(fd)
                continue
            member = self._members.get(fd)
            if member is not None:
                member.ready(events)
                if enough():
                    break
        return bool(news)

    def _serve(self) -> None:
        with self.lock:
            while not self._closed:
                now_s = time.monotonic()
                if now_s >= self._next_tick_s:
                    self._next_tick_s = now_s + self._tick_s
                    for ticker in tuple(self._tickers):
                        ticker.tick(now_s)
                    continue
                left_s = self._next_tick_s - now_s
                if self._leading:
                    self._rest(left_s)
                elif self._num_following:
                    self._changed.notify_all()
                    self._over.wait(_NAP_S)
                elif now_s - self._led_s > _QUIET_S:
                    self._work(left_s)
                elif not self._work(0.0):
                    self._over.wait(_NAP_S)

    def _rest(self, left_s: float) -> None:
        """Let the one who leads work; look again soon at first, then only when it is done."""
        if time.monotonic() - self._lead_began_s < _QUIET_S:
            self._over.wait(min(_NAP_S, left_s))
            return
        self._sleeps_deep = True
        self._over.wait(left_s)
        self._sleeps_deep = False

    def _work(self, timeout_s: float) -> bool:
        self._leading = True
        try:
            return self._turn(timeout_s, self._is_wanted)
        finally:
            self._leading = False
            if self._num_following:
                self._changed.notify_all()

    def _is_wanted(self) -> bool:
        return self._num_following > 0

    def _ring(self) -> None:
        os.eventfd_write(self._bell, 1)
