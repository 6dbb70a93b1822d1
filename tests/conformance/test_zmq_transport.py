"""What only the ZeroMQ transport promises: hostile bytes, silent peers, taken ports, nothing left behind."""

import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrid.errors import CommError, CommTimeout, ConfigError, MachineError, PeerLost, ProtocolError
from hybrid.testing import transport_clauses
from hybrid.testing.transport_probe import measure_round_trip
from hybrid.testing.transport_rig import Rig
from hybrid.transports import Transport, open_node
from hybrid.transports.zmq import ZmqNode
from hybrid.transports.zmq_gate import make_keys
from hybrid.transports.zmq_socket import ZmqOptions
from hybrid.wire import (
    MAX_FRAME_BYTES,
    PROTOCOL_VERSION,
    Attach,
    Chunk,
    Credit,
    Hello,
    MessageHeader,
    Refusal,
    Welcome,
    decode_header,
    encode_header,
    pack,
)

WINDOW_BYTES = 1 << 20
RIG = Rig(open_node=partial(open_node, "zmq-ipc"))


class RawPeer:
    """Rank 0, by hand: speaks whatever bytes a test wants."""

    def __init__(self) -> None:
        self.context = zmq.Context()

    def _socket(self, kind: int, address: str, word: bytes) -> zmq.Socket[bytes]:
        opened = self.context.socket(kind)
        opened.setsockopt(zmq.LINGER, 1000)
        make_keys(b"t").secure_dialer(opened, None, word)
        opened.connect(address)
        return opened

    def knock(self, address: str, *frames: bytes) -> object:
        door = self._socket(zmq.DEALER, address, make_keys(b"t").door_word)
        door.send_multipart(frames)
        assert door.poll(5000), "the door did not answer"
        answer = decode_header(door.recv())
        door.close()
        return answer

    def attach(self, address: str, *, secret: bytes | None = None) -> zmq.Socket[bytes]:
        welcome = self.knock(address, encode_header(Hello(PROTOCOL_VERSION, 0, 1, b"t")))
        assert isinstance(welcome, Welcome)
        edge = self._socket(zmq.PAIR, welcome.endpoint, welcome.secret)
        edge.send(encode_header(Attach(welcome.secret if secret is None else secret, WINDOW_BYTES)))
        return edge


@contextmanager
def _victim(medium: str = "zmq-ipc") -> Iterator[tuple[RawPeer, ZmqNode]]:
    node = open_node(medium, 1, token=b"t", window_bytes=WINDOW_BYTES)
    assert isinstance(node, ZmqNode)
    raw = RawPeer()
    try:
        yield raw, node
    finally:
        node.close()
        raw.context.destroy(0)


@contextmanager
def _attached() -> Iterator[tuple[zmq.Socket[bytes], Transport]]:
    """Yield a raw socket and the honest rank 1's end of the edge to it."""
    with _victim() as (raw, node):
        opened: list[Transport] = []
        opener = threading.Thread(target=lambda: opened.append(node.open(0, "", timeout_s=10.0)))
        opener.start()
        edge = raw.attach(node.address)
        opener.join()
        assert isinstance(decode_header(edge.recv()), Attach)
        yield edge, opened[0]
        edge.close()


HEADER = encode_header(MessageHeader(0, "t", (4,), 1 << 16))
LONG = encode_header(MessageHeader(0, "t", (100_000,), 1 << 16))


@pytest.mark.parametrize(
    "messages",
    [
        [[b""]],
        [[b"\xc1 not msgpack"]],
        [[os.urandom(100_000)]],
        [[pack({"a": 1})]],
        [[encode_header(Hello(1, 0, 1, b"t"))]],
        [[encode_header(Attach(b"again", WINDOW_BYTES))]],
        [[encode_header(Chunk(0, 0)), b"chunk of no message"]],
        [[encode_header(Credit(1)), b"payload where none belongs"]],
        [[encode_header(MessageHeader(1, "t", (4,), 100)), b"1234"]],
        [[HEADER, b"1234"], [HEADER, b"1234"]],
        [[HEADER, b"123"]],
        [[HEADER, b"12345"]],
        [[HEADER, b"1234", b"more"]],
        [[LONG, bytes(100_000)]],
        [[LONG], [HEADER, b"1234"]],
        [[LONG], [encode_header(Chunk(0, 1)), bytes(1 << 16)]],
        [[LONG], [encode_header(Chunk(1, 0)), bytes(1 << 16)]],
        [[LONG], [encode_header(Chunk(0, 0)), bytes(5)]],
        [[LONG], [encode_header(Chunk(0, 0))]],
        [[LONG], [encode_header(Chunk(0, 0)), bytes((1 << 16) + 1)]],
        [[encode_header(MessageHeader(n, "u", (1 << 18,), 1 << 18)), bytes(1 << 18)] for n in range(8)],
    ],
)
@pytest.mark.parametrize("posted_first", [True, False])
def test_bytes_that_no_honest_peer_sends_end_the_edge_with_protocol_error(
    messages: list[list[bytes]], posted_first: bool
) -> None:
    with _attached() as (raw, edge):
        target = bytearray(16)
        never = edge.recv("never", [])
        if posted_first:
            edge.recv("t", [memoryview(target)[4:8]])
        for frames in messages:
            raw.send_multipart(frames)
        with pytest.raises(ProtocolError):
            never.wait(5.0)
        assert target[:4] == bytes(4) == target[8:12], "bytes were written past the end of a buffer"
        with pytest.raises(ProtocolError):
            edge.send("t", [])


def test_a_frame_over_the_limit_ends_the_connection_before_it_is_read() -> None:
    with _attached() as (raw, edge):
        raw.send(bytes(MAX_FRAME_BYTES + 1))
        with pytest.raises(PeerLost):
            edge.recv("never", []).wait(5.0)


def test_random_bytes_never_crash_or_hang_an_edge() -> None:
    chance = random.Random(11)
    honest = [HEADER, LONG, encode_header(Chunk(0, 0)), encode_header(Credit(5)), encode_header(Refusal("x"))]
    for _ in range(40):
        with _attached() as (raw, edge):
            never = edge.recv("never", [])
            for _ in range(chance.randint(1, 20)):
                frame = bytearray(chance.choice(honest))
                frame[chance.randrange(len(frame))] ^= 1 << chance.randrange(8)
                raw.send_multipart(
                    [bytes(frame), *[chance.randbytes(chance.choice([0, 4, 100]))] * chance.randint(0, 2)]
                )
            raw.close()
            with pytest.raises((ProtocolError, PeerLost)):
                never.wait(5.0)


@pytest.mark.parametrize(
    "frames",
    [
        [b"junk"],
        [b""],
        [b"a", b"b", b"c"],
        [encode_header(Hello(PROTOCOL_VERSION + 1, 0, 1, b"t"))],
        [encode_header(Hello(PROTOCOL_VERSION, 0, 1, b"wrong"))],
        [encode_header(Hello(PROTOCOL_VERSION, 0, 1, b""))],
        [encode_header(Hello(PROTOCOL_VERSION, 0, 2, b"t"))],
        [encode_header(Hello(PROTOCOL_VERSION, 1, 1, b"t"))],
        [encode_header(Hello(PROTOCOL_VERSION, 7, 1, b"t"))],
        [encode_header(Credit(1))],
    ],
)
def test_the_door_refuses_strangers_and_lists_them(frames: list[bytes]) -> None:
    with _victim() as (raw, node):
        opener = threading.Thread(target=partial(_ignore, partial(node.open, 0, "", timeout_s=10.0)))
        opener.start()
        assert isinstance(raw.knock(node.address, *frames), Refusal)
        node.close()  # ends the open in the other thread
        opener.join()
        assert len(node.refused) == 1


def test_a_stranger_who_speaks_first_on_an_edges_socket_only_delays_the_honest_peer() -> None:
    with _victim("zmq-tcp") as (raw, node):
        honest = open_node("zmq-tcp", 0, token=b"t")
        opened: list[Transport] = []
        opener = threading.Thread(target=lambda: opened.append(node.open(0, "", timeout_s=10.0)))
        opener.start()
        raw.attach(node.address, secret=b"guessed")
        edge = honest.open(1, node.address, timeout_s=10.0)
        opener.join()
        edge.send("t", [b"hello"]).wait(5.0)
        target = memoryview(bytearray(5))
        opened[0].recv("t", [target]).wait(5.0)
        assert target == b"hello"
        honest.close()


def test_a_stranger_who_dials_an_edge_in_use_does_not_disturb_it() -> None:
    with _victim("zmq-tcp") as (raw, node), RawPeer().context as context:
        opened: list[Transport] = []
        opener = threading.Thread(target=lambda: opened.append(node.open(0, "", timeout_s=10.0)))
        opener.start()
        edge = raw.attach(node.address)
        opener.join()
        stranger = context.socket(zmq.PAIR)
        stranger.connect(edge.getsockopt_string(zmq.LAST_ENDPOINT))
        stranger.send(HEADER)
        target = memoryview(bytearray(4))
        received = opened[0].recv("t", [target])
        stranger.close(0)
        with pytest.raises(CommTimeout):
            received.wait(0.2)
        edge.send_multipart([HEADER, b"good"])
        received.wait(5.0)
        assert target == b"good"


def _ignore(call: object) -> None:
    with suppress(CommError):
        call()  # type: ignore[operator]


def _stand_still(address: str, pipe: object) -> None:
    node = ZmqNode(0, ZmqOptions(medium="tcp", heartbeat_s=0.1, lost_after_s=0.6))
    edge = node.open(1, address, timeout_s=30.0)
    edge.send("alive", []).wait(30.0)
    edge.recv("never", []).wait(60.0)


def test_a_peer_that_stands_still_without_closing_is_lost() -> None:
    node = ZmqNode(1, ZmqOptions(medium="tcp", heartbeat_s=0.1, lost_after_s=0.6))
    child = multiprocessing.get_context("spawn").Process(target=_stand_still, args=(node.address, None), daemon=True)
    child.start()
    try:
        edge = node.open(0, "", timeout_s=30.0)
        edge.recv("alive", []).wait(10.0)
        assert child.pid is not None
        never = edge.recv("never", [])
        with pytest.raises(CommTimeout):
            never.wait(1.0)  # heartbeats keep an idle edge alive for longer than `lost_after_s`
        os.kill(child.pid, signal.SIGSTOP)
        taken = edge.send("taken", [bytes(20 << 20)])
        with pytest.raises(PeerLost):
            never.wait(5.0)
        taken.wait(5.0)  # ZeroMQ had all of it, and has let go of the buffer
    finally:
        child.kill()
        child.join()
        node.close()


def test_a_taken_port_is_the_machines_error_and_names_the_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(MachineError, match=f"127.0.0.1:{port}"):
            open_node("zmq-tcp", 0, port=port)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7"])
def test_a_host_that_is_not_here_is_the_machines_error(host: str) -> None:
    with pytest.raises(MachineError, match=host):
        open_node("zmq-tcp", 0, host=host)


def test_an_unknown_transport_names_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="zmq-tcp, zmq-curve, zmq-ipc"):
        open_node("carrier-pigeon", 0)


def test_an_address_of_another_medium_is_refused() -> None:
    with open_and_close("zmq-tcp", 0) as node, pytest.raises(ProtocolError, match="no address"):
        node.open(1, "inproc-1", timeout_s=1.0)


@contextmanager
def open_and_close(name: str, rank: int) -> Iterator[ZmqNode]:
    node = open_node(name, rank)
    assert isinstance(node, ZmqNode)
    try:
        yield node
    finally:
        node.close()


def test_ipc_leaves_no_file_and_tcp_publishes_its_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RIG.open_pair():
        assert not list(tmp_path.iterdir())
    with open_and_close("zmq-tcp", 0) as node:
        host, port = node.address.removeprefix("tcp://").rsplit(":", 1)
        assert host == "127.0.0.1"
        assert 0 < int(port) < 65536


@pytest.mark.parametrize("variant", ["zmq-tcp", "zmq-ipc"])
def test_what_was_sent_right_before_a_close_arrives_though_the_receiver_looks_late(variant: str) -> None:
    large = random.Random(1).randbytes(9 << 20)
    for turn in range(8):
        rig = Rig(open_node=partial(open_node, variant), window_bytes=64 << 20)
        with rig.open_pair() as (low, high):
            leaver, stayer = (low, high) if turn % 2 else (high, low)
            for pending in [leaver.send("large", [large]), leaver.send("small", [b"last"])]:
                pending.wait(5.0)
            leaver.close()
            targets = memoryview(bytearray(len(large))), memoryview(bytearray(4))
            for tag, target in zip(("large", "small"), targets, strict=True):
                stayer.recv(tag, [target]).wait(5.0)
            assert targets == (large, b"last")


def test_a_send_that_was_received_ends_well_though_the_peer_has_closed_since() -> None:
    large = bytes(2 << 20)
    rig = Rig(open_node=partial(open_node, "zmq-ipc"), window_bytes=64 << 20)
    for _ in range(10):
        with rig.open_pair() as (low, high):
            sent = low.send("large", [large])
            high.recv("large", [memoryview(bytearray(len(large)))]).wait(5.0)
            high.close()
            with pytest.raises(PeerLost):
                low.recv("never", []).wait(5.0)
            sent.wait(5.0)


def test_a_close_with_a_silent_peer_ends_in_time() -> None:
    with _attached() as (_, edge):
        edge.send("t", [bytes(300_000)]).wait(5.0)
        began_s = time.monotonic()
        edge.close()
        assert time.monotonic() - began_s < 3.0


def test_a_process_that_forgets_to_close_still_ends() -> None:
    program = (
        "from hybrid.transports import open_node\n"
        "from hybrid.testing.transport_rig import Rig\n"
        "from functools import partial\n"
        "rig = Rig(open_node=partial(open_node, 'zmq-tcp'))\n"
        "low, high = rig.node(0), rig.node(1)\n"
        "ends = rig.join(low, high)\n"
        "ends[0].send('t', [bytes(9 << 20)])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=20)


@pytest.mark.parametrize("variant", ["inproc", "zmq-tcp", "zmq-ipc"])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32))
def test_random_traffic_arrives_whole_once_and_in_order(variant: str, seed: int) -> None:
    rig = Rig(open_node=partial(open_node, variant))
    with rig.open_pair() as (low, high):
        transport_clauses.traffic(rig, low, high, seed=seed, num_messages=25)


@pytest.mark.parametrize("variant", ["inproc", "zmq-tcp", "zmq-ipc"])
def test_the_probe_measures_a_round_trip(variant: str) -> None:
    assert 0 < measure_round_trip(variant, num_trips=20) < 1.0
