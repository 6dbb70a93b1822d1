"""A message can be read where the medium has put it, over every transport; shared memory does so without a copy."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hybrid.errors import CommTimeout, ProtocolError
from hybrid.transports import VARIANTS, Transport, open_node
from hybrid.transports.lending import lend

WINDOW_BYTES = 1 << 20
PATIENCE_S = 10.0


@contextmanager
def open_pair(variant: str) -> Iterator[tuple[Transport, Transport]]:
    low, high = (open_node(variant, rank, window_bytes=WINDOW_BYTES) for rank in (0, 1))
    try:
        ends: list[Transport] = []
        opening = threading.Thread(
            target=lambda: ends.append(high.open(0, low.address, timeout_s=PATIENCE_S)), daemon=True
        )
        opening.start()
        below = low.open(1, high.address, timeout_s=PATIENCE_S)
        opening.join(PATIENCE_S)
        yield below, ends[0]
    finally:
        low.close()
        high.close()


@pytest.mark.parametrize("variant", VARIANTS)
def test_lent_messages_take_turns_with_received_ones(variant: str) -> None:
    with open_pair(variant) as (low, high):
        first, landed = lend(high, "x", [5, 0, 70_000]), memoryview(bytearray(3))
        second = high.recv("x", [landed])
        low.send("x", [b"first", b"", b"\x07" * 70_000]).wait(PATIENCE_S)
        low.send("x", [b"two"]).wait(PATIENCE_S)
        second.wait(PATIENCE_S)
        first.wait(PATIENCE_S)
        assert [bytes(buffer) for buffer in first.buffers] == [b"first", b"", b"\x07" * 70_000]
        assert bytes(landed) == b"two"
        first.release()
        first.release()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_message_of_other_sizes_is_refused_at_the_lent_receive_alone(variant: str) -> None:
    with open_pair(variant) as (low, high):
        for size in (4, 300_000):
            low.send("x", [bytes(size)]).wait(PATIENCE_S)
            lent = lend(high, "x", [size + 1])
            with pytest.raises(ProtocolError, match="does not fit"):
                lent.wait(PATIENCE_S)
            lent.release()
        low.send("x", [b"goes on"]).wait(PATIENCE_S)
        lent = lend(high, "x", [7])
        lent.wait(PATIENCE_S)
        assert bytes(lent.buffers[0]) == b"goes on"


def test_what_is_lent_weighs_in_the_window_until_it_is_released() -> None:
    with open_pair("shm") as (low, high):
        size = WINDOW_BYTES // 2
        lent = [lend(high, "x", [size]) for _ in range(4)]
        sent = [low.send("x", [bytes([number]) * size]) for number in range(4)]
        lent[0].wait(PATIENCE_S)
        with pytest.raises(CommTimeout):
            sent[3].wait(0.05)
        for number in range(4):
            lent[number].wait(PATIENCE_S)
            assert bytes(lent[number].buffers[0]) == bytes([number]) * size
            lent[number].release()
            sent[min(number + 1, 3)].wait(PATIENCE_S) if number < 2 else None
        sent[3].wait(PATIENCE_S)


def test_a_lent_message_lies_in_shared_memory_and_outlives_the_edge() -> None:
    before = _num_segments()
    with open_pair("shm") as (low, high):
        lent = lend(high, "x", [WINDOW_BYTES // 2])
        low.send("x", [b"\x09" * (WINDOW_BYTES // 2)]).wait(PATIENCE_S)
        lent.wait(PATIENCE_S)
        view = lent.buffers[0]
        assert view.readonly
        assert _num_segments() == before + 2
        high.close()
        low.close()
        assert bytes(view) == b"\x09" * (WINDOW_BYTES // 2)
        lent.release()
        del view
    assert _num_segments() == before


def _num_segments() -> int:
    """Count the edges' mappings; what only a finished test's traceback still holds is collected first."""
    gc.collect()
    return Path("/proc/self/maps").read_text(encoding="utf-8").count("memfd:hybrid-shm")


def test_messages_that_wait_for_their_receives_do_not_hold_up_the_ring() -> None:
    with open_pair("shm") as (low, high):
        low.send("early", [b"early"]).wait(PATIENCE_S)
        landed = memoryview(bytearray(WINDOW_BYTES // 4))
        for number in range(40):
            low.send("flow", [bytes([number]) * (WINDOW_BYTES // 4)]).wait(PATIENCE_S)
            high.recv("flow", [landed]).wait(PATIENCE_S)
            assert bytes(landed) == bytes([number]) * (WINDOW_BYTES // 4)
        early = memoryview(bytearray(5))
        high.recv("early", [early]).wait(PATIENCE_S)
        assert bytes(early) == b"early"
