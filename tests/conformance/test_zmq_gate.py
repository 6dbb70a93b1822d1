"""ZeroMQ edges that leave the host: encrypted, and closed to who has not the job's key."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
import zmq

from hybrid.errors import CommError, CommTimeout, ProtocolError
from hybrid.transports import Transport
from hybrid.transports.zmq import ZmqNode
from hybrid.transports.zmq_gate import make_keys, split_key, with_key
from hybrid.transports.zmq_socket import ZmqOptions, is_loopback
from hybrid.wire import PROTOCOL_VERSION, Hello, encode_header

TOKEN = b"the job's"


def _node(rank: int, token: bytes = TOKEN, **changes: object) -> ZmqNode:
    return ZmqNode(rank, ZmqOptions(medium="tcp", token=token, must_encrypt=True, **changes))  # type: ignore[arg-type]


@contextmanager
def _open_door() -> Iterator[ZmqNode]:
    """Yield rank 1's node while a thread of its waits for rank 0, so that its door is answered."""
    node = _node(1)
    opener = threading.Thread(target=_open_in_vain, args=(node,))
    opener.start()
    try:
        yield node
    finally:
        node.close()
        opener.join()


def _open_in_vain(node: ZmqNode) -> None:
    with suppress(CommError):
        node.open(0, "", timeout_s=10.0)


@pytest.mark.parametrize(
    ("host", "encrypted"),
    [("127.0.0.1", False), ("127.3.2.1", False), ("::1", False), ("10.0.0.1", True), ("localhost", True), ("n1", True)],
)
def test_a_listener_that_can_be_reached_from_elsewhere_is_encrypted_without_being_asked(host: str, encrypted: bool):
    assert is_loopback(host) is not encrypted
    assert ZmqOptions(medium="tcp", host=host).encrypted is encrypted
    assert ZmqOptions(medium="tcp", host=host, must_encrypt=True).encrypted
    assert not ZmqOptions(medium="ipc", host=host).encrypted


def test_the_public_key_travels_in_the_address():
    public, _ = zmq.curve_keypair()
    assert split_key(with_key("tcp://10.0.0.1:5", public)) == ("tcp://10.0.0.1:5", public)
    assert split_key("ipc://@x") == ("ipc://@x", None)
    assert split_key("tcp://127.0.0.1:5") == ("tcp://127.0.0.1:5", None)


@pytest.mark.parametrize(
    "address", ["tcp://10.0.0.1:5", "tcp://10.0.0.1:5#", "tcp://10.0.0.1:5#0g", "tcp://[2001::1]:5"]
)
def test_an_address_that_would_be_spoken_to_in_the_clear_is_refused(address: str):
    with pytest.raises(ProtocolError, match="key"):
        split_key(address)


def test_a_node_that_must_encrypt_dials_no_address_without_a_key():
    node = _node(0)
    try:
        with pytest.raises(ProtocolError, match="encryption is demanded"):
            node.open(1, "tcp://127.0.0.1:9", timeout_s=1.0)
    finally:
        node.close()


def test_nodes_of_one_job_have_different_keys_and_know_the_jobs():
    one, two = make_keys(TOKEN), make_keys(TOKEN)
    assert one.own_public != two.own_public
    assert (one.job_public, one.job_secret) == (two.job_public, two.job_secret)
    assert make_keys(b"another").job_public != one.job_public


def test_a_rank_of_another_job_is_refused_at_the_door_and_logged(caplog: pytest.LogCaptureFixture):
    stranger = _node(0, b"another job's")
    try:
        with _open_door() as node, pytest.raises(ProtocolError, match="not of its job"):
            stranger.open(1, node.address, timeout_s=5.0)
        assert "not of this job" in node.refused[0]
        assert "127.0.0.1" in node.refused[0]
        assert "not of this job" in caplog.text
    finally:
        stranger.close()


@pytest.mark.parametrize("kind", ["no key", "the key of another door"])
def test_who_does_not_speak_to_the_door_as_its_address_says_is_not_heard(kind: str):
    with _open_door() as node, zmq.Context() as context:
        endpoint, _ = split_key(node.address)
        stranger = context.socket(zmq.DEALER)
        stranger.setsockopt(zmq.LINGER, 0)
        if kind != "no key":
            make_keys(TOKEN).secure_dialer(stranger, zmq.curve_keypair()[0], b"")
        stranger.connect(endpoint)
        stranger.send(encode_header(Hello(PROTOCOL_VERSION, 0, 1, TOKEN)))
        assert not stranger.poll(300)
        stranger.close(0)
        honest = _node(0)
        edge = honest.open(1, node.address, timeout_s=5.0)
        assert edge.peer == 1
        honest.close()


def test_an_edges_own_socket_is_closed_to_who_has_not_the_jobs_key():
    node, honest = _node(1), _node(0)
    opened: list[Transport] = []
    opener = threading.Thread(target=lambda: opened.append(node.open(0, "", timeout_s=10.0)))
    opener.start()
    edge = honest.open(1, node.address, timeout_s=5.0)
    opener.join()
    try:
        endpoint = edge._socket.getsockopt_string(zmq.LAST_ENDPOINT)  # type: ignore[attr-defined]
        received = opened[0].recv("t", [memoryview(bytearray(4))])
        with zmq.Context() as context:
            stranger = context.socket(zmq.PAIR)
            stranger.connect(endpoint)
            stranger.send(b"anything", zmq.NOBLOCK)
            with pytest.raises(CommTimeout):
                received.wait(0.2)
            stranger.close(0)
        edge.send("t", [b"good"]).wait(5.0)
        received.wait(5.0)
    finally:
        node.close()
        honest.close()


@pytest.mark.slow
def test_events_of_many_strangers_do_not_stop_the_honest_peers_heartbeats():
    node, honest = _node(1, heartbeat_s=0.1, lost_after_s=1.0), _node(0, heartbeat_s=0.1, lost_after_s=1.0)
    opened: list[Transport] = []
    opener = threading.Thread(target=lambda: opened.append(node.open(0, "", timeout_s=10.0)))
    opener.start()
    edge = honest.open(1, node.address, timeout_s=5.0)
    opener.join()
    try:
        endpoint = edge._socket.getsockopt_string(zmq.LAST_ENDPOINT)  # type: ignore[attr-defined]
        host, port = endpoint.removeprefix("tcp://").rsplit(":", 1)
        for _ in range(2500):  # more than the events that a socket pair of libzmq holds by default
            with socket.create_connection((host, int(port)), timeout=5.0):
                pass
        edge.send("t", [b"good"]).wait(5.0)
        opened[0].recv("t", [memoryview(bytearray(4))]).wait(5.0)
    finally:
        node.close()
        honest.close()
