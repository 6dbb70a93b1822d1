"""HybridWork: a torch.distributed `Work` over our own; and the thread that ends works whose futures were asked for.

May import only torch, `errors` and `collectives.base`.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from copy import copy
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed

from hybrid.collectives.base import Work
from hybrid.errors import CommTimeout

# torch's type stubs of this module lag behind it.
dist: Any = torch.distributed

_SLICE_S = 0.05
_LOOSE_SLICE_S = 0.001


def seconds_of(timeout: timedelta | None, default_s: float) -> float:
    """Return a c10d time-out in seconds: 0 and less mean that none was given."""
    given_s = timeout.total_seconds() if timeout is not None else 0.0
    return given_s if given_s > 0 else default_s


@final
class HybridWork(dist.Work):  # type: ignore[misc]
    """One c10d operation: several of ours, and what is to be done with their results.

    Any thread may wait; the first that sees the end copies the results to where the caller wants them. A wait that
    times out leaves the operation under way, as ours do.

    Args:
        parts: our works; all must end.
        results: the tensors that the operation writes: the future's value.
        finish: copies results to their place; called once, after all parts.
        timeout_s: for waits that name none, and for the future.
        in_order: the group ends this work after those before it, which is what the future's thread counts on.
    """

    def __init__(
        self,
        parts: Sequence[Work],
        results: Sequence[torch.Tensor],
        finish: Callable[[], None],
        *,
        timeout_s: float,
        completer: Completer,
        in_order: bool = True,
        source: int = -1,
    ) -> None:
        super().__init__()
        self._parts, self._results, self._finish = tuple(parts), list(results), finish
        self._timeout_s, self._completer, self.in_order = timeout_s, completer, in_order
        self._source = source
        self.deadline_s = time.monotonic() + timeout_s
        self._ending, self._settling = threading.RLock(), threading.Lock()
        self._ended = False
        self._failure: Exception | None = None
        self._promise: Any = None
        self._future: Any = None

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the results are where the caller wants them.

        Raises:
            CommTimeout, PeerLost, ProtocolError: as `hybrid.collectives.base.Work.wait`.
        """
        timeout_s = seconds_of(timeout, self._timeout_s)
        deadline_s = time.monotonic() + timeout_s
        if not self._ending.acquire(timeout=timeout_s):
            raise CommTimeout(f"a collective did not end within {timeout_s:g} s", fix="see whether every rank runs")
        try:
            if not self._ended:
                self._end(deadline_s)
        finally:
            self._ending.release()
        if self._failure is not None:
            raise copy(self._failure)
        return True

    def is_completed(self) -> bool:
        """Return whether `wait` would return or raise at once."""
        if not self._ended and all(part.done() for part in self._parts):
            with contextlib.suppress(Exception):  # told by `exception` and `wait`
                self.wait()
        return self._ended

    def is_success(self) -> bool:
        return self._ended and self._failure is None

    def exception(self) -> Exception | None:
        return self._failure

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return list(self._results)

    def source_rank(self) -> int:
        return self._source

    _source_rank = source_rank

    def get_future(self) -> Any:
        """Return a future of the results; a failure becomes a RuntimeError with its text, as torch carries errors."""
        with self._settling:
            if self._future is not None:
                return self._future
            # No devices: what is copied back to one is there before the result is set.
            self._promise = torch.futures.Future()
            # Only an error raised in a callback reaches C++ as an error: DDP's reducer waits there.
            self._future = self._promise.then(lambda promise: promise.value())
        if self._ended:
            self._settle()
        else:
            self._completer.add(self)
        return self._future

    def fail(self, error: Exception) -> None:
        """End with `error`, whatever becomes of the parts."""
        with self._ending:
            if not self._ended:
                self._failure, self._ended = error, True
        self._settle()

    def _end(self, deadline_s: float) -> None:
        try:
            for part in self._parts:
                part.wait(max(deadline_s - time.monotonic(), 0.0))
            self._finish()
        except CommTimeout:
            raise
        except Exception as error:
            self._failure = error
        self._ended = True
        self._parts, self._finish = (), _nothing
        self._settle()

    def _settle(self) -> None:
        with self._settling:
            promise, self._promise = self._promise, None
        if promise is None:
            return
        failure = self._failure
        if failure is None:
            try:
                promise.set_result(self._results)
            except RuntimeError as error:  # torch refuses the value: who waits for the future must hear of it
                failure = error
        if failure is not None:
            promise.set_exception(failure)


@final
class Completer:
    """Waits for works whose futures were asked for, on one thread that starts with the first of them."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._added: queue.SimpleQueue[HybridWork | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    def add(self, work: HybridWork) -> None:
        """Complete the work's future when it ends, on this thread."""
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._run, name=f"futures {self._name}", daemon=True)
                self._thread.start()
            self._added.put(work)

    def close(self) -> None:
        """End the thread; call it once no work can go on any more."""
        with self._lock:
            self._closed = True
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            self._added.put(None)
            thread.join()

    def _run(self) -> None:
        works: list[HybridWork] = []
        closing = False
        while not (closing and not works):
            try:
                work = self._added.get(block=not works)
                closing = closing or work is None
                works += [work] if work is not None else []
                continue
            except queue.Empty:
                pass
            self._wait_for_one(works)
            works = [work for work in works if not work.is_completed()]

    def _wait_for_one(self, works: Sequence[HybridWork]) -> None:
        head = works[0]
        slice_s = _SLICE_S if all(work.in_order for work in works) else _LOOSE_SLICE_S
        with contextlib.suppress(Exception):  # the future has it
            try:
                head.wait(timedelta(seconds=slice_s))
            except CommTimeout as error:
                if time.monotonic() >= head.deadline_s:
                    head.fail(error)


def _nothing() -> None:
    pass
