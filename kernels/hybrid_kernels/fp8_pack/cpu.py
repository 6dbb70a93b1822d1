"""FP8 packing on the CPU: tile by tile in cache, scales made from exponent bits, decoding by a table.

May import only torch and this package's own modules.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hybrid_kernels.fp8_pack import ref
from hybrid_kernels.fp8_pack.ref import Packed
from hybrid_kernels.tiles import rows_of_tile, tiles

# For each format: what carries into the exponent where the mantissa is above the maximum's, and the exponent
# of the maximum. 240 = 1.875 * 2^7, 448 = 1.75 * 2^8.
_CARRY_AND_EXPONENT = {"e4m3": (0x0FFFFF, 7 << 23), "e4m3fn": (0x1FFFFF, 8 << 23)}
_EXPONENT_BITS = 0x7F800000
_SMALLEST_NORMAL_BITS = 1 << 23


def fp8_pack(
    x: Tensor,
    *,
    block_size: int,
    fp8_format: str = "e4m3",
    error: Tensor | None = None,
    seed: int | None = None,
) -> Packed:
    """See `ref.fp8_pack`; the same bytes."""
    num_elements = x.numel()
    payload = torch.empty(num_elements, dtype=torch.float8_e4m3fn)
    amax, scales = torch.empty(2, -(-num_elements // block_size))
    new_error = None if error is None else torch.empty(num_elements)
    whole = num_elements // block_size
    scratch = torch.empty(2, min(num_elements, rows_of_tile(block_size) * block_size))
    for blocks in [*tiles(whole, block_size), slice(whole, len(scales))]:
        span = slice(blocks.start * block_size, min(blocks.stop * block_size, num_elements))
        rows = blocks.stop - blocks.start
        if not rows:
            continue
        room, other = (part[: span.stop - span.start].view(rows, -1) for part in scratch)
        values = _sum(x[span].view(rows, -1), None if error is None else error[span].view(rows, -1), room)
        inverse = _scale_blocks(values, amax[blocks], scales[blocks], other, fp8_format)
        scaled = torch.mul(values, inverse[:, None], out=other)
        if seed is not None:
            flat = scaled.view(-1)
            flat.copy_(ref.round_stochastically(flat, seed=seed, start=span.start))
        # Nothing is left to clip: the scale was chosen so that the block's amax is within the format.
        payload[span].view(rows, -1).copy_(scaled)
        if new_error is not None:
            back = _decode(payload[span].view(torch.uint8), scaled.view(-1)).view(rows, -1)
            torch.sub(values, back.mul_(scales[blocks, None]), out=new_error[span].view(rows, -1))
    codes = payload.view(torch.uint8)
    _mark_not_finite(amax, scales, codes, new_error, block_size)
    return Packed(payload=codes, scales=scales, error=new_error)


def fp8_unpack(payload: Tensor, scales: Tensor, *, block_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `ref.fp8_unpack`; the same bits."""
    num_elements = payload.numel()
    out = torch.empty(num_elements, dtype=dtype)
    scratch = torch.empty(min(num_elements, rows_of_tile(block_size) * block_size))
    for blocks in tiles(len(scales), block_size):
        span = slice(blocks.start * block_size, min(blocks.stop * block_size, num_elements))
        size = span.stop - span.start
        values = _decode(payload[span], out[span] if dtype == torch.float32 else scratch[:size])
        whole = size // block_size
        values[: whole * block_size].view(whole, block_size).mul_(scales[blocks.start : blocks.start + whole, None])
        values[whole * block_size :].mul_(scales[blocks.stop - 1])
        if dtype != torch.float32:
            out[span] = values
    return out


def _sum(x: Tensor, error: Tensor | None, room: Tensor) -> Tensor:
    """Return ``x + error`` in float32: ``x`` itself where that is it, else written into `room`."""
    if error is not None:
        return torch.add(x, error, out=room)
    return x if x.dtype == torch.float32 else room.copy_(x)


def _scale_blocks(values: Tensor, amax: Tensor, scales: Tensor, room: Tensor, fp8_format: str) -> Tensor:
    """Write each row's amax and scale, and return the inverses of the scales; see `ref.block_scales`.

    Shapes:
        values, room: (M, block).  amax, scales, returns: (M,)
    """
    carry, exponent_of_max = _CARRY_AND_EXPONENT[fp8_format]
    torch.amax(torch.abs(values, out=room), dim=1, out=amax)
    # A magnitude's bits are its exponent and mantissa: no sign to mask.
    bits = scales.view(torch.int32)
    torch.add(amax.view(torch.int32), carry, out=bits)
    bits.bitwise_and_(_EXPONENT_BITS).sub_(exponent_of_max).clamp_(min=_SMALLEST_NORMAL_BITS)
    # 1 / 2^p: the biased exponents of the two add up to 254.
    return torch.rsub(bits, 254 << 23).view(torch.float32)


def _mark_not_finite(amax: Tensor, scales: Tensor, codes: Tensor, error: Tensor | None, block_size: int) -> None:
    """Give the blocks whose amax is NaN or infinite a NaN scale, a payload of zeros and no error."""
    for block in (~amax.isfinite()).nonzero()[:, 0].tolist():
        span = slice(block * block_size, (block + 1) * block_size)
        scales[block] = float("nan")
        codes[span] = 0
        if error is not None:
            error[span] = 0.0


def _decode(codes: Tensor, out: Tensor) -> Tensor:
    """Write the float32 values of FP8 codes; a table is ten times faster than torch's cast on a CPU.

    Shapes:
        codes: (N,) uint8.  out, returns: (N,) float32
    """
    return torch.index_select(_table(), 0, codes.int(), out=out)


@cache
def _table() -> Tensor:
    return ref.decode(torch.arange(256, dtype=torch.uint8))
