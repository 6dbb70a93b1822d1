"""What only the TCP transport promises: hostile bytes, replays, callers who never speak, streams side by side."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import get_context

import pytest

from hybrid.errors import CommError, CommTimeout, MachineError, PeerLost, ProtocolError
from hybrid.testing import transport_clauses
from hybrid.testing.transport_probe import measure_round_trip
from hybrid.testing.transport_rig import Landing, Rig, wait_all
from hybrid.transports.arrival import TimeoutRule
from hybrid.transports.base import Transport
from hybrid.transports.tcp import TcpNode
from hybrid.transports.tcp_edge import TcpTransport
from hybrid.transports.tcp_secret import TAG_BYTES, Seal
from hybrid.transports.tcp_socket import TcpOptions
from hybrid.transports.tcp_talk import LENGTH_BYTES, Dialing, length_of, word_of
from hybrid.wire import (
    Chunk,
    Credit,
    Goodbye,
    Hello,
    MessageHeader,
    Refusal,
    decode_header,
    encode_header,
    pack,
)

TOKEN = b"t"
WINDOW_BYTES = 1 << 20
FRAME_BYTES = WINDOW_BYTES // 4


def _node(rank: int, **changes: object) -> TcpNode:
    return TcpNode(rank, TcpOptions(token=TOKEN, window_bytes=WINDOW_BYTES, **changes))  # type: ignore[arg-type]


class RawPeer:
    """Rank 0, by hand: honest at the door, then whatever bytes a test wants."""

    def __init__(self, node: TcpNode, *, num_streams: int = 1, must_seal: bool = False) -> None:
        self.where = node.address.removeprefix("tcp://").rsplit(":", 1)
        edge = os.urandom(16)
        self.sockets, self.seals = [], []
        for stream in range(num_streams):
            opened = self.connect()
            options = TcpOptions(token=TOKEN, window_bytes=WINDOW_BYTES, must_seal=must_seal)
            talk = Dialing(options, rank=0, peer=1, edge=edge, stream=stream, num_streams=num_streams, near=True)
            opened.sendall(talk.approach)
            opened.sendall(talk.answer(self.hear(opened)))
            self.seals.append(talk.end(self.hear(opened)).seals)
            self.sockets.append(opened)

    def connect(self) -> socket.socket:
        return socket.create_connection((self.where[0], int(self.where[1])), timeout=5.0)

    def hear(self, opened: socket.socket) -> bytes:
        head = opened.recv(LENGTH_BYTES, socket.MSG_WAITALL)
        return opened.recv(length_of(head), socket.MSG_WAITALL)

    def write(self, *frames: bytes, stream: int = 0) -> None:
        with suppress(ConnectionError):
            self.sockets[stream].sendall(b"".join(frames))

    def close(self) -> None:
        for opened in self.sockets:
            opened.close()


def _frame(record: bytes, payload: bytes = b"", *, size_bytes: int | None = None, reserved: int = 0) -> bytes:
    announced = len(payload) if size_bytes is None else size_bytes
    return (
        len(record).to_bytes(2, "big") + reserved.to_bytes(2, "big") + announced.to_bytes(4, "big") + record + payload
    )


def _sealed(seal: Seal, record: bytes, payload: bytes = b"") -> bytes:
    prefix = _frame(record, payload)[:8]
    out = bytearray(len(record) + TAG_BYTES)
    seal.close_into(memoryview(out), record, prefix)
    body = bytearray(len(payload) + TAG_BYTES if payload else 0)
    if payload:
        seal.close_into(memoryview(body), payload)
    return prefix + bytes(out) + bytes(body)


@contextmanager
def _attached(**options: object) -> Iterator[tuple[RawPeer, Transport]]:
    """Yield a raw peer and the honest rank 1's end of the edge to it."""
    node = _node(1)
    raw = RawPeer(node, **options)  # type: ignore[arg-type]
    try:
        yield raw, node.open(0, "", timeout_s=10.0)
    finally:
        raw.close()
        node.close()


def _header(seq: int, size_bytes: int, tag: str = "t", frame_bytes: int = FRAME_BYTES) -> bytes:
    return encode_header(MessageHeader(seq, tag, (size_bytes,), frame_bytes))


SHORT = _frame(_header(0, 4), b"1234")
LONG = _frame(_header(0, FRAME_BYTES + 100))
FIRST = _frame(encode_header(Chunk(0, 0)), bytes(FRAME_BYTES))
HOSTILE: list[list[bytes]] = [
    [b"\xff" * 64],
    [bytes(64)],
    [_frame(b"\xc1 not msgpack")],
    [_frame(pack({"a": 1}))],
    [_frame(_header(0, 4), b"1234", reserved=1)],
    [_frame(b"x" * 13_000)],
    [_frame(encode_header(Hello(1, 0, 1, b"t")))],
    [_frame(encode_header(Refusal("no")))],
    [_frame(encode_header(Credit(1)), b"payload where none belongs")],
    [_frame(encode_header(Goodbye()), b"payload")],
    [_frame(encode_header(Chunk(0, 0)), b"chunk of no message")],
    [_frame(_header(1, 4), b"1234")],
    [SHORT, SHORT],
    [_frame(_header(0, 4), b"123")],
    [_frame(_header(0, 4), b"12345")],
    [_frame(_header(0, 4, frame_bytes=1), b"1234")],
    [_frame(_header(0, 4), size_bytes=FRAME_BYTES + 1)],
    [_frame(_header(0, 4), size_bytes=0xFFFFFFFF)],
    [LONG, _frame(encode_header(Chunk(0, 1)), bytes(FRAME_BYTES))],
    [LONG, _frame(encode_header(Chunk(1, 0)), bytes(FRAME_BYTES))],
    [LONG, _frame(encode_header(Chunk(0, 0)), bytes(5))],
    [LONG, _frame(encode_header(Chunk(0, 0)))],
    [LONG, FIRST, FIRST],
    [LONG, _frame(encode_header(Chunk(0, 1 << 40)), bytes(100))],
    [_frame(_header(n, FRAME_BYTES, tag="u"), bytes(FRAME_BYTES)) for n in range(8)],
]


@pytest.mark.parametrize("frames", HOSTILE)
@pytest.mark.parametrize("posted_first", [True, False])
def test_bytes_that_no_honest_peer_sends_end_the_edge_with_protocol_error(
    frames: list[bytes], posted_first: bool
) -> None:
    with _attached() as (raw, edge):
        target = bytearray(16)
        never = edge.recv("never", [])
        if posted_first:
            edge.recv("t", [memoryview(target)[4:8]])
        raw.write(*frames)
        with pytest.raises(ProtocolError):
            never.wait(5.0)
        assert target[:4] == bytes(4) == target[8:12], "bytes were written past the end of a buffer"
        with pytest.raises(ProtocolError):
            edge.send("t", [])


def _replayed(seal: Seal) -> bytes:
    return 2 * _sealed(seal, encode_header(Credit(0)))


def _left_out(seal: Seal) -> bytes:
    _sealed(seal, encode_header(Credit(0)))
    return _sealed(seal, encode_header(Credit(0)))


def _flipped(seal: Seal, at: int) -> bytes:
    frame = bytearray(_sealed(seal, _header(0, 4), b"1234"))
    frame[at] ^= 1
    return bytes(frame)


def _plain(seal: Seal) -> bytes:
    del seal
    return SHORT + bytes(64)


@pytest.mark.parametrize(
    "attack",
    [_replayed, _left_out, _plain, *[partial(_flipped, at=at) for at in (1, 3, 7, 8, 20, -17, -1)]],
)
def test_a_sealed_edge_refuses_what_was_altered_repeated_left_out_or_never_sealed(
    attack: Callable[[Seal], bytes],
) -> None:
    with _attached(must_seal=True) as (raw, edge):
        received = edge.recv("t", [memoryview(bytearray(4))])
        raw.write(attack(raw.seals[0][0]))
        with suppress(CommTimeout):  # a length that was altered upwards waits for more, which never opens
            with pytest.raises(ProtocolError):
                received.wait(0.5)
            return
        raw.write(bytes(2 * FRAME_BYTES))
        with pytest.raises(ProtocolError):
            received.wait(5.0)


def test_a_stream_that_is_cut_inside_a_frame_is_a_lost_peer() -> None:
    with _attached(must_seal=True) as (raw, edge):
        received = edge.recv("t", [memoryview(bytearray(4))])
        raw.write(_sealed(raw.seals[0][0], _header(0, 4), b"1234")[:-1])
        raw.close()
        with pytest.raises(PeerLost):
            received.wait(5.0)


def test_a_chunk_may_come_before_its_header_on_another_stream() -> None:
    with _attached(num_streams=2) as (raw, edge):
        body = random.Random(1).randbytes(FRAME_BYTES + 100)
        landing = Landing([len(body)])
        received = edge.recv("t", landing.views)
        raw.write(_frame(encode_header(Chunk(0, 0)), body[:FRAME_BYTES]), stream=1)
        with pytest.raises(CommTimeout):
            received.wait(0.05)
        raw.write(LONG, _frame(encode_header(Chunk(0, FRAME_BYTES)), body[FRAME_BYTES:]))
        received.wait(5.0)
        landing.check([body], "the message of two streams")


def test_a_header_on_another_stream_than_the_first_is_refused() -> None:
    with _attached(num_streams=2) as (raw, edge):
        raw.write(SHORT, stream=1)
        with pytest.raises(ProtocolError, match="no place here"):
            edge.recv("t", [memoryview(bytearray(4))]).wait(5.0)


@contextmanager
def _afar(num_streams: int) -> Iterator[tuple[TcpTransport, TcpTransport]]:
    """Yield both ends of a sealed edge of several streams, as between hosts: the ends' addresses differ."""
    low = _node(0, host="127.0.0.2", num_streams_afar=num_streams)
    high = _node(1, host="127.0.0.3", num_streams_afar=num_streams)
    try:
        opened: list[Transport] = []
        thread = threading.Thread(target=lambda: opened.append(high.open(0, low.address, timeout_s=5.0)))
        thread.start()
        near = low.open(1, high.address, timeout_s=5.0)
        thread.join()
        assert isinstance(near, TcpTransport)
        assert isinstance(opened[0], TcpTransport)
        yield near, opened[0]
    finally:
        low.close()
        high.close()


def test_between_addresses_an_edge_is_sealed_whoever_asks_and_its_messages_come_whole_over_several_streams() -> None:
    with _afar(3) as (low, high):
        assert low.sealed
        assert high.sealed
        transport_clauses.traffic(Rig(open_node=_unused), low, high, seed=5)
        for sender, receiver in ((low, high), (high, low)):
            body = random.Random(2).randbytes(5 << 20)
            landing = Landing([len(body)])
            wait_all(Rig(open_node=_unused), receiver.recv("long", landing.views), sender.send("long", [body]))
            landing.check([body], "a long message over three streams")


def _unused(rank: int, *, token: bytes, window_bytes: int) -> TcpNode:
    raise AssertionError((rank, token, window_bytes))


def test_inside_one_host_an_edge_is_plain() -> None:
    with _attached() as (_, edge):
        assert isinstance(edge, TcpTransport)
        assert not edge.sealed


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x00\x00",
        b"\xff\xff",
        word_of(Refusal("no")),
        word_of(Hello(1, 0, 1, TOKEN)),
        word_of(Refusal("two")) + b"more than was asked for",
        bytes(5000),
    ],
)
def test_the_door_refuses_strangers_lists_them_and_closes(words: bytes) -> None:
    node = _node(1)
    try:
        with RawPeer.connect(_nowhere(node)) as stranger:
            stranger.sendall(words)
            heard = b""
            with suppress(ConnectionResetError):
                while more := stranger.recv(4096):
                    heard += more
            if heard:
                assert isinstance(decode_header(heard[LENGTH_BYTES:]), Refusal)
        assert len(node.refused) == 1
    finally:
        node.close()


def _nowhere(node: TcpNode) -> RawPeer:
    raw = RawPeer.__new__(RawPeer)
    raw.where = node.address.removeprefix("tcp://").rsplit(":", 1)
    return raw


def test_who_stands_at_the_door_without_a_word_is_sent_away_in_time() -> None:
    node = _node(1, handshake_s=0.1)
    try:
        with RawPeer.connect(_nowhere(node)) as stranger:
            stranger.sendall(b"\x00")
            assert isinstance(decode_header(RawPeer.hear(_nowhere(node), stranger)), Refusal)
            assert stranger.recv(1) == b""
        assert node.refused == ("did not prove the token in time",)
    finally:
        node.close()


def test_a_crowd_at_the_door_does_not_keep_the_honest_peer_out() -> None:
    node = _node(1, max_callers=8)
    crowd = [RawPeer.connect(_nowhere(node)) for _ in range(40)]
    try:
        raw = RawPeer(node)
        edge = node.open(0, "", timeout_s=5.0)
        raw.write(SHORT)
        target = memoryview(bytearray(4))
        edge.recv("t", [target]).wait(5.0)
        assert target == b"1234"
        raw.close()
    finally:
        for stranger in crowd:
            stranger.close()
        node.close()


def test_who_listens_without_the_token_is_refused_by_who_dials() -> None:
    honest, other = _node(0), TcpNode(1, TcpOptions(token=b"another"))
    try:
        with pytest.raises(ProtocolError, match="another job's token"):
            honest.open(1, other.address, timeout_s=5.0)
    finally:
        honest.close()
        other.close()


def _stand_still(address: str) -> None:
    node = _node(0, heartbeat_s=0.1, silence=_HASTY)
    edge = node.open(1, address, timeout_s=30.0)
    edge.send("alive", []).wait(30.0)
    edge.recv("never", []).wait(60.0)


_HASTY = TimeoutRule(initial_s=1.0, floor_s=0.6, cap_s=2.0)


def test_a_peer_that_stands_still_without_closing_is_lost() -> None:
    node = _node(1, heartbeat_s=0.1, silence=_HASTY)
    child = get_context("spawn").Process(target=_stand_still, args=(node.address,), daemon=True)
    child.start()
    try:
        edge = node.open(0, "", timeout_s=30.0)
        edge.recv("alive", []).wait(10.0)
        never = edge.recv("never", [])
        with pytest.raises(CommTimeout):
            never.wait(2.1)  # heartbeats keep an idle edge alive for longer than any silence that is allowed
        assert child.pid is not None
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(PeerLost, match="silent"):
            never.wait(5.0)
    finally:
        child.kill()
        child.join()
        node.close()


def test_what_was_sent_right_before_a_close_arrives_though_the_receiver_looks_late() -> None:
    large = random.Random(1).randbytes(9 << 20)
    for turn in range(8):
        rig = Rig(open_node=_open_wide, window_bytes=64 << 20)
        with rig.open_pair() as (low, high):
            leaver, stayer = (low, high) if turn % 2 else (high, low)
            for pending in [leaver.send("large", [large]), leaver.send("small", [b"last"])]:
                pending.wait(5.0)
            leaver.close()
            targets = memoryview(bytearray(len(large))), memoryview(bytearray(4))
            for tag, target in zip(("large", "small"), targets, strict=True):
                stayer.recv(tag, [target]).wait(5.0)
            assert targets == (large, b"last")


def _open_wide(rank: int, *, token: bytes, window_bytes: int) -> TcpNode:
    return TcpNode(rank, TcpOptions(token=token, window_bytes=window_bytes, must_seal=True))


def test_a_close_with_a_silent_peer_ends_in_time() -> None:
    with _attached() as (_, edge):
        edge.send("t", [bytes(300_000)]).wait(5.0)
        began_s = time.monotonic()
        edge.close()
        assert time.monotonic() - began_s < 3.0


def test_a_process_that_forgets_to_close_still_ends() -> None:
    program = (
        "from functools import partial\n"
        "from hybrid.testing.transport_rig import Rig\n"
        "from hybrid.transports import open_node\n"
        "rig = Rig(open_node=partial(open_node, 'tcp'))\n"
        "low, high = rig.node(0), rig.node(1)\n"
        "ends = rig.join(low, high)\n"
        "ends[0].send('t', [bytes(9 << 20)])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=20)


def test_messages_move_on_while_nobody_waits() -> None:
    rig = Rig(open_node=_open_wide, window_bytes=64 << 20)
    with rig.open_pair() as (low, high):
        landing = Landing([20 << 20])
        received, sent = high.recv("t", landing.views), low.send("t", [bytes(20 << 20)])
        limit_s = time.monotonic() + 5.0
        while not (landing.views[0][-1:] == b"\x00" and _at_rest(received, sent)) and time.monotonic() < limit_s:
            threading.Event().wait(0.005)
        assert _at_rest(received, sent)


def _at_rest(received: object, sent: object) -> bool:
    return bool(received._posted.ended and sent.ended)  # type: ignore[attr-defined]


def test_a_taken_port_is_the_machines_error_and_names_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(MachineError, match=f"127.0.0.1:{port}"):
            _node(0, port=port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_a_host_that_is_not_here_is_the_machines_error(host: str) -> None:
    with pytest.raises(MachineError, match=host):
        _node(0, host=host)


@pytest.mark.parametrize("variant", ["tcp", "tcp-sealed"])
def test_the_probe_measures_a_round_trip(variant: str) -> None:
    assert 0 < measure_round_trip(variant, num_trips=20) < 1.0


def test_an_edge_that_ends_while_another_thread_sends_raises_only_errors_of_ours() -> None:
    for _ in range(20):
        rig = Rig(open_node=_open_wide, window_bytes=1 << 20)
        with rig.open_pair() as (low, high):
            posted = [high.recv("t", [memoryview(bytearray(200_000))]) for _ in range(20)]
            unexpected: list[BaseException] = []

            def send(edge: Transport = low, unexpected: list[BaseException] = unexpected) -> None:
                try:
                    for _ in range(20):
                        edge.send("t", [bytes(200_000)]).wait(5.0)
                except CommError:
                    pass
                except BaseException as error:
                    unexpected.append(error)

            thread = threading.Thread(target=send)
            thread.start()
            posted[0].wait(5.0)
            high.close()
            thread.join(10.0)
            assert not thread.is_alive()
            assert not unexpected
