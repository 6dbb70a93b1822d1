"""Keys of the ZeroMQ transport: whom a socket that leaves the host lets in, and what it is encrypted with (CURVE).

Every node has a key pair of its own, made when it opens; the public half is part of the address that it publishes,
which the coordinator hands round over its own encrypted sockets. Who dials proves with the job's key, which follows
from the job's token, that it is of the job: that key alone is on the allow-list. May import only `errors`, zmq and
this folder.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import zmq
from zmq.utils import z85

from hybrid.errors import ProtocolError
from hybrid.transports.zmq_socket import Context, Socket, fd_of, is_loopback

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_KEY_BYTES = 32


@final
@dataclass(frozen=True, slots=True)
class Keys:
    """What a node's sockets are encrypted with."""

    own_public: bytes
    own_secret: bytes
    job_public: bytes
    job_secret: bytes

    def secure_listener(self, opened: Socket) -> None:
        """Let in only who has the job's key."""
        opened.curve_secretkey, opened.curve_publickey = self.own_secret, self.own_public
        opened.curve_server = True
        opened.setsockopt_string(zmq.ZAP_DOMAIN, "hybrid")

    def secure_dialer(self, opened: Socket, public: bytes) -> None:
        """Speak only with who has the secret half of `public`."""
        opened.curve_secretkey, opened.curve_publickey = self.job_secret, self.job_public
        opened.curve_serverkey = public


def make_keys(token: bytes) -> Keys:
    """Return a fresh pair for a node, and the job's."""
    job_secret = z85.encode(hashlib.sha256(b"hybrid zmq 1: the job's key" + token).digest())
    own_public, own_secret = zmq.curve_keypair()
    return Keys(own_public, own_secret, zmq.curve_public(job_secret), job_secret)


def with_key(endpoint: str, public: bytes) -> str:
    """Return the address that peers dial: where, and as whom they will find this node."""
    return f"{endpoint}#{z85.decode(public).hex()}"


def split_key(address: str) -> tuple[str, bytes | None]:
    """Return an address's endpoint, and its key where it has one.

    Raises:
        ProtocolError: the key is none, or it is missing where what is said would leave this host in the clear.
    """
    endpoint, mark, text = address.partition("#")
    if not mark:
        host = endpoint.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        if endpoint.startswith("tcp://") and not is_loopback(host):
            raise ProtocolError(
                "an address of another host without its key: nothing is sent in the clear", value=address
            )
        return endpoint, None
    try:
        key = bytes.fromhex(text)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise ProtocolError("an address whose key is none", value=address[:100])
    return endpoint, z85.encode(key)


@final
class Gate:
    """Answers libzmq's question whether who dials may come in (ZAP, ZeroMQ RFC 27); one for each context."""

    def __init__(self, context: Context, keys: Keys, note: Callable[[str], None]) -> None:
        self._keys, self._note = keys, note
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP_ENDPOINT)
        self.fds: tuple[int, ...] = (fd_of(self._socket),)

    def ready(self, fd: int) -> None:
        """Nothing to note: every move looks."""

    def move(self, enough: Callable[[], bool]) -> bool:
        moved = False
        while not self._socket.closed:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            moved = True
            self._answer(frames)
        return moved

    def close(self) -> None:
        if not self._socket.closed:
            self._socket.close()

    def _answer(self, frames: list[bytes]) -> None:
        # Asked by libzmq itself: route, empty, version, request, domain, address, identity, mechanism, key.
        *route, version, request, _domain, address, _identity, mechanism, key = frames[:9]
        known = mechanism == b"CURVE" and hmac.compare_digest(z85.encode(key), self._keys.job_public)
        if not known:
            self._note(f"a key that is not of this job, from {address.decode(errors='replace')}")
        status = [b"200", b"OK"] if known else [b"400", b"a key that is not of this job"]
        self._socket.send_multipart([*route, version, request, *status, b"", b""], zmq.NOBLOCK)
