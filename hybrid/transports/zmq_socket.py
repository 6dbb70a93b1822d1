"""ZeroMQ sockets as this transport wants them: bounded, never reconnecting, watched.

Only options and the monitor; no messages. May import only `errors`, `wire`, `transports.base` and zmq.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

import zmq

from hybrid.errors import MachineError
from hybrid.transports.base import DEFAULT_WINDOW_BYTES, MIN_WINDOW_BYTES
from hybrid.wire import MAX_FRAME_BYTES

Medium = Literal["tcp", "ipc"]
Socket: TypeAlias = "zmq.Socket[bytes]"
Context: TypeAlias = "zmq.Context[zmq.Socket[bytes]]"

_NEVER_MS = 10_000_000
"""Reconnecting is put off this long (2.8 h) instead of switched off: switched off, libzmq throws away what it
had received but not yet handed over when the connection ends (4.3.5, session_base_t::reconnect)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ZmqOptions:
    """What a node's user may set."""

    medium: Medium
    host: str = "127.0.0.1"
    """Address or name of the interface to listen on; only with tcp."""
    port: int = 0
    """0 takes a free one; only with tcp."""
    token: bytes = b""
    """The job's secret; who knocks without it is refused."""
    must_encrypt: bool = False
    """Encrypt on loopback addresses too; only with tcp. What leaves the host has no choice."""
    window_bytes: int = DEFAULT_WINDOW_BYTES
    frame_bytes: int = 2 << 20
    """Longer messages travel in frames of this."""
    copy_below_bytes: int = 64 << 10
    """Messages up to this are copied into ZeroMQ's memory: the send ends at once."""
    heartbeat_s: float = 1.0
    lost_after_s: float = 5.0
    """A connection that is silent, heartbeats included, for this long is lost."""
    handshake_s: float = 5.0
    """How long a connection may take to become one; a stranger's is cut then."""
    linger_s: float = 2.0
    """How long a close may go on sending what was sent before it."""
    keep_freed_memory: bool = True
    """See `zmq_memory`; concerns the whole process."""

    @property
    def encrypted(self) -> bool:
        """Whether who listens here demands CURVE: unless the kernel itself keeps what is said on this host."""
        return self.medium == "tcp" and (self.must_encrypt or not is_loopback(self.host))

    def __post_init__(self) -> None:
        assert self.window_bytes >= MIN_WINDOW_BYTES, f"window_bytes is at least {MIN_WINDOW_BYTES}"
        assert 1 <= self.frame_bytes <= MAX_FRAME_BYTES, f"frame_bytes is 1 to {MAX_FRAME_BYTES}"


def is_loopback(host: str) -> bool:
    """Return whether a socket that is bound to, or dials, this address cannot leave this host; of a name: no."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def open_socket(context: Context, kind: int, options: ZmqOptions) -> Socket:
    """Return a socket that pings its peer, takes frames of bounded size, and drops what is unsent when it closes."""
    try:
        opened = context.socket(kind)
    except zmq.ZMQError as error:
        raise MachineError(f"cannot open a socket: {error.strerror}", fix="raise the limit of open files") from None
    opened.setsockopt(zmq.LINGER, 0)
    opened.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    opened.setsockopt(zmq.HEARTBEAT_IVL, max(int(options.heartbeat_s * 1000), 1))
    opened.setsockopt(zmq.HEARTBEAT_TIMEOUT, max(int(options.lost_after_s * 1000), 1))
    opened.setsockopt(zmq.HANDSHAKE_IVL, max(int(options.handshake_s * 1000), 1))
    if options.medium == "ipc":
        # The kernel tells who connects: another user's process never gets as far as the token.
        opened.setsockopt(zmq.IPC_FILTER_UID, os.getuid())
        return opened
    # A ping does not get past what waits to be sent: then the kernel must notice that the peer takes nothing.
    opened.setsockopt(zmq.TCP_MAXRT, max(int(options.lost_after_s * 1000), 1))
    if ":" in options.host:
        opened.setsockopt(zmq.IPV6, 1)
    return opened


def open_edge_socket(context: Context, options: ZmqOptions) -> Socket:
    """Return a PAIR socket: one peer, both directions; a broken connection stays broken."""
    opened = open_socket(context, zmq.PAIR, options)
    # Credits bound what is under way. A high-water mark would do it by no longer reading
    # the connection, heartbeats included, and a slow rank would be taken for a lost one.
    opened.setsockopt(zmq.SNDHWM, 0)
    opened.setsockopt(zmq.RCVHWM, 0)
    opened.setsockopt(zmq.RECONNECT_IVL, _NEVER_MS)
    # What is to be sent in place is: pyzmq would copy the short ones, out of order with the long.
    opened.copy_threshold = 0
    return opened


def bind(listener: Socket, options: ZmqOptions, *, port: int = 0) -> str:
    """Listen and return the endpoint that peers dial.

    An ipc endpoint is an abstract socket of random name: no file, and nothing left behind by a killed process.

    Raises:
        MachineError: the port is taken, or the host is no address of this machine.
    """
    if options.medium == "ipc":
        endpoint = f"ipc://@hybrid-{secrets.token_hex(16)}"
        listener.bind(endpoint)
        return endpoint
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        address = socket.getaddrinfo(options.host, None, family, socket.SOCK_STREAM)[0][4][0]
    except OSError:
        raise MachineError(
            "no such host to listen on", value=options.host, fix="give an address or a name of this machine"
        ) from None
    try:
        listener.bind(f"tcp://[{address}]:{port}" if ":" in options.host else f"tcp://{address}:{port}")
    except zmq.ZMQError as error:
        if error.errno == zmq.EADDRINUSE:
            fix = "end the process that listens there, choose another port, or 0 for a free one"
            raise MachineError("the port is taken", value=f"{options.host}:{port}", fix=fix) from None
        raise MachineError(
            f"cannot listen: {error.strerror}", value=f"{options.host}:{port}", fix="give an address of this machine"
        ) from None
    return listener.getsockopt_string(zmq.LAST_ENDPOINT)


def fd_of(opened: Socket) -> int:
    """Return what to poll for `opened`. Readable means: look; it is readable again only after news."""
    fd = opened.getsockopt(zmq.FD)
    assert isinstance(fd, int)
    return fd


@final
class Monitor:
    """Tells when a connection of a socket has ended."""

    def __init__(self, watched: Socket) -> None:
        self._watched = watched
        where = f"inproc://monitor-{secrets.token_hex(8)}"
        watched.monitor(where, zmq.EVENT_DISCONNECTED)
        self._events: Socket = watched.context.socket(zmq.PAIR)
        # With a mark, libzmq's own thread would stand still, heartbeats and all, behind events that nobody looks at.
        self._events.setsockopt(zmq.RCVHWM, 0)
        self._events.connect(where)
        self.fd = fd_of(self._events)

    def lost_fds(self) -> Iterator[int]:
        """Yield the file descriptor of each connection that has ended since the last call."""
        while True:
            try:
                event, _endpoint = self._events.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield struct.unpack("=Hi", event)[1]

    def close(self) -> None:
        self._watched.disable_monitor()
        self._events.close(0)
