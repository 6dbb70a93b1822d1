"""ShardedEdge: the edge between two stages of several ranks each; what of an activation this rank holds goes to those
who need it, and what it needs comes from those who hold it.

A Transport that holds others, so that whoever sends an activation need not know how the other stage shares it out. It
carries activations and their gradients, with what is sent beside them; nothing else.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import final

import numpy as np
import numpy.typing as npt

from hybrid.errors import ProtocolError
from hybrid.scheduler.reshard import Box, Degrees, boxes_of, plan_transfers
from hybrid.transports.base import Buffer, Pending, Transport, as_bytes, as_targets

_STAMP = struct.Struct("<d")
Bytes = npt.NDArray[np.uint8]


@final
class ShardedEdge(Transport):
    """One rank's end.

    Args:
        edges: an open transport to each rank of the other stage with which it shares a box, by its place there; they
            stay the caller's.
        own, other: the two stages' degrees.
        place: of this rank in its stage.
        num_tokens: of a sample, of all ranks together.
        token_bytes: of one token's activation.
    """

    def __init__(
        self,
        edges: Mapping[int, Transport],
        *,
        own: Degrees,
        other: Degrees,
        place: int,
        num_tokens: int,
        token_bytes: int,
    ) -> None:
        self._edges, self._own, self._other, self._place = dict(edges), own, other, place
        self._num_tokens, self._token_bytes = num_tokens, token_bytes
        first = self._edges[min(self._edges)]
        self.peer, self.window_bytes = first.peer, first.window_bytes

    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        """Send a microbatch's activation, this rank's box of it, and whole copies of the other buffers."""
        whole = np.frombuffer(as_bytes(buffers[0]), dtype=np.uint8)
        pendings = [
            self._edges[place].send(tag, [np.ascontiguousarray(part).reshape(-1).data, *buffers[1:]])
            for place, part in self._parts(whole)
        ]
        return _All(pendings)

    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        """Post the receive of this rank's box; a second buffer gets the stamp of what arrives last."""
        targets = as_targets(into)
        pendings: list[Pending] = []
        landings: list[Callable[[], None]] = []
        stamps: list[list[bytearray]] = []
        for place, part in self._parts(np.frombuffer(targets[0], dtype=np.uint8)):
            direct = part.flags.c_contiguous
            landing = part if direct else np.empty(part.shape, np.uint8)
            beside = [bytearray(target.nbytes) for target in targets[1:]]
            posted = [landing.reshape(-1).data, *(memoryview(stamp) for stamp in beside)]
            pendings.append(self._edges[place].recv(tag, posted))
            stamps.append(beside)
            if not direct:
                landings.append(_copier(part, landing))
        for index, target in enumerate(targets[1:]):
            landings.append(_latest(target, [beside[index] for beside in stamps]))
        return _All(pendings, landings)

    def close(self) -> None:
        """Close every transport that it holds."""
        for edge in self._edges.values():
            edge.close()

    def _parts(self, whole: Bytes) -> list[tuple[int, Bytes]]:
        """Return what of this rank's box each rank of the other stage shares, as views of it.

        Shapes:
            whole: (samples * tokens * token_bytes,) of this rank's.  returns: each (samples, tokens, token_bytes).
        """
        num_tokens = boxes_of(self._own, num_samples=self._own.width, num_tokens=self._num_tokens)[
            self._place
        ].num_tokens
        num_samples, rest = divmod(whole.size, num_tokens * self._token_bytes)
        if rest:
            raise ProtocolError(
                "not an activation of this edge",
                value=f"{whole.size} bytes",
                valid=f"a multiple of {num_tokens * self._token_bytes} bytes",
            )
        size = {"num_samples": num_samples * self._own.width, "num_tokens": self._num_tokens}
        corner = boxes_of(self._own, **size)[self._place]
        cube = whole.reshape(num_samples, num_tokens, self._token_bytes)
        return [
            (one.receiver, cube[_slices(one.box.within(corner))])
            for one in plan_transfers(self._own, self._other, **size)
            if one.sender == self._place
        ]


def _slices(box: Box) -> tuple[slice, slice]:
    return slice(box.first_sample, box.end_sample), slice(box.first_token, box.end_token)


def _copier(part: Bytes, landing: Bytes) -> Callable[[], None]:
    def copy() -> None:
        part[...] = landing

    return copy


def _latest(target: memoryview, stamps: Sequence[bytearray]) -> Callable[[], None]:
    """Return what writes the latest arrival of several messages, as `EmulatedLink` stamps them."""

    def write() -> None:
        target[:] = max(stamps, key=lambda stamp: float(_STAMP.unpack(stamp)[0]))

    return write


@dataclass(slots=True)
class _All(Pending):
    """Several operations as one, and what is to be done once all have ended."""

    pendings: Sequence[Pending]
    landings: Sequence[Callable[[], None]] = ()
    landed: bool = field(default=False)

    def done(self) -> bool:
        return all(pending.done() for pending in self.pendings)

    def wait(self, timeout_s: float) -> None:
        deadline_s = time.monotonic() + timeout_s
        for pending in self.pendings:
            pending.wait(max(0.0, deadline_s - time.monotonic()))
        if not self.landed:
            for land in self.landings:
                land()
            self.landed = True
