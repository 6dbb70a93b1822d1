"""Ahead of time: run functions once for the shapes that a plan knows, so that no step waits for a compiler.

Every function in a thread of its own: the compilers are processes, and they run in parallel. Has a time-out for all of
them together, and tells of each that is done. May import only `errors`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping

from hybrid.errors import DeviceError

Progress = Callable[[str, int, int, float], None]
"""(what was compiled, how many are, of how many, seconds since the start); called in the caller's thread."""


def compile_ahead(
    first_call_of: Mapping[str, Callable[[], object]], *, timeout_s: float, on_progress: Progress
) -> dict[str, float]:
    """Make every first call, in parallel; return the seconds that each took.

    Args:
        first_call_of: what to call, by the name that progress and errors use.
        timeout_s: for all of them together; a call that hangs is left behind in its daemon thread.
        on_progress: told of each call that ended well.

    Raises:
        DeviceError: not all ended in time; names those that did not.
        Exception: what the first failing call raised.
    """
    done: queue.Queue[tuple[str, BaseException | None, float]] = queue.Queue()
    started_s = time.monotonic()

    def call(name: str, fn: Callable[[], object]) -> None:
        try:
            fn()
        except BaseException as error:
            done.put((name, error, time.monotonic()))
        else:
            done.put((name, None, time.monotonic()))

    for name, fn in first_call_of.items():
        threading.Thread(target=call, args=(name, fn), name=f"compile-{name}", daemon=True).start()
    seconds_of: dict[str, float] = {}
    while len(seconds_of) < len(first_call_of):
        try:
            name, error, ended_s = done.get(timeout=max(0.0, started_s + timeout_s - time.monotonic()))
        except queue.Empty:
            late = [name for name in first_call_of if name not in seconds_of]
            raise DeviceError(
                f"compilation did not end within {timeout_s:g} s",
                value=", ".join(late),
                fix="raise runtime.compile_timeout_s, or keep compiled graphs in runtime.compile_cache",
            ) from None
        if error is not None:
            raise error
        seconds_of[name] = ended_s - started_s
        on_progress(name, len(seconds_of), len(first_call_of), seconds_of[name])
    return seconds_of
