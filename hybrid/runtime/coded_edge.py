"""CodedEdge: an edge on which activations and their gradients travel in a codec's form.

A Transport that holds another. Which messages are coded, and how, follows from their tags; all others, evaluations and
norms among them, pass as they are. What is beside an activation (a stamp) passes too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hybrid.collectives.codecs import Codec, open_codec
from hybrid.scheduler.actions import Kind
from hybrid.scheduler.plan import ReplicaPlan
from hybrid.transports.base import Buffer, Pending, Transport, as_bytes

_TAG = re.compile(r"\d+/(\d+)([FB])\d+")
"""As the interpreter writes it: step, the receiver's stage, what it is for, microbatch."""
CodecOf = Mapping[tuple[int, Kind], Codec]
"""By the receiver's stage and what the message is for."""


def codecs_of(replica: ReplicaPlan) -> dict[tuple[int, Kind], Codec]:
    """Return the codecs of a replica's edges; none for an edge that changes nothing."""
    found: dict[tuple[int, Kind], Codec] = {}
    for edge in replica.edges:
        if edge.codec != "none":
            codec = open_codec(edge.codec)
            found[edge.to_stage, Kind.F] = codec
            found[edge.from_stage, Kind.B] = codec
    return found


def coding_of(replica: ReplicaPlan, dtype: torch.dtype) -> Callable[[Transport], Transport]:
    """Return what lays a replica's codecs around a transport; around none where its plan names none."""
    codec_of = codecs_of(replica)
    return (lambda edge: CodedEdge(edge, codec_of, dtype)) if codec_of else (lambda edge: edge)


@final
class CodedEdge(Transport):
    """One rank's end; the held transport stays the caller's but for `close`.

    Args:
        dtype: of activations and their gradients.
    """

    def __init__(self, edge: Transport, codec_of: CodecOf, dtype: torch.dtype) -> None:
        self._edge, self._codec_of, self._dtype = edge, codec_of, dtype
        self.peer, self.window_bytes = edge.peer, edge.window_bytes

    def send(self, tag: str, buffers: Sequence[Buffer]) -> Pending:
        """Send; a coded message is encoded before this returns, so that its buffer may be overwritten at once."""
        codec = self._codec(tag)
        if codec is None:
            return self._edge.send(tag, buffers)
        x = self._numbers(buffers[0])
        data = torch.empty(codec.encoded_bytes(x.numel(), x.dtype), dtype=torch.uint8)
        codec.encode(x, data)
        return self._edge.send(tag, [data.numpy().data, *buffers[1:]])

    def recv(self, tag: str, into: Sequence[memoryview]) -> Pending:
        """Post a receive; a coded message is decoded by whoever waits for it."""
        codec = self._codec(tag)
        if codec is None:
            return self._edge.recv(tag, into)
        x = self._numbers(into[0])
        data = torch.empty(codec.encoded_bytes(x.numel(), x.dtype), dtype=torch.uint8)
        pending = self._edge.recv(tag, [data.numpy().data, *into[1:]])
        return _Decoding(pending, lambda: codec.decode(data, x))

    def close(self) -> None:
        """Close the transport that it holds."""
        self._edge.close()

    def _codec(self, tag: str) -> Codec | None:
        found = _TAG.fullmatch(tag)
        return self._codec_of.get((int(found[1]), Kind(found[2]))) if found else None

    def _numbers(self, buffer: Buffer) -> Tensor:
        flat = as_bytes(buffer)
        return torch.frombuffer(flat, dtype=self._dtype) if flat.nbytes else torch.empty(0, dtype=self._dtype)


@dataclass(slots=True)
class _Decoding(Pending):
    """A receive whose message is decoded once, by the first wait that finds it whole."""

    pending: Pending
    decode: Callable[[], None]
    decoded: bool = False

    def done(self) -> bool:
        return self.pending.done()

    def wait(self, timeout_s: float) -> None:
        self.pending.wait(timeout_s)
        if not self.decoded:
            self.decoded = True
            self.decode()
