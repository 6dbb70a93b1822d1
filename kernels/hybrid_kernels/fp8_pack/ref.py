"""Packing float32 into FP8 blocks, slow and obvious: amax, scale, clip, cast.

Two formats share their bytes wherever both have a value: `e4m3` is the IEEE-like one of Trainium 1 and 2
(largest finite 240), `e4m3fn` the OCP one (448). Clipping to ±240 and casting to e4m3fn gives Trainium's
bytes.

A block's scale is a power of two, so that scaling rounds nothing: every device, whatever its divider, makes
the same bytes, and a byte's value is exact. It costs no accuracy, since the rounding error of a floating
format does not depend on the scale, and at most one of the eighteen binades that a block spans.

May import only torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAXIMUM_OF_FORMAT = {"e4m3": 240.0, "e4m3fn": 448.0}
"""Largest finite value of each format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """A packed chunk of N elements in blocks of `block_size`, the last one perhaps shorter.

    Shapes:
        payload: (N,) uint8.  scales: (ceil(N / block_size),) float32.  error: (N,) float32 or None
    """

    payload: Tensor
    """One FP8 code an element; both formats decode as e4m3fn."""
    scales: Tensor
    """An element is its byte's value times its block's scale; NaN marks a block that held NaN or inf."""
    error: Tensor | None
    """What rounding lost, to be added to the next chunk; None unless an error came in."""


def encode(x: Tensor, *, fp8_format: str) -> Tensor:
    """Return the FP8 codes of float32 values: clipped to the format's maximum, rounded to nearest even.

    NaN becomes 0x7F or 0xFF; infinities are clipped: whoever must know has looked before the cast.

    Shapes:
        x: any, float32.  returns: the same, uint8
    """
    maximum = MAXIMUM_OF_FORMAT[fp8_format]
    return x.clamp(-maximum, maximum).to(torch.float8_e4m3fn).view(torch.uint8)


def decode(payload: Tensor) -> Tensor:
    """Return the float32 values of FP8 codes of either format.

    Shapes:
        payload: any, uint8.  returns: the same, float32
    """
    return payload.view(torch.float8_e4m3fn).float()


def block_scales(amax: Tensor, *, fp8_format: str) -> Tensor:
    """Return for each block the smallest power of two, at least 2^-126, that brings `amax` within the format.

    A block of zeros gets 2^-126; one whose amax is NaN or infinite gets NaN.

    Shapes:
        amax: (M,), float32, largest magnitude of each block.  returns: (M,), float32
    """
    maximum = torch.tensor(MAXIMUM_OF_FORMAT[fp8_format], dtype=torch.float32)
    # 240 = 1.875 * 2^7 and 448 = 1.75 * 2^8: compare mantissas, then subtract exponents.
    mantissa_of_max, exponent_of_max = torch.frexp(maximum)
    mantissa, exponent = torch.frexp(amax)
    power = exponent - exponent_of_max + (mantissa > mantissa_of_max)
    power = power.where(amax > 0, -126).clamp(min=-126)
    return torch.ldexp(torch.ones_like(amax), power).where(amax.isfinite(), float("nan"))


def fp8_pack(
    x: Tensor,
    *,
    block_size: int,
    fp8_format: str = "e4m3",
    error: Tensor | None = None,
    seed: int | None = None,
) -> Packed:
    """Return `x` (plus `error`, if given) packed block by block.

    Args:
        x: float32, bfloat16 or float16; widened to float32.
        block_size: elements that share a scale.
        fp8_format: `e4m3` or `e4m3fn`.
        error: the `error` of the pack before (error feedback); the new one comes back in the result.
        seed: rounds stochastically with this seed (any 64-bit integer); None rounds to nearest even.

    Shapes:
        x: (N,).  error: (N,) float32.  returns: see `Packed`

    Numerics:
        Finiteness is looked at in float32, before the cast: a block that holds NaN or inf has a NaN scale
        and a payload of zeros, so it decodes to NaN; it leaves a zero error, so that one bad step does not
        poison the next. To nearest: relative error at most 1/16 within 14 binades below the block's amax.
    """
    total = x.float() if error is None else x.float() + error
    num_elements = total.numel()
    num_blocks = -(-num_elements // block_size)
    padded = torch.zeros(num_blocks, block_size, device=total.device)
    padded.view(-1)[:num_elements] = total
    # A maximum must carry NaN: torch.amax does.
    amax = padded.abs().amax(dim=1)
    scales = block_scales(amax, fp8_format=fp8_format)
    scaled = (padded / scales[:, None]).where(scales.isfinite()[:, None], 0.0).view(-1)[:num_elements]
    rounded = scaled if seed is None else round_stochastically(scaled, seed=seed)
    payload = encode(rounded, fp8_format=fp8_format)
    if error is None:
        return Packed(payload=payload, scales=scales, error=None)
    back = fp8_unpack(payload, scales, block_size=block_size)
    return Packed(payload=payload, scales=scales, error=(total - back).where(back.isfinite(), 0.0))


def fp8_unpack(payload: Tensor, scales: Tensor, *, block_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values that `fp8_pack` packed; exact in float32, denormals apart.

    Shapes:
        payload: (N,), uint8.  scales: (ceil(N / block_size),), float32.  returns: (N,)
    """
    return (decode(payload) * scales.repeat_interleave(block_size)[: payload.numel()]).to(dtype)


def round_stochastically(scaled: Tensor, *, seed: int, start: int = 0) -> Tensor:
    """Return `scaled` moved to one of its two FP8 neighbours, the nearer one more often; unbiased.

    ``q`` is the spacing of FP8 values at an element, 2^-9 at least; the result is
    ``sign * floor(|scaled| / q + u) * q`` with ``u`` in [0, 1) from `random_fraction`; `start` is
    the index of the first element in the chunk that is packed.

    Shapes:
        scaled: (N,), float32, within the format's maximum.  returns: (N,)
    """
    magnitude = scaled.abs()
    _, exponent = torch.frexp(magnitude)
    spacing = torch.ldexp(torch.ones_like(scaled), (exponent - 1).clamp(min=-6) - 3)
    # The hash needs 64-bit integers, which not every device has: it is the host's.
    fraction = random_fraction(scaled.numel(), seed=seed, start=start).to(scaled.device)
    steps = torch.floor(magnitude / spacing + fraction)
    return torch.copysign(steps * spacing, scaled)


def random_fraction(num_elements: int, *, seed: int, start: int = 0) -> Tensor:
    """Return for each element index a fraction in [0, 1) with 20 bits, a hash of (seed, index).

    A counter-based hash, not a generator with state: every device makes the same bits. Index and seed are
    mixed by two rounds of a 32-bit finalizer; all arithmetic is modulo 2^32.

    Shapes:
        returns: (N,), float32

    Source:
        Ettinger's "lowbias32" integer hash (public domain).
    """
    index = torch.arange(start, start + num_elements, dtype=torch.int64)
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    bits = _mix(_mix((index + low) & 0xFFFFFFFF) ^ high)
    return (bits >> 12).float() * 2.0**-20


def _mix(x: Tensor) -> Tensor:
    """Return lowbias32 of each 32-bit value held in an int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)
