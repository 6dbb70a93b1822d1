"""What moves a group's operations on: one after another, by the thread that waits or else by one of its own.

Knows nothing of what an operation does: it is an iterator of what to wait for. May import only torch, `errors`,
`transports.arrival` and `collectives.base`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from copy import copy
from typing import Protocol, final

import torch

from hybrid.collectives.base import Work
from hybrid.errors import CommError, CommTimeout, PeerLost, ProtocolError
from hybrid.transports.arrival import ArrivalHistory

_SLICE_S = 0.05
"""How often a wait looks up whether another member has left."""
_LOOSE_S = 0.005


class Waitable(Protocol):
    """A transfer, or an operation of another group."""

    def wait(self, timeout_s: float, /) -> None:
        """Return at its end; raise CommTimeout where it is still under way, and may be waited for again."""


class Ears(Protocol):
    """How this member hears that others have left, and tells them that it leaves; see `notices`."""

    def heard(self, sequence: int, peers: tuple[int, ...]) -> CommError | None:
        """Return why an operation cannot end, if so."""

    def say(self, num_ended: int, reason: CommError | None) -> None:
        """Tell all others; does not wait."""

    def flush(self) -> None:
        """Wait a moment until they have been told."""


@final
class NoEars:
    """For groups whose members hear of each other in another way."""

    def heard(self, sequence: int, peers: tuple[int, ...]) -> CommError | None:
        """Hear nothing."""

    def say(self, num_ended: int, reason: CommError | None) -> None:
        """Say nothing."""

    def flush(self) -> None:
        """Return at once."""


@final
class Operation(Work):
    """An operation in the queue, or one that stands beside it (`loose`)."""

    def __init__(self, progress: Progress, steps: Iterator[Waitable], sequence: int, peers: tuple[int, ...]) -> None:
        self._progress, self.steps, self.sequence, self.peers = progress, steps, sequence, peers
        self.waiting: Waitable | None = None
        self.ended = False
        self.failure: Exception | None = None
        self.busy = False
        """A thread is moving it on."""
        self.doubts = 0
        """How often a peer was heard to have left while this was waited for."""

    def done(self) -> bool:
        self._progress.nudge(self)
        return self.ended

    def wait(self, timeout_s: float | None = None) -> None:
        self._progress.wait(self, timeout_s)
        if self.failure is not None:
            raise copy(self.failure)


@final
class Progress:
    """The queue of a group's collectives, the operations that stand beside it, and who moves them.

    Args:
        waits: how long waits that name no time may take, and took.
    """

    def __init__(self, name: str, ears: Ears, waits: ArrivalHistory) -> None:
        self._name, self._ears, self._waits = name, ears, waits
        self._changed = threading.Condition()
        self._queue: deque[Operation] = deque()
        self._loose: deque[Operation] = deque()
        self._num_started = 0
        self._num_ended = 0
        self._failure: Exception | None = None
        self._closed = False
        self._listening, self._listened_s = threading.Lock(), time.monotonic()
        self._thread = threading.Thread(target=self._loop, name=f"group {name}", daemon=True)
        self._thread.start()

    def submit(self, build: Callable[[int], Iterator[Waitable]]) -> Operation:
        """Queue a collective, built for its place in the order: it starts when those before it have ended."""
        with self._changed:
            operation = Operation(self, build(self._num_started), self._num_started, ())
            self._num_started += 1
            if self._failure is not None:
                operation.ended, operation.failure = True, self._failure
            else:
                self._queue.append(operation)
                self._changed.notify_all()
        return operation

    def submit_loose(self, steps: Iterator[Waitable], peers: tuple[int, ...]) -> Operation:
        """Start an operation with some peers alone, that holds nothing up and that nothing holds up."""
        operation = Operation(self, steps, 0, peers)
        with self._changed:
            if self._failure is not None:
                operation.ended, operation.failure = True, self._failure
                return operation
            self._loose.append(operation)
            operation.busy = True
        self._advance(operation, time.monotonic())
        return operation

    def wait(self, operation: Operation, timeout_s: float | None) -> None:
        """Return when `operation` has ended, moving it and those before it on meanwhile."""
        timeout_s = self._waits.timeout_s if timeout_s is None else timeout_s
        began_s = time.monotonic()
        deadline_s = began_s + timeout_s
        while not operation.ended:
            head = self._take(operation, deadline_s)
            if head is not None:
                self._advance(head, deadline_s)
            if time.monotonic() >= deadline_s and not operation.ended:
                raise CommTimeout(
                    f"a collective of group {self._name!r} did not end within {timeout_s} s",
                    fix="see whether every member called it and still runs",
                )
        if operation.failure is None:
            self._waits.observe(time.monotonic() - began_s)

    def nudge(self, operation: Operation) -> None:
        """Move on what can be moved without waiting."""
        head = None if operation.ended else self._take(operation, 0.0)
        if head is not None:
            self._advance(head, 0.0)

    def close(self) -> None:
        """End everything with PeerLost, and the thread."""
        with self._changed:
            self._closed = True
        self._fail(PeerLost(f"group {self._name!r} was closed at this end"), tell=None)
        if self._thread is not threading.current_thread():
            self._thread.join()
        with self._listening:
            self._ears.flush()

    def _take(self, operation: Operation, deadline_s: float) -> Operation | None:
        """Return what this thread shall move on for `operation`, or None once something has changed or time is up."""
        with self._changed:
            if operation.ended:
                return None
            head = operation if operation in self._loose else self._queue[0]
            if not head.busy:
                head.busy = True
                return head
            remaining_s = deadline_s - time.monotonic()
            if remaining_s > 0:
                self._changed.wait_for(lambda: operation.ended or not head.busy, remaining_s)
            return None

    def _advance(self, operation: Operation, deadline_s: float) -> None:
        """Move one operation on until it ends or the time is up; this thread has taken it."""
        ended, failure = False, None
        try:
            with torch.inference_mode():  # tensors of any mode may be written, and nothing is recorded
                ended = self._step(operation, deadline_s)
        except Exception as error:
            ended, failure = True, error
        with self._changed:
            operation.busy = False
            if ended and not operation.ended:
                self._end(operation, failure)
            self._changed.notify_all()
        # A receive of two that does not fit is their own affair.
        if failure is not None and not (operation.peers and isinstance(failure, ProtocolError)):
            self._fail(failure, tell=failure)

    def _step(self, operation: Operation, deadline_s: float) -> bool:
        while self._failure is None:
            if operation.waiting is None:
                operation.waiting = next(operation.steps, None)
                if operation.waiting is None:
                    return True
            remaining_s = deadline_s - time.monotonic()
            try:
                operation.waiting.wait(min(max(remaining_s, 0.0), _SLICE_S))
                operation.waiting = None
            except CommTimeout:
                now_s = time.monotonic()
                if now_s - self._listened_s >= _SLICE_S:
                    self._listened_s = now_s
                    self._listen(operation)
                if now_s >= deadline_s:
                    return False
            except PeerLost:
                self._listen(operation)  # a peer that left may have said why
                raise
        return False

    def _listen(self, operation: Operation) -> None:
        """Raise if a member without which `operation` cannot end has left."""
        if not self._listening.acquire(blocking=False):
            return
        try:
            error = self._ears.heard(operation.sequence, operation.peers)
        finally:
            self._listening.release()
        if error is not None and operation.peers:
            # What it sent before it left may still be on its way.
            operation.doubts += 1
        if error is not None and (not operation.peers or operation.doubts > 2):
            raise error

    def _end(self, operation: Operation, failure: Exception | None) -> None:
        operation.ended, operation.failure, operation.steps = True, failure, iter(())
        if operation in self._loose:
            self._loose.remove(operation)
        else:
            self._queue.remove(operation)
            self._num_ended += failure is None

    def _fail(self, failure: Exception, tell: Exception | None) -> None:
        """End every operation with `failure`, and tell the peers; only the first failure counts."""
        with self._changed:
            if self._failure is None:
                self._failure = failure
            for operation in (*self._queue, *self._loose):
                self._end(operation, self._failure)
            num_ended = self._num_ended
            self._changed.notify_all()
        reason = tell if tell is None or isinstance(tell, CommError) else PeerLost(str(tell))
        with self._listening:
            self._ears.say(num_ended, reason)

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._idle_head() is not None)
                if self._closed:
                    return
                operation = self._idle_head()
                assert operation is not None
                operation.busy = True
                patience_s = _LOOSE_S if self._loose else 3600.0
            self._advance(operation, time.monotonic() + patience_s)

    def _idle_head(self) -> Operation | None:
        """Return what nobody moves on: the head of the queue before what stands beside it."""
        if self._queue and not self._queue[0].busy:
            return self._queue[0]
        idle = next((operation for operation in self._loose if not operation.busy), None)
        if idle is not None:
            self._loose.rotate(-1)
        return idle
