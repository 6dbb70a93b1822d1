"""Whom a ZeroMQ socket lets in before it hears a word, and what it is encrypted with.

What can be reached from other hosts is encrypted (CURVE). Every node has a key pair of its own, made when it opens;
the public half is part of the address that it publishes, which the coordinator hands round over its own encrypted
sockets. Who dials proves with the job's key, which follows from the job's token, that it is of the job: that key alone
is on the allow-list. Inside one host a password is enough (PLAIN): of the door one that follows from the token, of an
edge's own socket its secret. Who has neither never becomes a connection: libzmq would keep what such a one sends, and
its descriptor, for ever. May import only `errors`, zmq and this folder.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import zmq
from zmq.utils import z85

from hybrid.errors import ProtocolError
from hybrid.transports.zmq_socket import Context, Socket, fd_of, is_loopback

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"
_KEY_BYTES = 32
_USER = b"hybrid"
_MAX_GUARDED = 256
"""Sockets that somebody may still come to; a word is asked for once, within seconds of being given out."""


@final
@dataclass(frozen=True, slots=True)
class Keys:
    """What a node's sockets prove themselves and their peers with."""

    own_public: bytes
    own_secret: bytes
    job_public: bytes
    job_secret: bytes
    door_word: bytes
    """The password of every door of the job, where it is not encrypted."""

    def secure_dialer(self, opened: Socket, public: bytes | None, word: bytes) -> None:
        """Speak encrypted, and only with who has the secret half of `public`; with None show the password `word`."""
        if public is None:
            opened.plain_username, opened.plain_password = _USER, word.hex().encode()
        else:
            opened.curve_secretkey, opened.curve_publickey = self.job_secret, self.job_public
            opened.curve_serverkey = public


def make_keys(token: bytes) -> Keys:
    """Return a fresh pair for a node, and what follows from the job's token."""
    job_secret = z85.encode(hashlib.sha256(b"hybrid zmq 1: the job's key" + token).digest())
    own_public, own_secret = zmq.curve_keypair()
    door_word = hashlib.sha256(b"hybrid zmq 1: the doors' word" + token).digest()
    return Keys(own_public, own_secret, zmq.curve_public(job_secret), job_secret, door_word)


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

    def __init__(self, context: Context, keys: Keys, note: Callable[[str], None], *, encrypted: bool) -> None:
        self._keys, self._note, self._encrypted = keys, note, encrypted
        self._word_of_domain: dict[bytes, bytes] = {}
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(_ZAP_ENDPOINT)
        self.fds: tuple[int, ...] = (fd_of(self._socket),)

    def guard(self, listener: Socket, word: bytes, *, keep: bool = False) -> None:
        """Let in to `listener` only who has the job's key, or says `word`; call before it listens.

        Args:
            keep: for good; else until many others were guarded after it.
        """
        domain = secrets.token_hex(8)
        listener.setsockopt_string(zmq.ZAP_DOMAIN, domain)
        if self._encrypted:
            listener.curve_secretkey, listener.curve_publickey = self._keys.own_secret, self._keys.own_public
            listener.curve_server = True
            return
        listener.plain_server = True
        if not keep and len(self._word_of_domain) > _MAX_GUARDED:
            del self._word_of_domain[list(self._word_of_domain)[1]]  # the first is the door's
        self._word_of_domain[domain.encode()] = word.hex().encode()

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
        """Let in nobody any more."""
        if not self._socket.closed:
            self._socket.close()

    def _answer(self, frames: list[bytes]) -> None:
        # libzmq itself asks: route, empty, version, request, domain, address, identity, mechanism, credentials.
        route, (version, request, domain, address, _identity, mechanism, *shown) = frames[:2], frames[2:]
        known = self._is_known(domain, mechanism, shown)
        if not known:
            where = address.decode(errors="replace") or "this host"
            self._note(f"a key or password that is not of this job, from {where}")
        status = [b"200", b"OK"] if known else [b"400", b"not of this job"]
        self._socket.send_multipart([*route, version, request, *status, b"", b""], zmq.NOBLOCK)

    def _is_known(self, domain: bytes, mechanism: bytes, shown: list[bytes]) -> bool:
        if self._encrypted:
            return mechanism == b"CURVE" and hmac.compare_digest(z85.encode(shown[0]), self._keys.job_public)
        word = self._word_of_domain.get(domain)
        return mechanism == b"PLAIN" and word is not None and hmac.compare_digest(shown[-1], word)
