"""Int4Codec: half a byte a number and a float32 scale a block; for outer gradients, with error feedback.

May import only torch and `codecs`.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hybrid.collectives.codecs import Codec, check_call

_BLOCK = 128
_SCALE_BYTES = 4
_LARGEST = 7
_ZERO = 8
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny


@final
class Int4Codec(Codec):
    """First every block's scale, then two numbers a byte, the earlier one in the lower half.

    A number is (code - 8) times its block's scale, the scale a seventh of the block's largest magnitude. A block
    that held NaN or inf has a NaN scale. The encoder divides, as IEEE 754 does; the decoder only multiplies.
    """

    name = "int4"
    block_size = _BLOCK
    # Half a step of 1/7, and what the division and the multiplication round.
    max_error = 0.5 / _LARGEST + 2.0**-20

    def encoded_bytes(self, num_elements: int, dtype: torch.dtype = torch.float32) -> int:
        return -(-num_elements // 2) + _SCALE_BYTES * -(-num_elements // _BLOCK)

    def encode(self, x: Tensor, into: Tensor) -> None:
        check_call(self, x, into)
        blocks = _blocks(x)
        amax = blocks.abs().amax(dim=1)
        scales = torch.where(amax.isfinite(), (amax / _LARGEST).clamp(min=_SMALLEST_SCALE), torch.nan)
        finite = scales.isfinite()[:, None]
        codes = (blocks / scales[:, None]).round_().clamp_(-_LARGEST, _LARGEST).where(finite, 0.0).add_(_ZERO)
        nibbles = codes.to(torch.uint8).view(-1)
        num_scale_bytes = _SCALE_BYTES * len(scales)
        into[:num_scale_bytes].copy_(scales.view(torch.uint8))
        into[num_scale_bytes:].copy_((nibbles[::2] | nibbles[1::2] << 4)[: -(-x.numel() // 2)])

    def decode(self, data: Tensor, into: Tensor) -> None:
        check_call(self, into, data)
        num_blocks = -(-into.numel() // _BLOCK)
        num_scale_bytes = _SCALE_BYTES * num_blocks
        # A copy: the scales may lie at an odd address.
        scales = data[:num_scale_bytes].clone().view(torch.float32)
        pairs = data[num_scale_bytes:]
        codes = torch.full((num_blocks * _BLOCK,), _ZERO, dtype=torch.uint8)
        codes[: 2 * len(pairs) : 2] = pairs & 0xF
        codes[1 : 2 * len(pairs) : 2] = pairs >> 4
        values = codes.float().sub_(_ZERO).view(num_blocks, _BLOCK).mul_(scales[:, None])
        into.copy_(values.view(-1)[: into.numel()])


def _blocks(x: Tensor) -> Tensor:
    """Return `x` in float32, padded with zeros to whole blocks.

    Shapes:
        x: (N,).  returns: (ceil(N / block), block)
    """
    padded = torch.zeros(-(-x.numel() // _BLOCK) * _BLOCK)
    padded[: x.numel()] = x
    return padded.view(-1, _BLOCK)
