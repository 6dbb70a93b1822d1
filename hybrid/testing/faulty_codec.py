"""A codec with one fault planted in it, laid around a good one: what the codec kit must refuse."""

from __future__ import annotations

from enum import StrEnum
from typing import final

import torch
from torch import Tensor

from hybrid.collectives.codecs import Codec


class CodecFault(StrEnum):
    """What is wrong with a `FaultyCodec`."""

    LONG = "long"
    """Encode writes a byte past the end."""
    CHANGE_INPUT = "change input"
    """Encode scales its input in place."""
    RANDOM = "random"
    """The bytes differ from call to call."""
    FORGET_TAIL = "forget tail"
    """The last number is not decoded."""
    COARSE = "coarse"
    """Numbers come back three tenths too large."""
    HIDE = "hide"
    """NaN and inf are made finite before they are encoded."""
    POISON = "poison"
    """One NaN spoils everything."""
    ROUND_TWICE = "round twice"
    """What is decoded is rounded to a narrower format on the way."""
    RAISE = "raise"
    """Bytes that no encoder makes raise."""


CLAUSE_OF_FAULT: dict[CodecFault, str] = {
    CodecFault.LONG: "size",
    CodecFault.CHANGE_INPUT: "input kept",
    CodecFault.RANDOM: "same bytes",
    CodecFault.FORGET_TAIL: "close",
    CodecFault.COARSE: "close",
    CodecFault.HIDE: "not finite",
    CodecFault.POISON: "not finite",
    CodecFault.ROUND_TWICE: "formats",
    CodecFault.RAISE: "any bytes",
}
"""The clause that must refuse each fault."""


@final
class FaultyCodec(Codec):
    """A good codec with a mistake around it; without one it keeps every clause."""

    def __init__(self, inner: Codec, fault: CodecFault | None) -> None:
        self._inner, self._fault = inner, fault
        self.name, self.block_size, self.max_error = inner.name, inner.block_size, inner.max_error
        self._calls = 0

    def encoded_bytes(self, num_elements: int, dtype: torch.dtype = torch.float32) -> int:
        return self._inner.encoded_bytes(num_elements, dtype)

    def encode(self, x: Tensor, into: Tensor) -> None:
        fault = self._fault
        self._calls += 1
        if fault is CodecFault.HIDE:
            x = x.nan_to_num()
        if fault is CodecFault.POISON and not bool(x.isfinite().all()):
            x = torch.full_like(x, torch.nan)
        if fault is CodecFault.RANDOM:
            x = x * (1 + self._calls / 4)
        self._inner.encode(x, into)
        if fault is CodecFault.CHANGE_INPUT:
            x.mul_(2)
        if fault is CodecFault.LONG:
            _byte_behind(into).fill_(0)

    def decode(self, data: Tensor, into: Tensor) -> None:
        fault = self._fault
        before = into.clone()
        self._inner.decode(data, into)
        if fault is CodecFault.RAISE and not bool(into.isfinite().all()):
            raise ValueError("these bytes mean nothing")
        if fault is CodecFault.COARSE:
            into.mul_(1.3)
        if fault is CodecFault.FORGET_TAIL:
            into[-1:] = before[-1:]
        if fault is CodecFault.ROUND_TWICE and into.dtype == torch.float16:
            into.copy_(into.to(torch.float8_e5m2))


def _byte_behind(data: Tensor) -> Tensor:
    return data.as_strided((1,), (1,), data.storage_offset() + data.numel())
