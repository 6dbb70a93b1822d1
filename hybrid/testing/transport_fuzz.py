"""The fuzz run: strangers send every listening socket of a node what no honest peer sends, by the thousand.

Black box: it knows TCP and a variant's `open_node`, nothing of the variant's messages. An honest stranger-free
handshake is recorded through a proxy first; strangers then send random bytes, the recording again (a replay), cut,
altered, with huge numbers in it, or followed by a flood, and leave, reset, or stay without a word. Meanwhile an honest
pair goes on exchanging messages. May import only `errors`, `transports` and psutil.
"""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import psutil

from hybrid.errors import HybridError
from hybrid.testing.transport_rig import OpenKitNode, Rig
from hybrid.transports.base import Transport

_NUM_IDLE = 24
"""Connections that are held open without a word at any time."""
_FLOOD_BYTES = 256 << 10
_RECORDED_BYTES = 64 << 10
_SEND_TIMEOUT_S = 0.2


@dataclass(frozen=True, slots=True, kw_only=True)
class FuzzReport:
    """What a fuzz run saw."""

    num_messages: int
    num_connections: int
    num_ports: int
    num_recorded_bytes: int
    growth_bytes: int
    """Of this process's resident memory, at the most."""
    num_honest: int
    """Messages that the honest pair exchanged meanwhile, each checked."""
    num_refused_kept: int
    """Entries that the node's `refused` holds: bounded, or strangers could fill the memory."""
    left_fds: int
    """Open files more than before, after the strangers have gone."""


def fuzz_node(
    open_node: OpenKitNode, *, num_messages: int, seed: int, patience_s: float = 20.0, window_bytes: int = 1 << 20
) -> FuzzReport:
    """Fuzz a node of one variant over TCP; return what happened.

    Raises:
        AssertionError: the honest pair lost or got a wrong message, or could not meet again afterwards.
        HybridError: the honest pair's edge failed.
    """
    rig = Rig(open_node=open_node, patience_s=patience_s, window_bytes=window_bytes)
    rng = random.Random(seed)
    with rig.open_nodes(2) as nodes:
        low, high = nodes
        ports = _listening_ports()
        recorded = _record_handshake(rig, nodes)
        ends = rig.join(low, high)
        ports = tuple(sorted({*ports, *_listening_ports()}))
        pair = _HonestPair(ends, patience_s)
        fds = _num_fds()
        crowd = _Crowd(ports, recorded, rng)
        memory = _Memory()
        with pair.at_work():
            while crowd.num_messages < num_messages:
                crowd.send_one()
                if crowd.num_messages % 256 == 0:
                    memory.look()
        crowd.leave()
        memory.look()
        for end in ends:
            end.close()
        # Whoever was disturbed for good would not meet again.
        for end in rig.join(low, high):
            end.close()
        return FuzzReport(
            num_messages=crowd.num_messages,
            num_connections=crowd.num_connections,
            num_ports=len(ports),
            num_recorded_bytes=sum(map(len, recorded)),
            growth_bytes=memory.growth_bytes,
            num_honest=pair.num_messages,
            num_refused_kept=max(len(node.refused) for node in nodes),
            left_fds=_settled(lambda: _num_fds() - fds, patience_s),
        )


class _HonestPair:
    """Exchanges messages of known content until it is told to stop."""

    def __init__(self, ends: tuple[Transport, Transport], patience_s: float) -> None:
        self._low, self._high = ends
        self._patience_s = patience_s
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self.num_messages = 0

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Exchange meanwhile; raise at the end what went wrong."""
        thread = threading.Thread(target=self._run, name="honest pair", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join(4 * self._patience_s)
        assert not thread.is_alive(), "the honest pair hangs"
        if self._failure is not None:
            raise self._failure
        assert self.num_messages > 0, "the honest pair exchanged nothing"

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._exchange(self._low, self._high)
                self._exchange(self._high, self._low)
        except (HybridError, AssertionError) as error:
            self._failure = error

    def _exchange(self, sender: Transport, receiver: Transport) -> None:
        sent = struct.pack("<Q", self.num_messages) * (1 + self.num_messages % 512)
        got = bytearray(len(sent))
        receiving = receiver.recv("honest", [memoryview(got)])
        sender.send("honest", [sent]).wait(self._patience_s)
        receiving.wait(self._patience_s)
        assert got == sent, f"honest message {self.num_messages} came altered"
        self.num_messages += 1
        self._stop.wait(0.001)


@dataclass(slots=True)
class _Crowd:
    """The strangers."""

    ports: tuple[int, ...]
    recorded: tuple[bytes, ...]
    rng: random.Random
    num_messages: int = 0
    num_connections: int = 0
    _idle: deque[socket.socket] = field(default_factory=deque)

    def send_one(self) -> None:
        """Connect, send one to four messages, and leave in one way or another."""
        try:
            stranger = socket.create_connection(("127.0.0.1", self.rng.choice(self.ports)), timeout=_SEND_TIMEOUT_S)
        except OSError:
            self.num_messages += 1  # a listen queue that is full refuses: that too is an answer
            return
        self.num_connections += 1
        for _ in range(self.rng.randint(1, 4)):
            self.num_messages += 1
            with suppress(OSError):
                stranger.sendall(self._message())
        match self.rng.randrange(8):
            case 0:
                self._idle.append(stranger)
                if len(self._idle) > _NUM_IDLE:
                    _reset(self._idle.popleft())
            case 1:
                stranger.close()
            case _:
                # Most by a reset: thousands of orderly ends would use up the ports of the machine.
                _reset(stranger)

    def leave(self) -> None:
        """End the idle connections."""
        while self._idle:
            _reset(self._idle.popleft())

    def _message(self) -> bytes:
        rng, whole = self.rng, bytearray(self.rng.choice(self.recorded))
        match rng.randrange(7):
            case 0:
                return rng.randbytes(rng.randint(1, 4096))
            case 1:
                return bytes(whole)
            case 2:
                return bytes(whole[: rng.randrange(len(whole))])
            case 3:
                for _ in range(rng.randint(1, 8)):
                    whole[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            case 4:
                start = rng.randrange(len(whole))
                whole[start : start + 8] = rng.choice((b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\x00" * 8))
            case 5:
                return bytes(whole) + rng.randbytes(rng.randint(1, _FLOOD_BYTES))
            case 6:
                start, end = sorted(rng.randrange(len(whole) + 1) for _ in range(2))
                del whole[start:end]
        return bytes(whole)


class _Memory:
    """Resident memory of this process, against what it was at first."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._first = self._process.memory_info().rss
        self.growth_bytes = 0

    def look(self) -> None:
        self.growth_bytes = max(self.growth_bytes, self._process.memory_info().rss - self._first)


def _record_handshake(rig: Rig, nodes: list) -> tuple[bytes, ...]:  # type: ignore[type-arg]
    """Return what the dialling end of an honest edge sends first, and its parts as they came."""
    low, high = nodes
    port = int(re.search(r":(\d+)", high.address)[1])  # type: ignore[index]
    with _recording_proxy(port) as (proxy_port, chunks):
        address = high.address.replace(f":{port}", f":{proxy_port}", 1)

        def dial() -> None:
            with suppress(HybridError):
                low.open(high.rank, address, timeout_s=rig.patience_s / 4).close()

        def answer() -> None:
            with suppress(HybridError):
                high.open(low.rank, low.address, timeout_s=rig.patience_s / 4).close()

        threads = [threading.Thread(target=call, daemon=True) for call in (dial, answer)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(rig.patience_s)
        parts = [bytes(chunk) for chunk in chunks if chunk]
    assert parts, "no handshake was recorded: the address leads elsewhere"
    return (b"".join(parts)[:_RECORDED_BYTES], *(part[:_RECORDED_BYTES] for part in parts[:8]))


@contextmanager
def _recording_proxy(port: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield a port that passes bytes on to `port` and back, and the list of what went there."""
    chunks: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.1)
    stop = threading.Event()
    opened: list[socket.socket] = []

    def pump(source: socket.socket, target: socket.socket, kept: list[bytes] | None) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if kept is not None and len(kept) < 64:
                    kept.append(data)
                target.sendall(data)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)

    def accept() -> None:
        while not stop.is_set():
            try:
                outer, _ = server.accept()
                inner = socket.create_connection(("127.0.0.1", port), timeout=5)
            except OSError:
                continue
            inner.settimeout(None)
            outer.settimeout(None)
            opened.extend((outer, inner))
            threading.Thread(target=pump, args=(outer, inner, chunks), daemon=True).start()
            threading.Thread(target=pump, args=(inner, outer, None), daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield server.getsockname()[1], chunks
    finally:
        stop.set()
        thread.join(5)
        server.close()
        for each in opened:
            _reset(each)


def _reset(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


def _listening_ports() -> tuple[int, ...]:
    connections = psutil.Process().net_connections(kind="tcp")
    return tuple(sorted({c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}))


def _num_fds() -> int:
    return int(psutil.Process().num_fds())


def _settled(measure: Callable[[], int], patience_s: float) -> int:
    """Return a number once it is no more than zero, or after a while as it is."""
    deadline_s = time.monotonic() + patience_s
    while (value := measure()) > 0 and time.monotonic() < deadline_s:
        threading.Event().wait(0.05)
    return max(0, value)
