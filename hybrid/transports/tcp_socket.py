"""TCP sockets as this transport wants them: never blocking, kept alive, watched by the kernel.

Only options and addresses; no messages. May import only `errors`, `wire`, `transports.base` and
`transports.arrival`.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass

from hybrid.errors import MachineError, ProtocolError
from hybrid.transports.arrival import TimeoutRule
from hybrid.transports.base import DEFAULT_WINDOW_BYTES, MIN_WINDOW_BYTES
from hybrid.wire import MAX_FRAME_BYTES

MAX_STREAMS = 16
SILENCE = TimeoutRule(initial_s=30.0, floor_s=15.0, cap_s=120.0)
"""Long, since a process that holds Python's lock for a while says nothing; a killed one and a dead host are noticed by
the kernel, within seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpOptions:
    """What a node's user may set."""

    host: str = "127.0.0.1"
    """Address or name of the interface to listen on."""
    port: int = 0
    """0 takes a free one."""
    token: bytes = b""
    """The job's secret; it never travels."""
    must_seal: bool = False
    """Encrypt also between ranks of one host; between hosts there is no choice."""
    window_bytes: int = DEFAULT_WINDOW_BYTES
    frame_bytes: int = 4 << 20
    """Longer messages travel in frames of this."""
    join_below_bytes: int = 64 << 10
    """Messages of several buffers, up to this together, travel as one frame."""
    num_streams_afar: int = 4
    """Connections an edge between hosts: clouds and switches bound the rate of each."""
    heartbeat_s: float = 1.0
    silence: TimeoutRule = SILENCE
    """How long a peer may say nothing, heartbeats included: follows the longest of its last silences."""
    lost_after_s: float = 5.0
    """A host that does not answer the kernel's own probes for this long is lost."""
    handshake_s: float = 5.0
    """How long someone at the door may take to prove the token."""
    max_callers: int = 64
    """How many may stand at the door; one more sends the longest there away."""
    linger_s: float = 2.0
    """How long a close may go on sending what was sent before it."""

    def __post_init__(self) -> None:
        assert self.window_bytes >= MIN_WINDOW_BYTES, f"window_bytes is at least {MIN_WINDOW_BYTES}"
        assert 1 <= self.frame_bytes <= MAX_FRAME_BYTES, f"frame_bytes is 1 to {MAX_FRAME_BYTES}"
        assert 1 <= self.num_streams_afar <= MAX_STREAMS, f"num_streams_afar is 1 to {MAX_STREAMS}"


def listen(options: TcpOptions) -> tuple[socket.socket, str]:
    """Return a listening socket and the address that peers dial.

    Raises:
        MachineError: the port is taken, or the host is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    where = f"{options.host}:{options.port}"
    try:
        resolved = socket.getaddrinfo(options.host, options.port, family, socket.SOCK_STREAM)[0][4]
    except OSError:
        raise MachineError(
            "no such host to listen on", value=options.host, fix="give an address or a name of this machine"
        ) from None
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(resolved)
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == 98:
            fix = "end the process that listens there, choose another port, or 0 for a free one"
            raise MachineError("the port is taken", value=where, fix=fix) from None
        raise MachineError(
            f"cannot listen: {error.strerror}", value=where, fix="give an address of this machine"
        ) from None
    listener.setblocking(False)
    host, port = listener.getsockname()[:2]
    return listener, f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def parse_address(address: str) -> tuple[str, int]:
    """Return host and port.

    Raises:
        ProtocolError: no address of this medium.
    """
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    if not (address.startswith("tcp://") and host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ProtocolError("no address of this medium", value=address[:80], valid="tcp://HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def make_lively(opened: socket.socket, options: TcpOptions) -> None:
    """Set what an edge's socket needs: no waiting for more to send, and a kernel that notices a peer that is no more.

    The buffers' sizes are left to the kernel, which lets them grow with the link: fixed ones were not faster here.
    """
    opened.setblocking(False)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    interval_s = max(1, round(options.lost_after_s / 5))
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval_s)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval_s)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    # Of data that the peer's host has not acknowledged: half-open connections end also while we send.
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(2 * options.silence.floor_s * 1000))


def stays_on_host(opened: socket.socket) -> bool:
    """Return whether both ends of a connection have the same address: then it cannot leave this host."""
    try:
        ours, theirs = opened.getsockname()[0], opened.getpeername()[0]
    except OSError:
        return False
    return bool(ours == theirs)
