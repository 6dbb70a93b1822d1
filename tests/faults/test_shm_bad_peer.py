"""A peer that writes nonsense into the shared memory ends its edge, and neither crashes nor hangs the other end."""

import random
import socket
import threading
from collections.abc import Callable

import pytest

from hybrid.errors import CommTimeout, PeerLost, ProtocolError
from hybrid.transports import open_node
from hybrid.transports.base import Transport
from hybrid.transports.shm_edge import ShmTransport
from hybrid.transports.shm_segment import Lane
from hybrid.wire import Goodbye, MessageHeader, encode_header

WINDOW_BYTES = 1 << 20
PATIENCE_S = 10.0


class _Pair:
    """Both ends of an edge, of which the low one will lie."""

    def __init__(self) -> None:
        self.nodes = [open_node("shm", rank, window_bytes=WINDOW_BYTES) for rank in (0, 1)]
        ends: list[Transport] = []
        opening = threading.Thread(
            target=lambda: ends.append(self.nodes[1].open(0, self.nodes[0].address, timeout_s=PATIENCE_S)), daemon=True
        )
        opening.start()
        liar = self.nodes[0].open(1, self.nodes[1].address, timeout_s=PATIENCE_S)
        opening.join(PATIENCE_S)
        assert isinstance(liar, ShmTransport)
        self.lane: Lane = liar._out
        self.back: Lane = liar._into
        self.honest = ends[0]

    def close(self) -> None:
        for node in self.nodes:
            node.close()


def _show(lane: Lane, record: bytes, size_bytes: int = 4096) -> None:
    lane.data[: len(record)] = record
    lane.note(0, size_bytes, len(record))


LIES: dict[str, Callable[[_Pair], None]] = {
    "a piece outside the ring": lambda pair: pair.lane.note(pair.lane.data.nbytes - 64, 128, 0),
    "an offset that overflows": lambda pair: pair.lane.note((1 << 64) - 64, 128, 10),
    "a record longer than its piece": lambda pair: pair.lane.note(0, 64, 65),
    "a record that ends in padding beyond its piece": lambda pair: _show(pair.lane, encode_header(Goodbye()), 7),
    "a payload without a record": lambda pair: pair.lane.note(0, 4096, 0),
    "no record at all": lambda pair: _show(pair.lane, b"\xc1" * 40),
    "a record of another kind": lambda pair: _show(pair.lane, encode_header(Goodbye())),
    "a message out of turn": lambda pair: _show(pair.lane, encode_header(MessageHeader(5, "x", (4000,), 4096))),
    "more than was announced": lambda pair: _show(pair.lane, encode_header(MessageHeader(0, "x", (5,), 4096))),
    "more notes than there can be": lambda pair: pair.lane._words.__setitem__(0, 1 << 40),
    "more returns than there can be": lambda pair: pair.back._words.__setitem__(16, 1 << 40),
    "what was never lent given back": lambda pair: pair.back.give_back(64),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_ends_the_edge_with_a_protocol_error(lie: str) -> None:
    pair = _Pair()
    try:
        never = pair.honest.recv("x", [memoryview(bytearray(5))])
        LIES[lie](pair)
        with pytest.raises(ProtocolError):
            never.wait(PATIENCE_S)
        with pytest.raises(ProtocolError):
            pair.honest.send("y", [])
    finally:
        pair.close()


def test_random_notes_and_records_never_crash_or_hang() -> None:
    chance, refused = random.Random(11), 0
    for _ in range(60):
        pair = _Pair()
        try:
            receives = [pair.honest.recv("x", [memoryview(bytearray(9))]) for _ in range(3)]
            for _ in range(chance.randrange(1, 5)):
                start = chance.randrange(0, pair.lane.data.nbytes - 256)
                pair.lane.data[start : start + 200] = chance.randbytes(200)
                sizes = [chance.choice([0, 1, 64, 200, 4096, chance.getrandbits(64)]) for _ in range(2)]
                pair.lane.note(chance.choice([start, chance.getrandbits(64)]), *sizes)
            try:
                receives[0].wait(0.2)
            except (ProtocolError, PeerLost):
                refused += 1
            except CommTimeout:
                pass
        finally:
            pair.close()
    assert refused > 30


def test_random_words_at_the_door_are_refused_or_ignored_and_the_honest_peer_gets_in() -> None:
    chance = random.Random(12)
    low, high = (open_node("shm", rank, window_bytes=WINDOW_BYTES) for rank in (0, 1))
    try:
        strangers = []
        for _ in range(100):
            line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            line.settimeout(PATIENCE_S)
            line.connect("\0" + high.address.rpartition("/")[2])
            for _ in range(chance.randrange(0, 4)):
                try:
                    line.send(chance.randbytes(chance.randrange(1, 8000)))
                except OSError:
                    break  # turned away already
            strangers.append(line)
            # The door is served while its node waits.
            with pytest.raises(CommTimeout):
                high.open(0, low.address, timeout_s=0.0)
        ends: list[Transport] = []
        opening = threading.Thread(
            target=lambda: ends.append(high.open(0, low.address, timeout_s=PATIENCE_S)), daemon=True
        )
        opening.start()
        low.open(1, high.address, timeout_s=PATIENCE_S).send("x", [b"in"]).wait(PATIENCE_S)
        opening.join(PATIENCE_S)
        landed = memoryview(bytearray(2))
        ends[0].recv("x", [landed]).wait(PATIENCE_S)
        assert bytes(landed) == b"in"
        assert len(high.refused) == 16
        for line in strangers:
            line.close()
    finally:
        low.close()
        high.close()
