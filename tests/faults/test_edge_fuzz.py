"""A peer that has proven itself and then talks nonsense, or whose frames somebody changes on the way: by the thousand.

The edge ends with one of our errors or goes on; what it delivers under a seal is what was sent; memory and descriptors
stay bounded. Edges are made on socket pairs, past the door.
"""

import random
import socket
import threading
from contextlib import suppress

import psutil
import pytest

from hybrid.errors import CommError, CommTimeout
from hybrid.transports.tcp_edge import TcpTransport, Terms
from hybrid.transports.tcp_engine import Engine
from hybrid.transports.tcp_secret import TAG_BYTES, Seal
from hybrid.transports.tcp_socket import TcpOptions
from hybrid.wire import Chunk, Credit, Goodbye, MessageHeader, encode_header

WINDOW_BYTES, FRAME_BYTES = 1 << 16, 1 << 14
OPTIONS = TcpOptions(window_bytes=WINDOW_BYTES, frame_bytes=FRAME_BYTES, linger_s=0.5)
KEY = bytes(range(32))
SHORT, LONG = b"short", random.Random(0).randbytes(FRAME_BYTES + 500)
GROWTH_BYTES = 64 << 20


def _frame(seal: Seal | None, record: bytes, payload: bytes = b"") -> bytes:
    prefix = len(record).to_bytes(2, "big") + bytes(2) + len(payload).to_bytes(4, "big")
    if seal is None:
        return prefix + record + payload
    out = bytearray(len(record) + TAG_BYTES)
    seal.close_into(memoryview(out), record, prefix)
    body = bytearray(len(payload) + TAG_BYTES) if payload else bytearray()
    if payload:
        seal.close_into(memoryview(body), payload)
    return prefix + bytes(out + body)


def _honest(sealed: bool) -> list[bytes]:
    """Return the frames of a short message, a long one, a credit and a goodbye."""
    seal = Seal(KEY) if sealed else None
    spoken = [
        (encode_header(MessageHeader(0, "short", (len(SHORT),), FRAME_BYTES)), SHORT),
        (encode_header(MessageHeader(1, "long", (len(LONG),), FRAME_BYTES)), b""),
        (encode_header(Chunk(1, 0)), LONG[:FRAME_BYTES]),
        (encode_header(Chunk(1, FRAME_BYTES)), LONG[FRAME_BYTES:]),
        (encode_header(Credit(100)), b""),
        (encode_header(Goodbye()), b""),
    ]
    return [_frame(seal, *each) for each in spoken]


def _changed(frames: list[bytes], rng: random.Random) -> bytes:
    """Return the frames as somebody on the way, or a peer out of its mind, would send them."""
    frames = list(frames)
    at = rng.randrange(len(frames))
    frame = bytearray(frames[at])
    match rng.randrange(9):
        case 0:
            frame[rng.randrange(len(frame))] ^= 1 << rng.randrange(8)
        case 1:
            frame[: min(8, len(frame))] = rng.choice((b"\xff" * 8, b"\x00" * 8, b"\x7f" * 8))
        case 2:
            start = rng.randrange(len(frame))
            frame[start : start + 8] = rng.randbytes(8)
        case 3:
            del frame[rng.randrange(len(frame)) :]
        case 4:
            frame *= 2
        case 5:
            frame.clear()
        case 6:
            frame[:] = rng.randbytes(rng.randint(1, 3000))
        case 7:
            rng.shuffle(frames)
            return b"".join(frames)
        case 8:
            frames.insert(rng.randrange(len(frames)), bytes(frame))
            return b"".join(frames)
    frames[at] = bytes(frame)
    return b"".join(frames)


def _suffer(engine: Engine, said: bytes, sealed: bool, posted_first: bool) -> int:
    """Let an edge hear `said`; return how many messages it delivers, under a seal only such as were sent."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    terms = Terms(peer=0, window_bytes=WINDOW_BYTES, frame_bytes=FRAME_BYTES)
    seals = (Seal(bytes(32)), Seal(KEY)) if sealed else None
    with engine.lock:
        edge = TcpTransport(engine, [(ours, seals)], terms, OPTIONS)
    wanted = {"short": SHORT, "long": LONG}
    landed = {tag: bytearray(len(body) + 16) for tag, body in wanted.items()}
    theirs.settimeout(5.0)
    num_delivered = 0
    with theirs, suppress(OSError):
        if posted_first:
            receipts = {tag: edge.recv(tag, [memoryview(landed[tag])[8:-8]]) for tag in wanted}
        theirs.sendall(said)
        theirs.shutdown(socket.SHUT_WR)
        if not posted_first:
            receipts = {tag: edge.recv(tag, [memoryview(landed[tag])[8:-8]]) for tag in wanted}
        for tag, body in wanted.items():
            try:
                receipts[tag].wait(5.0)
            except CommTimeout:
                raise AssertionError("the edge hangs") from None
            except CommError:
                continue
            num_delivered += 1
            assert not sealed or landed[tag][8:-8] == body, f"message {tag!r} came altered under a seal"
        for buffer in landed.values():
            assert buffer[:8] == bytes(8) == buffer[-8:], "bytes were written past the end of a buffer"
    edge.close()
    return num_delivered


@pytest.mark.parametrize("sealed", [False, True])
def test_unchanged_the_frames_deliver_both_messages(sealed: bool) -> None:
    engine = Engine("honest", tick_s=1.0)
    assert _suffer(engine, b"".join(_honest(sealed)), sealed, True) == 2
    engine.close()


def _fuzz(num_messages: int, seed: int, sealed: bool) -> None:
    rng, frames = random.Random(seed), _honest(sealed)
    process, engine = psutil.Process(), Engine("fuzz", tick_s=1.0)
    _suffer(engine, b"".join(frames), sealed, True)
    fds, memory = process.num_fds(), process.memory_info().rss
    for _ in range(num_messages // len(frames) + 1):
        _suffer(engine, _changed(frames, rng), sealed, rng.random() < 0.5)
    assert process.num_fds() <= fds
    assert process.memory_info().rss - memory < GROWTH_BYTES
    engine.close()
    assert not any(thread.name == "fuzz" for thread in threading.enumerate())


@pytest.mark.parametrize("sealed", [False, True])
def test_three_thousand_frames_changed_on_the_way_end_an_edge_or_change_nothing(sealed: bool) -> None:
    _fuzz(3_000, seed=3, sealed=sealed)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sealed", [False, True])
def test_a_hundred_thousand_frames_changed_on_the_way_end_an_edge_or_change_nothing(sealed: bool) -> None:
    _fuzz(100_000, seed=4, sealed=sealed)
