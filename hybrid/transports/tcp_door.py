"""Where peers of a TCP node knock: who does not prove the token is refused, in bounded time and memory.

Never blocks; everything runs under the engine's lock. May import only `errors`, `wire` and this folder.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import time
from collections import deque
from dataclasses import dataclass, field
from typing import final

from hybrid.errors import ProtocolError
from hybrid.transports.tcp_edge import TcpTransport, Terms
from hybrid.transports.tcp_engine import READABLE, Engine
from hybrid.transports.tcp_socket import TcpOptions, listen, make_lively, stays_on_host
from hybrid.transports.tcp_talk import LENGTH_BYTES, MAX_WORD_BYTES, Bond, Listening, length_of, word_of
from hybrid.wire import Approach, Refusal

_LOG = logging.getLogger(__name__)
_ACCEPTS_A_TURN = 16
_LOUD = 16
"""So many refusals are logged one by one; after that only each one whose number is a power of two."""


@dataclass(slots=True)
class _Forming:
    """An edge of which not all streams have come."""

    since_s: float
    streams: dict[int, tuple[socket.socket, Bond]] = field(default_factory=dict)


@final
class Door:
    """Listens, and holds the edges that peers have dialed and this rank has not opened yet."""

    def __init__(self, engine: Engine, rank: int, options: TcpOptions) -> None:
        self.refused: deque[str] = deque(maxlen=16)
        self.edges_of_rank: dict[int, TcpTransport] = {}
        self._engine, self._rank, self._options = engine, rank, options
        self._num_refused = 0
        self._callers: dict[_Caller, float] = {}
        """When each came; the longest there comes first."""
        self._forming: dict[tuple[int, bytes], _Forming] = {}
        self._listener, self.address = listen(options)
        self._is_open = True

    def open(self) -> None:
        """Begin to listen; call under the lock."""
        self._engine.watch(self._listener.fileno(), self, READABLE)
        self._engine.add_ticker(self)

    def ready(self, events: int) -> None:
        for _ in range(_ACCEPTS_A_TURN):
            try:
                opened, _where = self._listener.accept()
            except OSError:  # nobody there any more, or no descriptor left: the next turn tries again
                return
            make_lively(opened, self._options)
            if len(self._callers) >= self._options.max_callers:
                next(iter(self._callers)).refuse("too many stand at the door")
            caller = _Caller(self, opened, Listening(self._options, rank=self._rank, near=stays_on_host(opened)))
            self._callers[caller] = time.monotonic()
            self._engine.watch(opened.fileno(), caller, READABLE)

    def tick(self, now_s: float) -> None:
        before_s = now_s - self._options.handshake_s
        for caller, since_s in tuple(self._callers.items()):
            if since_s < before_s:
                caller.refuse("did not prove the token in time")
        for key, forming in tuple(self._forming.items()):
            if forming.since_s < before_s:
                self._drop(key)

    def close(self) -> None:
        """Listen no more and send everybody away; idempotent."""
        if self._is_open:
            self._is_open = False
            self._engine.remove_ticker(self)
            self._engine.forget(self._listener.fileno())
            self._listener.close()
            for caller in tuple(self._callers):
                self.leave(caller, close=True)
            for key in tuple(self._forming):
                self._drop(key)

    # What callers call -----------------------------------------------------------------------------------

    def leave(self, caller: _Caller, *, close: bool) -> None:
        """Forget a caller."""
        self._callers.pop(caller, None)
        self._engine.forget(caller.opened.fileno())
        if close:
            caller.opened.close()

    def note(self, reason: str) -> None:
        """List who was refused."""
        self.refused.append(reason)
        self._num_refused += 1
        if self._num_refused <= _LOUD or not self._num_refused & (self._num_refused - 1):
            _LOG.warning("rank %d refused who knocked (%d so far): %s", self._rank, self._num_refused, reason)

    def welcome(self, caller: _Caller, approach: Approach, bond: Bond) -> None:
        """Take a stream whose caller has proven itself; with the last one the edge is there."""
        self.leave(caller, close=False)
        key = (approach.rank, approach.edge)
        forming = self._forming.setdefault(key, _Forming(time.monotonic()))
        if approach.stream in forming.streams:
            self.note(f"rank {approach.rank} brings a stream twice")
            caller.opened.close()
            return
        forming.streams[approach.stream] = (caller.opened, bond)
        if len(forming.streams) < approach.num_streams:
            return
        del self._forming[key]
        earlier = self.edges_of_rank.pop(approach.rank, None)
        if earlier is not None:
            earlier.abandon()
        self.edges_of_rank[approach.rank] = build_edge(
            self._engine,
            [forming.streams[index] for index in range(approach.num_streams)],
            peer=approach.rank,
            options=self._options,
        )
        self._engine.tell()

    def _drop(self, key: tuple[int, bytes]) -> None:
        for opened, _bond in self._forming.pop(key).streams.values():
            opened.close()


def build_edge(
    engine: Engine, streams: list[tuple[socket.socket, Bond]], *, peer: int, options: TcpOptions
) -> TcpTransport:
    """Return this end of an edge whose streams are all there; call under the engine's lock."""
    bond = streams[0][1]
    terms = Terms(peer=peer, window_bytes=bond.window_bytes, frame_bytes=bond.frame_bytes)
    return TcpTransport(engine, [(opened, each.seals) for opened, each in streams], terms, options)


@final
class _Caller:
    """Somebody at the door who has not proven anything yet: two words, a deadline, and a kilobyte of memory."""

    def __init__(self, door: Door, opened: socket.socket, talk: Listening) -> None:
        self.opened = opened
        self._door, self._talk, self._heard = door, talk, b""

    def ready(self, events: int) -> None:
        try:
            heard = self.opened.recv(LENGTH_BYTES + MAX_WORD_BYTES - len(self._heard))
        except BlockingIOError:
            return
        except OSError:
            heard = b""
        if not heard:
            self.refuse("left before it proved the token")
            return
        self._heard += heard
        try:
            self._listen()
        except ProtocolError as refusal:
            self.refuse(refusal.fact)

    def refuse(self, reason: str) -> None:
        """Say why, and close."""
        self._door.note(reason)
        with contextlib.suppress(OSError):
            self.opened.send(word_of(Refusal(reason[:200])))
        self._door.leave(self, close=True)

    def _listen(self) -> None:
        if len(self._heard) < LENGTH_BYTES:
            return
        end = LENGTH_BYTES + length_of(self._heard[:LENGTH_BYTES])
        if len(self._heard) < end:
            return
        word, self._heard = self._heard[LENGTH_BYTES:end], self._heard[end:]
        if self._heard:
            raise ProtocolError("somebody who does not wait for an answer")
        if self._talk.approach is None:
            self._say(self._talk.challenge(word))
            return
        bond, answer = self._talk.end(word)
        self._say(answer)
        self._door.welcome(self, self._talk.approach, bond)

    def _say(self, word: bytes) -> None:
        try:
            whole = self.opened.send(word) == len(word)
        except OSError:
            whole = False
        if not whole:
            raise ProtocolError("somebody who does not listen")
