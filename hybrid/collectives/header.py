"""What stands before the first message between two members in each operation: what the sender takes it to be.

May import only torch, `errors` and `collectives.base`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import torch

from hybrid.errors import ProtocolError

_LAYOUT = struct.Struct("<Q8s16s8s12sqqQ")
HEADER_BYTES = _LAYOUT.size


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """One operation, as a member sees it."""

    sequence: int
    operation: str
    dtype: torch.dtype
    algorithm: str = ""
    op: str = ""
    root: int = 0
    num_segments: int = 1
    num_elements: int = 0
    """Of the whole operation, where every member knows it."""

    def encode(self) -> bytes:
        """Return `HEADER_BYTES` bytes."""
        return _LAYOUT.pack(
            self.sequence,
            self.op.encode(),
            self.operation.encode(),
            self.algorithm.encode(),
            _name(self.dtype).encode(),
            self.root,
            self.num_segments,
            self.num_elements,
        )

    def check(self, encoded: bytes, peer: int) -> None:
        """Go on only if the peer's header says the same.

        Raises:
            ProtocolError: the members called different operations.
        """
        if encoded != self.encode():
            raise ProtocolError(
                f"rank {peer} called another collective than this rank",
                value=_describe(encoded),
                valid=_describe(self.encode()),
                fix="call the same operations in the same order, with the same sizes and formats, on every member",
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _describe(encoded: bytes) -> str:
    sequence, op, operation, algorithm, dtype, root, num_segments, num_elements = _LAYOUT.unpack(encoded)
    words = [bytes(word).rstrip(b"\0").decode("ascii", "replace") for word in (operation, op, algorithm, dtype)]
    return (
        f"operation {sequence}: {' '.join(filter(None, words))} of {num_elements} elements in {num_segments} segments, "
        f"root {root}"
    )
