"""Compiling ahead: in parallel, with progress and a time-out, and no failure is swallowed."""

import threading

import pytest

from hybrid.backends.ahead import compile_ahead
from hybrid.errors import DeviceError


def test_all_are_called_at_once_and_each_is_told() -> None:
    meeting = threading.Barrier(3)
    told: list[tuple[str, int, int]] = []
    first_calls = {name: lambda: meeting.wait(timeout=20.0) for name in ("a", "b", "c")}
    seconds = compile_ahead(
        first_calls, timeout_s=30.0, on_progress=lambda name, done, total, _: told.append((name, done, total))
    )
    assert seconds.keys() == {"a", "b", "c"}
    assert [(done, total) for _, done, total in told] == [(1, 3), (2, 3), (3, 3)]


def test_what_does_not_end_in_time_is_named() -> None:
    never = threading.Event()
    try:
        with pytest.raises(DeviceError, match=r"within 0.05 s.*'slow'.*compile_timeout_s"):
            compile_ahead({"slow": lambda: never.wait(timeout=20.0)}, timeout_s=0.05, on_progress=lambda *_: None)
    finally:
        never.set()


def test_a_failure_is_raised_as_it_was() -> None:
    def fails() -> None:
        raise DeviceError("planted")

    with pytest.raises(DeviceError, match="planted"):
        compile_ahead({"bad": fails}, timeout_s=20.0, on_progress=lambda *_: None)


def test_nothing_to_compile_is_done_at_once() -> None:
    assert compile_ahead({}, timeout_s=1.0, on_progress=lambda *_: None) == {}
