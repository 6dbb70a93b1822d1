"""FP8 packing in Triton, by integer arithmetic on the bits: the same bytes on every GPU, with or without FP8 units.

May import only torch, triton and this package's own modules.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803 - compile-time constants are in capitals, as everywhere in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.fp8_pack.ref import MAXIMUM_OF_FORMAT, Packed
from hybrid_kernels.triton_launch import Specimen, handed

TILE_ELEMENTS = 1024
_UNPACK_BLOCK = 1024
# For each format: what carries into the exponent where the mantissa is above the maximum's, and the exponent
# of the maximum. 240 = 1.875 * 2^7, 448 = 1.75 * 2^8.
_CARRY_AND_EXPONENT = {"e4m3": (0x0FFFFF, 7 << 23), "e4m3fn": (0x1FFFFF, 8 << 23)}


@triton.jit
def _mix(x):
    """lowbias32, as `ref` has it."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _code(magnitude, maximum):
    """Return the FP8 codes, 0 to 127, of float32 magnitudes, rounded to nearest even."""
    magnitude = tl.minimum(magnitude, maximum)
    bits = magnitude.to(tl.int32, bitcast=True)
    rounded = bits + 0x7FFFF + ((bits >> 20) & 1)
    normal = (rounded >> 20) - (120 << 3)
    # Below 2^-6 the codes are multiples of 2^-9: adding 2^23 rounds to an integer.
    small = (magnitude * 512.0 + 8388608.0).to(tl.int32, bitcast=True) - 0x4B000000
    return tl.where(magnitude < 0.015625, small, normal)


@triton.jit
def _value(code):
    """Return the float32 values of FP8 codes of either format."""
    low = code & 0x7F
    normal = ((low << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    magnitude = tl.where(low < 8, low.to(tl.float32) * 0.001953125, normal)
    magnitude = tl.where(low == 0x7F, float("nan"), magnitude)
    # Signs are moved as bits: Triton's minus is 0 - x, which makes +0 of 0.
    return (magnitude.to(tl.int32, bitcast=True) | ((code & 0x80) << 24)).to(tl.float32, bitcast=True)


@triton.jit
def _pack(
    x, error, payload, scales, new_error, size, num_blocks, block_size, carry, exponent_of_max, maximum,
    seed_low, seed_high, HAS_ERROR: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    index = rows[:, None] * block_size + columns[None, :]
    inside = (index < size) & (columns[None, :] < block_size)
    total = tl.load(x + index, mask=inside, other=0.0).to(tl.float32)
    if HAS_ERROR:
        total += tl.load(error + index, mask=inside, other=0.0)
    # As integers, magnitudes compare as they do as floats, and NaN and inf are the largest.
    amax = tl.max(total.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)
    finite = amax < 0x7F800000
    scale_bits = tl.maximum(((amax + carry) & 0x7F800000) - exponent_of_max, 1 << 23)
    scale_bits = tl.where(finite, scale_bits, 127 << 23)
    scale = scale_bits.to(tl.float32, bitcast=True)
    inverse = ((254 << 23) - scale_bits).to(tl.float32, bitcast=True)
    scaled = tl.where(finite[:, None], total * inverse[:, None], 0.0)
    magnitude = tl.abs(scaled)
    if STOCHASTIC:
        mixed = _mix(index.to(tl.uint32) + seed_low.to(tl.uint32, bitcast=True))
        mixed = _mix(mixed ^ seed_high.to(tl.uint32, bitcast=True))
        uniform = (mixed >> 12).to(tl.float32) * (1.0 / 1048576.0)
        exponent = tl.maximum(magnitude.to(tl.int32, bitcast=True) & 0x7F800000, 121 << 23)
        spacing_bits = exponent - (3 << 23)
        per_spacing = ((254 << 23) - spacing_bits).to(tl.float32, bitcast=True)
        magnitude = tl.floor(magnitude * per_spacing + uniform) * spacing_bits.to(tl.float32, bitcast=True)
    code = _code(magnitude, maximum) | ((scaled.to(tl.int32, bitcast=True) >> 24) & 0x80)
    tl.store(payload + index, code.to(tl.uint8), mask=inside)
    tl.store(scales + rows, tl.where(finite, scale, float("nan")), mask=rows < num_blocks)
    if HAS_ERROR:
        lost = tl.where(finite[:, None], total - _value(code) * scale[:, None], 0.0)
        tl.store(new_error + index, lost, mask=inside)


@triton.jit
def _unpack(payload, scales, out, size, block_size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    code = tl.load(payload + index, mask=inside, other=0).to(tl.int32)
    scale = tl.load(scales + index // block_size, mask=inside, other=0.0)
    tl.store(out + index, (_value(code) * scale).to(out.dtype.element_ty), mask=inside)


def fp8_pack(
    x: Tensor,
    *,
    block_size: int,
    fp8_format: str = "e4m3",
    error: Tensor | None = None,
    seed: int | None = None,
) -> Packed:
    """See `ref.fp8_pack`; the same bytes. A block is read at once: at most 32768 elements."""
    if block_size > 32768:
        raise ValueError(f"the triton variant packs blocks of at most 32768 elements (got {block_size})")
    size, device = x.numel(), x.device
    num_blocks = triton.cdiv(size, block_size)
    payload = torch.empty(size, dtype=torch.uint8, device=device)
    scales = torch.empty(num_blocks, dtype=torch.float32, device=device)
    new_error = None if error is None else torch.empty(size, dtype=torch.float32, device=device)
    if size:
        block = triton.next_power_of_2(block_size)
        rows = max(1, TILE_ELEMENTS // block)
        source = handed(x)
        _pack[(triton.cdiv(num_blocks, rows),)](
            source,
            source if error is None else error.contiguous(),
            payload,
            scales,
            source if new_error is None else new_error,
            size,
            num_blocks,
            block_size,
            *_CARRY_AND_EXPONENT[fp8_format],
            MAXIMUM_OF_FORMAT[fp8_format],
            _signed((seed or 0) & 0xFFFFFFFF),
            _signed(((seed or 0) >> 32) & 0xFFFFFFFF),
            HAS_ERROR=error is not None,
            STOCHASTIC=seed is not None,
            ROWS=rows,
            BLOCK=block,
        )
    return Packed(payload=payload, scales=scales, error=new_error)


def fp8_unpack(payload: Tensor, scales: Tensor, *, block_size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """See `ref.fp8_unpack`; the same bits."""
    size = payload.numel()
    # float32 first: the interpreter truncates to bfloat16, and torch's own cast costs little.
    out = torch.empty(size, dtype=torch.float32, device=payload.device)
    if size:
        grid = (triton.cdiv(size, _UNPACK_BLOCK),)
        _unpack[grid](payload.contiguous(), scales, out, size, block_size, BLOCK=_UNPACK_BLOCK)
    return out.to(dtype)


def _signed(word: int) -> int:
    """Return 32 bits as the signed integer of the same bits, which is how Triton takes them."""
    return word - (1 << 32) if word >= 1 << 31 else word


_INTEGERS = ("size", "num_blocks", "block_size", "carry", "exponent_of_max")
_PACK = {
    "x": "*fp32",
    "error": "*fp32",
    "payload": "*u8",
    "scales": "*fp32",
    "new_error": "*fp32",
    **dict.fromkeys(_INTEGERS, "i32"),
    "maximum": "fp32",
    "seed_low": "i32",
    "seed_high": "i32",
}
SPECIMENS = (
    Specimen(
        name="fp8_pack fp32 block 128",
        kernel=_pack,
        signature=_PACK,
        constants={"HAS_ERROR": False, "STOCHASTIC": False, "ROWS": 8, "BLOCK": 128},
    ),
    Specimen(
        name="fp8_pack fp32 block 128, error feedback, stochastic",
        kernel=_pack,
        signature=_PACK,
        constants={"HAS_ERROR": True, "STOCHASTIC": True, "ROWS": 8, "BLOCK": 128},
    ),
    Specimen(
        name="fp8_unpack block 128",
        kernel=_unpack,
        signature={"payload": "*u8", "scales": "*fp32", "out": "*fp32", "size": "i32", "block_size": "i32"},
        constants={"BLOCK": _UNPACK_BLOCK},
    ),
)
