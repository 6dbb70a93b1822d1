"""NoCodec: the numbers' own bytes, in whatever format they are. May import only torch and `codecs`."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hybrid.collectives.codecs import Codec, check_call


@final
class NoCodec(Codec):
    """Bytes as they stand in memory; nothing is lost, also of float64 and of integers."""

    name = "none"
    block_size = 1
    max_error = 0.0

    def encoded_bytes(self, num_elements: int, dtype: torch.dtype = torch.float32) -> int:
        return num_elements * dtype.itemsize

    def encode(self, x: Tensor, into: Tensor) -> None:
        check_call(self, x, into)
        into.copy_(x.view(torch.uint8))

    def decode(self, data: Tensor, into: Tensor) -> None:
        check_call(self, into, data)
        into.view(torch.uint8).copy_(data)
