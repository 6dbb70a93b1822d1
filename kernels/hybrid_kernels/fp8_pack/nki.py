"""Packing float32 into FP8 blocks on a NeuronCore: a block a partition; the reference's very bytes.

Scales are made from the bits of the largest magnitude, so that no rounding of a logarithm or a division can differ from
another device's. Letters: M blocks of E elements. May import only nki, torch and `ref`; written for NKI 0.6.
Executed only by an interpreter of a documented NKI subset, never on a Trainium.
"""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl
import torch
from torch import Tensor

from hybrid_kernels.fp8_pack.ref import MAXIMUM_OF_FORMAT, Packed

MAX_BLOCK_SIZE = 2048
"""Largest block: some twenty tiles of a block live at once, 160 KiB of a partition in all."""
MAXIMUM = MAXIMUM_OF_FORMAT["e4m3"]
"""Largest value that the device's own e4m3 holds."""
WHOLE = 8388608.0
"""2^23: a float32 of at most 2^22 that gains and loses it is rounded to a whole number."""


def fp8_pack(
    x: Tensor,
    *,
    block_size: int,
    fp8_format: str = "e4m3",
    error: Tensor | None = None,
    seed: int | None = None,
) -> Packed:
    """Return `x` packed block by block; see `ref.fp8_pack`.

    Raises:
        ValueError: a block larger than a partition takes.
    """
    if not 1 <= block_size <= MAX_BLOCK_SIZE:
        raise ValueError(f"block_size {block_size} does not fit a partition; valid: 1 to {MAX_BLOCK_SIZE}")
    if x.numel() == 0:
        none = torch.empty(0, device=x.device)
        return Packed(payload=none.to(torch.uint8), scales=none, error=None if error is None else none.clone())
    seeds = None
    if seed is not None:
        halves = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
        # As a tensor: were it a hyper-parameter, every seed would compile anew. Wrapped into int32's range.
        seeds = torch.tensor([[(half ^ 0x80000000) - 0x80000000 for half in halves]], dtype=torch.int32).to(x.device)
    errors = None if error is None else _blocks(error, block_size)
    payload, scales, new_error = pack_kernel(_blocks(x, block_size), errors, seeds, fp8_format == "e4m3fn")
    num_elements = x.numel()
    return Packed(
        payload=payload.reshape(-1)[:num_elements],
        scales=scales.reshape(-1),
        error=None if error is None else new_error.reshape(-1)[:num_elements],
    )


def fp8_unpack(payload: Tensor, scales: Tensor, *, block_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values that `fp8_pack` packed; see `ref.fp8_unpack`."""
    if payload.numel() == 0:
        return torch.empty(0, dtype=dtype, device=payload.device)
    values: Tensor = unpack_kernel(_blocks(payload, block_size), scales.reshape(-1, 1))
    return values.reshape(-1)[: payload.numel()].to(dtype)


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """Return a vector as (M, E), the last block filled with zeros."""
    missing = -x.numel() % block_size
    return torch.nn.functional.pad(x, (0, missing)).reshape(-1, block_size)


def word(rows: int, value: int) -> nl.NkiTensor:
    """Return an integer on every partition, (rows, 1)."""
    tile = nl.ndarray((rows, 1), dtype=nl.uint32, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=value)
    return tile


def words_like(tile: nl.NkiTensor) -> nl.NkiTensor:
    """Return an undefined tile of integers of another tile's shape."""
    return nl.ndarray(tile.shape, dtype=nl.uint32, buffer=nl.sbuf)


def bits(x: nl.NkiTensor, op: object, operand: int) -> nl.NkiTensor:
    """Return a bitwise operation of integers with a constant."""
    out = words_like(x)
    nisa.tensor_scalar(dst=out, data=x, op0=op, operand0=operand)
    return out


def combine(x: nl.NkiTensor, y: nl.NkiTensor, op: object) -> nl.NkiTensor:
    """Return an operation of integers, exact while no result leaves 32 bits; y may be one column."""
    out = words_like(x)
    other = y if y.shape == x.shape else y.broadcast(1, x.shape[1])
    nisa.tensor_tensor(dst=out, data1=x, data2=other, op=op)
    return out


def add_words(x: nl.NkiTensor, y: nl.NkiTensor) -> nl.NkiTensor:
    """Return x + y modulo 2^32, in halves of 16 bits so that nothing overflows."""
    low = combine(bits(x, nl.bitwise_and, 0xFFFF), bits(y, nl.bitwise_and, 0xFFFF), nl.add)
    high = combine(bits(x, nl.right_shift, 16), bits(y, nl.right_shift, 16), nl.add)
    return join_halves(combine(high, bits(low, nl.right_shift, 16), nl.add), low)


def multiply_word(x: nl.NkiTensor, factor: int) -> nl.NkiTensor:
    """Return x * factor modulo 2^32, in products of 16 by 16 bits so that nothing overflows."""
    rows = x.shape[0]
    low_factor, high_factor = word(rows, factor & 0xFFFF), word(rows, factor >> 16)
    low, high = bits(x, nl.bitwise_and, 0xFFFF), bits(x, nl.right_shift, 16)
    low_product = combine(low, low_factor, nl.multiply)
    crossed = combine(
        bits(combine(low, high_factor, nl.multiply), nl.bitwise_and, 0xFFFF),
        bits(combine(high, low_factor, nl.multiply), nl.bitwise_and, 0xFFFF),
        nl.add,
    )
    return join_halves(combine(crossed, bits(low_product, nl.right_shift, 16), nl.add), low_product)


def join_halves(high: nl.NkiTensor, low: nl.NkiTensor) -> nl.NkiTensor:
    """Return the low 16 bits of `high` above the low 16 bits of `low`."""
    lifted = bits(bits(high, nl.bitwise_and, 0xFFFF), nl.left_shift, 16)
    return combine(lifted, bits(low, nl.bitwise_and, 0xFFFF), nl.bitwise_or)


def mix(x: nl.NkiTensor) -> nl.NkiTensor:
    """Return the reference's 32-bit hash of each word."""
    x = combine(x, bits(x, nl.right_shift, 16), nl.bitwise_xor)
    x = multiply_word(x, 0x7FEB352D)
    x = combine(x, bits(x, nl.right_shift, 15), nl.bitwise_xor)
    x = multiply_word(x, 0x846CA68B)
    return combine(x, bits(x, nl.right_shift, 16), nl.bitwise_xor)


def random_fraction(rows: int, size: int, first: int, seeds: nl.NkiTensor) -> nl.NkiTensor:
    """Return the reference's fractions for blocks `first` and on: (rows, size) in float32."""
    index = nl.ndarray((rows, size), dtype=nl.int32, buffer=nl.sbuf)
    fraction = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=index, pattern=[[1, size]], offset=first * size, channel_multiplier=size)
    low, high = seeds[0:rows, 0:1].broadcast(1, size), seeds[0:rows, 1:2].broadcast(1, size)
    mixed = mix(combine(mix(add_words(index.view(nl.uint32), low)), high, nl.bitwise_xor))
    nisa.tensor_copy(dst=fraction, src=bits(mixed, nl.right_shift, 12))
    nisa.tensor_scalar(dst=fraction, data=fraction, op0=nl.multiply, operand0=1.0 / 1048576.0)
    return fraction


def round_stochastically(scaled: nl.NkiTensor, fraction: nl.NkiTensor) -> None:
    """Move each element to one of its two FP8 neighbours, in place; see `ref.round_stochastically`."""
    pattern = scaled.view(nl.uint32)
    sign = bits(pattern, nl.bitwise_and, 0x80000000)
    exponent = bits(bits(pattern, nl.bitwise_and, 0x7FFFFFFF), nl.right_shift, 23)
    # The spacing of FP8 values is 2^-3 of the element's power of two, 2^-9 at least; the exponents are small integers,
    # which float32 arithmetic keeps.
    spacing, inverse = words_like(exponent), words_like(exponent)
    nisa.tensor_scalar(dst=spacing, data=exponent, op0=nl.maximum, operand0=121.0, op1=nl.subtract, operand1=3.0)
    nisa.tensor_scalar(dst=inverse, data=spacing, op0=nl.subtract, operand0=254.0, reverse0=True)
    spacing, inverse = bits(spacing, nl.left_shift, 23), bits(inverse, nl.left_shift, 23)
    steps = nl.ndarray(scaled.shape, dtype=nl.float32, buffer=nl.sbuf)
    nearest = nl.ndarray(scaled.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=steps, data=scaled, op0=nl.abs, operand0=0.0)
    nisa.tensor_tensor(dst=steps, data1=steps, data2=inverse.view(nl.float32), op=nl.multiply)
    nisa.tensor_tensor(dst=steps, data1=steps, data2=fraction, op=nl.add)
    # The floor: the nearest whole number, less one where that is above.
    nisa.tensor_scalar(dst=nearest, data=steps, op0=nl.add, operand0=WHOLE, op1=nl.subtract, operand1=WHOLE)
    nisa.tensor_tensor(dst=steps, data1=nearest, data2=steps, op=nl.greater)
    nisa.tensor_tensor(dst=steps, data1=nearest, data2=steps, op=nl.subtract)
    nisa.tensor_tensor(dst=steps, data1=steps, data2=spacing.view(nl.float32), op=nl.multiply)
    nisa.tensor_tensor(dst=pattern, data1=steps.view(nl.uint32), data2=sign, op=nl.bitwise_or)


def encode(scaled: nl.NkiTensor, ocp: bool) -> nl.NkiTensor:
    """Return the codes of values within the format's maximum, of the values' shape, in uint8."""
    codes = nl.ndarray(scaled.shape, dtype=nl.float8_e4m3, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=codes, data=scaled, op0=nl.minimum, operand0=MAXIMUM, op1=nl.maximum, operand1=-MAXIMUM)
    if not ocp:
        return codes.view(nl.uint8)
    # The device's own e4m3 ends at 240. Above, from the middle between 240 and 256 on, the OCP format goes on in steps
    # of 32 from code 0x78; the sign is the one that the clipped value already has.
    magnitude = nl.ndarray(scaled.shape, dtype=nl.float32, buffer=nl.sbuf)
    above = nl.ndarray(scaled.shape, dtype=nl.uint8, buffer=nl.sbuf)
    high = nl.ndarray(scaled.shape, dtype=nl.uint8, buffer=nl.sbuf)
    sign = nl.ndarray(scaled.shape, dtype=nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=magnitude, data=scaled, op0=nl.abs, operand0=0.0, op1=nl.minimum, operand1=448.0)
    nisa.tensor_scalar(dst=above, data=magnitude, op0=nl.greater_equal, operand0=248.0)
    nisa.tensor_scalar(
        dst=magnitude, data=magnitude, op0=nl.subtract, operand0=256.0, op1=nl.multiply, operand1=1.0 / 32.0
    )
    nisa.tensor_scalar(dst=magnitude, data=magnitude, op0=nl.add, operand0=WHOLE, op1=nl.subtract, operand1=WHOLE)
    nisa.tensor_scalar(dst=magnitude, data=magnitude, op0=nl.add, operand0=120.0, op1=nl.maximum, operand1=0.0)
    nisa.tensor_copy(dst=high, src=magnitude)
    nisa.tensor_scalar(dst=sign, data=codes.view(nl.uint8), op0=nl.bitwise_and, operand0=0x80)
    nisa.tensor_tensor(dst=high, data1=high, data2=sign, op=nl.bitwise_or)
    nisa.tensor_copy_predicated(dst=codes.view(nl.uint8), src=high, predicate=above)
    return codes.view(nl.uint8)


def decode(codes: nl.NkiTensor) -> nl.NkiTensor:
    """Return the values of codes of either format, of the codes' shape, in float32."""
    low = nl.ndarray(codes.shape, dtype=nl.uint8, buffer=nl.sbuf)
    above = nl.ndarray(codes.shape, dtype=nl.uint8, buffer=nl.sbuf)
    wide = nl.ndarray(codes.shape, dtype=nl.float32, buffer=nl.sbuf)
    high = nl.ndarray(codes.shape, dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=low, data=codes, op0=nl.bitwise_and, operand0=0x7F)
    # Codes from 0x78 are 256 to 448 in steps of 32 in the OCP format, and not finite in Trainium's own.
    nisa.tensor_scalar(dst=above, data=low, op0=nl.greater_equal, operand0=120.0)
    nisa.tensor_copy(dst=wide, src=low.view(nl.float8_e4m3))
    nisa.tensor_scalar(dst=high, data=low, op0=nl.multiply, operand0=32.0, op1=nl.subtract, operand1=3584.0)
    nisa.tensor_copy_predicated(dst=wide, src=high, predicate=above)
    # The sign: 1 below 0x80, -1 from there.
    nisa.tensor_scalar(dst=high, data=codes, op0=nl.less, operand0=128.0, op1=nl.multiply, operand1=2.0)
    nisa.tensor_scalar(dst=high, data=high, op0=nl.subtract, operand0=1.0)
    nisa.tensor_tensor(dst=wide, data1=wide, data2=high, op=nl.multiply)
    return wide


def block_scales(total: nl.NkiTensor, ocp: bool) -> tuple[nl.NkiTensor, nl.NkiTensor, nl.NkiTensor]:
    """Return scale, its inverse (both float32) and whether all is finite (uint8), of each partition, (rows, 1)."""
    rows = total.shape[0]
    magnitude = nl.ndarray(total.shape, dtype=nl.float32, buffer=nl.sbuf)
    largest = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=magnitude, data=total, op0=nl.abs, operand0=0.0)
    nisa.tensor_reduce(dst=largest, op=nl.maximum, data=magnitude, axis=1)
    # NaN and infinities turn zero into NaN, whatever the engine's maximum makes of them.
    doubt = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    finite = nl.ndarray((rows, 1), dtype=nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=magnitude, data=total, op0=nl.multiply, operand0=0.0)
    nisa.tensor_reduce(dst=doubt, op=nl.add, data=magnitude, axis=1)
    nisa.tensor_scalar(dst=finite, data=doubt, op0=nl.equal, operand0=0.0)
    # 240 is 1.875 * 2^7 and 448 is 1.75 * 2^8: a mantissa above carries into the exponent.
    carry, power = (0x1FFFFF, 8.0) if ocp else (0x0FFFFF, 7.0)
    exponent = bits(combine(largest.view(nl.uint32), word(rows, carry), nl.add), nl.right_shift, 23)
    inverse = words_like(exponent)
    lowered = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=lowered, data=exponent, op0=nl.subtract, operand0=power, op1=nl.maximum, operand1=1.0)
    # A block that is not finite may have an exponent beyond the format's; any other than its own serves.
    nisa.tensor_scalar(dst=lowered, data=lowered, op0=nl.minimum, operand0=253.0)
    nisa.tensor_copy(dst=exponent, src=lowered)
    nisa.tensor_scalar(dst=inverse, data=lowered, op0=nl.subtract, operand0=254.0, reverse0=True)
    scale = bits(exponent, nl.left_shift, 23).view(nl.float32)
    marked = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=marked, data1=scale, data2=doubt, op=nl.add)
    return marked, bits(inverse, nl.left_shift, 23).view(nl.float32), finite


@nki.jit  # type: ignore[untyped-decorator]
def pack_kernel(
    x: nl.NkiTensor, error: nl.NkiTensor | None, seeds: nl.NkiTensor | None, ocp: bool
) -> tuple[nl.NkiTensor, nl.NkiTensor, nl.NkiTensor | None]:
    """Pack blocks: x and error (M, E), seeds (1, 2) int32; returns codes (M, E), scales (M, 1), error (M, E).

    `ocp` takes the format whose largest value is 448.
    """
    num_blocks, size = x.shape
    pmax = nl.tile_size.pmax
    payload = nl.ndarray((num_blocks, size), dtype=nl.uint8, buffer=nl.shared_hbm)
    scales = nl.ndarray((num_blocks, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    new_error = nl.ndarray((num_blocks, size), dtype=nl.float32, buffer=nl.shared_hbm) if error != None else None  # noqa: E711
    if seeds != None:  # noqa: E711
        seed_tile = nl.ndarray((pmax, 2), dtype=nl.int32, buffer=nl.sbuf)
        nisa.dma_copy(dst=seed_tile, src=seeds.broadcast(0, pmax))
    for first in range(0, num_blocks, pmax):
        rows = min(pmax, num_blocks - first)
        total = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=total, src=x[first : first + rows, :])
        if error != None:  # noqa: E711
            old = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
            nisa.dma_copy(dst=old, src=error[first : first + rows, :])
            nisa.tensor_tensor(dst=total, data1=total, data2=old, op=nl.add)
        scale, inverse, finite = block_scales(total, ocp)
        raw = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
        scaled = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
        nisa.tensor_scalar(dst=raw, data=total, op0=nl.multiply, operand0=inverse)
        nisa.memset(dst=scaled, value=0.0)
        nisa.tensor_copy_predicated(dst=scaled, src=raw, predicate=finite.broadcast(1, size))
        if seeds != None:  # noqa: E711
            round_stochastically(scaled, random_fraction(rows, size, first, seed_tile.view(nl.uint32)))
        codes = encode(scaled, ocp)
        nisa.dma_copy(dst=payload[first : first + rows, :], src=codes)
        nisa.dma_copy(dst=scales[first : first + rows, :], src=scale)
        if new_error != None:  # noqa: E711
            lost = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=raw, data=decode(codes), op0=nl.multiply, operand0=scale)
            nisa.tensor_tensor(dst=raw, data1=total, data2=raw, op=nl.subtract)
            nisa.memset(dst=lost, value=0.0)
            nisa.tensor_copy_predicated(dst=lost, src=raw, predicate=finite.broadcast(1, size))
            nisa.dma_copy(dst=new_error[first : first + rows, :], src=lost)
    return payload, scales, new_error


@nki.jit  # type: ignore[untyped-decorator]
def unpack_kernel(payload: nl.NkiTensor, scales: nl.NkiTensor) -> nl.NkiTensor:
    """Return the float32 values of codes (M, E) of either format with their scales (M, 1)."""
    num_blocks, size = payload.shape
    pmax = nl.tile_size.pmax
    values = nl.ndarray((num_blocks, size), dtype=nl.float32, buffer=nl.shared_hbm)
    for first in range(0, num_blocks, pmax):
        rows = min(pmax, num_blocks - first)
        codes = nl.ndarray((rows, size), dtype=nl.uint8, buffer=nl.sbuf)
        scale = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=codes, src=payload[first : first + rows, :])
        nisa.dma_copy(dst=scale, src=scales[first : first + rows, :])
        wide = decode(codes)
        nisa.tensor_scalar(dst=wide, data=wide, op0=nl.multiply, operand0=scale)
        nisa.dma_copy(dst=values[first : first + rows, :], src=wide)
    return values
