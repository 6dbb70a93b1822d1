"""How members tell each other that they leave a group, and why: one word to each peer, over the group's edges.

A member that waits for one peer hears so of another's loss. May import only `errors` and `transports.base`.
"""

from __future__ import annotations

import contextlib
import struct
import time
from collections.abc import Mapping
from typing import final

from hybrid.errors import CommError, CommTimeout, PeerLost, ProtocolError
from hybrid.transports.base import Pending, Transport

_LAYOUT = struct.Struct("<B7xQ496s")
_CLOSED, _LOST, _DISAGREED = range(3)
_SEND_S = 1.0


@final
class Notices:
    """This member's ear at every peer. Not thread-safe: one thread at a time may call it."""

    def __init__(self, edges: Mapping[int, Transport], tag: str) -> None:
        self._edges, self._tag = edges, tag
        self._landing = {position: bytearray(_LAYOUT.size) for position in edges}
        self._ears: dict[int, Pending] = {
            position: edge.recv(tag, [memoryview(self._landing[position])]) for position, edge in edges.items()
        }
        self._left: dict[int, tuple[int, CommError]] = {}
        """For each member that has left: how many operations it ended, and what it said."""
        self._said: list[Pending] = []

    def heard(self, sequence: int, peers: tuple[int, ...]) -> CommError | None:
        """Return why operation `sequence` among all, or one with `peers` alone, cannot end: a member has left."""
        for position, ear in list(self._ears.items()):
            if ear.done():
                del self._ears[position]
                self._left[position] = self._read(position, ear)
        if peers:
            return next((self._left[peer][1] for peer in peers if peer in self._left), None)
        gone = [(ended, error) for ended, error in self._left.values() if ended <= sequence]
        return min(gone, key=lambda each: each[0])[1] if gone else None

    def say(self, num_ended: int, reason: CommError | None) -> None:
        """Tell every peer that this member leaves after `num_ended` operations; does not wait. Says only one thing."""
        if self._said:
            return
        kind = _CLOSED if reason is None else _DISAGREED if isinstance(reason, ProtocolError) else _LOST
        text = "" if reason is None else str(reason)
        word = _LAYOUT.pack(kind, num_ended, text.encode()[:496])
        for edge in self._edges.values():
            with contextlib.suppress(CommError):
                self._said.append(edge.send(self._tag, [word]))

    def flush(self) -> None:
        """Wait a moment until the peers have been told."""
        deadline_s = time.monotonic() + _SEND_S
        for pending in self._said:
            with contextlib.suppress(CommError):
                pending.wait(max(deadline_s - time.monotonic(), 0.0))

    def _read(self, position: int, ear: Pending) -> tuple[int, CommError]:
        rank = self._edges[position].peer
        try:
            ear.wait(0.0)
        except CommTimeout as error:  # "done" was a mistake of the transport's: as good as lost
            return 0, PeerLost(str(error))
        except CommError as error:
            return 0, error
        kind, num_ended, text = _LAYOUT.unpack(self._landing[position])
        told = text.rstrip(b"\0").decode(errors="replace")
        if kind == _DISAGREED:
            return num_ended, ProtocolError(f"rank {rank} has given up the group: {told}")
        fact = f"rank {rank} has closed the group" if kind == _CLOSED else f"rank {rank} has given up the group: {told}"
        return num_ended, PeerLost(fact, fix="make a new group of those that are left")
