"""The Codec seam: the form in which numbers travel, as bytes on the host; and the variants by name.

A variant is one file beside this one, `codec_<name>.py`, one line in the table and one id in the conformance test;
`hybrid.testing.codec_kit` checks every clause. Says nothing of who sends what to whom, and adds nothing up: whoever
reduces decodes into float32 (float64 for float64) and accumulates there. May import only torch, `errors` and
`hybrid_kernels`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module

import torch
from torch import Tensor

from hybrid.errors import ConfigError, UnsupportedFormat

VARIANTS: dict[str, str] = {
    "none": "hybrid.collectives.codec_none:NoCodec",
    "bf16": "hybrid.collectives.codec_bf16:Bf16Codec",
    "fp8": "hybrid.collectives.codec_fp8:Fp8Codec",
    "int4": "hybrid.collectives.codec_int4:Int4Codec",
}
"""Where each variant is, by name."""

NARROW_FORMATS = (torch.float32, torch.bfloat16, torch.float16)
"""What the codecs that lose something take; float64 travels as it is (`none`) or is narrowed by its owner."""


class Codec(ABC):
    """How N numbers become bytes and numbers again. Stateless: any number of threads may share one.

    Contract (every clause is checked by `hybrid.testing.codec_kit`, under the name given first):

    1. *Size*: N numbers make exactly `encoded_bytes(N, dtype)` bytes, whatever their values; encode writes these and
       no other, decode reads these and no other. N may be 0. The bytes may lie at any address.
    2. *Input kept*: encode does not change `x`, decode does not change `data`.
    3. *Same bytes*: equal numbers make equal bytes, on every vendor's machine and at every call.
    4. *Close*: a decoded number is within `max_error` times the largest magnitude of its block of `block_size`
       numbers (taken as 2^-120 at least) from the one encoded, and half a unit of `into`'s format; zeros stay zeros.
    5. *Formats*: bfloat16 and float16 are widened to float32 first, and make the same bytes as their float32 values;
       decode rounds once, to `into`'s format. An exact codec (`max_error` 0) decodes only into the format encoded.
    6. *Not finite is told*: amax and finiteness are looked at before any cast; a NaN or inf decodes to something not
       finite, and spoils no number outside its block.
    7. *Any bytes*: whatever bytes a peer sends decode to numbers, or to NaN; none raise or read elsewhere.
    """

    name: str
    """Its key in `VARIANTS`."""
    block_size: int
    """Numbers that share a scale; 1 where none do."""
    max_error: float
    """See clause 4; 0.0 where nothing is lost."""

    @abstractmethod
    def encoded_bytes(self, num_elements: int, dtype: torch.dtype = torch.float32) -> int:
        """Return how many bytes `num_elements` numbers of this format make."""

    @abstractmethod
    def encode(self, x: Tensor, into: Tensor) -> None:
        """Write the bytes of `x` into `into`.

        Args:
            x: contiguous, on the host; one of `NARROW_FORMATS`, for an exact codec any.

        Shapes:
            x: (N,).  into: (encoded_bytes(N, x.dtype),) uint8

        Raises:
            UnsupportedFormat: a format that the codec does not take.
        """

    @abstractmethod
    def decode(self, data: Tensor, into: Tensor) -> None:
        """Write the numbers that were encoded into `into`.

        Shapes:
            data: (encoded_bytes(N, into.dtype),) uint8.  into: (N,), any of `NARROW_FORMATS`

        Raises:
            UnsupportedFormat: a format that the codec does not give.
        """


def open_codec(name: str) -> Codec:
    """Return the codec of this name.

    Raises:
        ConfigError: there is none.
    """
    if name not in VARIANTS:
        raise ConfigError("no such codec", value=name, valid=VARIANTS, fix="name one of those")
    module, cls = VARIANTS[name].split(":")
    codec: Codec = getattr(import_module(module), cls)()
    return codec


def check_call(codec: Codec, x: Tensor, data: Tensor) -> None:
    """Refuse numbers and bytes that do not belong together, and a format that the codec does not know.

    Raises:
        UnsupportedFormat: not one of `NARROW_FORMATS`, for a codec that loses something.
    """
    if codec.max_error > 0 and x.dtype not in NARROW_FORMATS:
        raise UnsupportedFormat(
            f"codec {codec.name} does not take this format",
            value=str(x.dtype),
            valid=NARROW_FORMATS,
            fix="let these numbers travel with codec none",
        )
    is_flat = x.dim() == data.dim() == 1 and x.is_contiguous() and data.is_contiguous()
    assert is_flat, "a codec takes flat tensors without gaps"
    assert x.device.type == data.device.type == "cpu", "a codec works on the host"
    assert data.dtype == torch.uint8, "a codec writes bytes"
    size_bytes = codec.encoded_bytes(x.numel(), x.dtype)
    assert data.numel() == size_bytes, f"{x.numel()} numbers make {size_bytes} bytes (got {data.numel()})"
