"""Fp8Codec: one byte a number and a float32 scale a block: e4m3 within ±240, Trainium's bytes and NVIDIA's.

May import only torch, `codecs` and `hybrid_kernels`.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hybrid.collectives.codecs import Codec, check_call
from hybrid_kernels import fp8_pack, fp8_unpack

_BLOCK = 256
_SCALE_BYTES = 4


@final
class Fp8Codec(Codec):
    """First every block's scale, then the codes.

    A block's scale is a power of two, so that scaling rounds nothing; clipping to ±240 makes one byte mean one number
    in Trainium's e4m3 and in the e4m3fn of everyone else. A block that held NaN or inf has a NaN scale.
    """

    name = "fp8"
    block_size = _BLOCK
    max_error = 2.0**-4

    def encoded_bytes(self, num_elements: int, dtype: torch.dtype = torch.float32) -> int:
        return num_elements + _SCALE_BYTES * -(-num_elements // _BLOCK)

    def encode(self, x: Tensor, into: Tensor) -> None:
        check_call(self, x, into)
        if not x.numel():
            return
        # Unchecked: the scale itself tells every reader, the sender among them, that a block was not finite.
        packed = fp8_pack(x, block_size=_BLOCK, fp8_format="e4m3", check=False)
        scales, codes = _parts(into, x.numel())
        scales.copy_(packed.scales.view(torch.uint8))
        codes.copy_(packed.payload)

    def decode(self, data: Tensor, into: Tensor) -> None:
        check_call(self, into, data)
        if not into.numel():
            return
        scales, codes = _parts(data, into.numel())
        # A copy: the scales may lie at an odd address.
        into.copy_(fp8_unpack(codes, scales.clone().view(torch.float32), block_size=_BLOCK, dtype=into.dtype))


def _parts(data: Tensor, num_elements: int) -> tuple[Tensor, Tensor]:
    num_bytes = _SCALE_BYTES * -(-num_elements // _BLOCK)
    return data[:num_bytes], data[num_bytes:]
