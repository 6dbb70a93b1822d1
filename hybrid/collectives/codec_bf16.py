"""Bf16Codec: two bytes a number, rounded to nearest even. May import only torch and `codecs`."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from hybrid.collectives.codecs import Codec, check_call


@final
class Bf16Codec(Codec):
    """The upper half of a float32, rounded; its whole range, so that no scale is needed."""

    name = "bf16"
    block_size = 1
    max_error = 2.0**-8

    def encoded_bytes(self, num_elements: int, dtype: torch.dtype = torch.float32) -> int:
        return 2 * num_elements

    def encode(self, x: Tensor, into: Tensor) -> None:
        check_call(self, x, into)
        # The cast keeps NaN and inf, and makes inf of the few finite numbers above bfloat16's largest.
        into.copy_(x.to(torch.bfloat16).view(torch.uint8))

    def decode(self, data: Tensor, into: Tensor) -> None:
        check_call(self, into, data)
        aligned = torch.empty(into.numel(), dtype=torch.bfloat16)
        aligned.view(torch.uint8).copy_(data)
        into.copy_(aligned)
