"""`nki.isa`: microscaling on trn3: quantize_mx and nc_matmul_mx.

A group is 8 partitions × 4 packed elements with one e8m0 scale. A quadrant of 32 partitions keeps its four rows of
scales in its own first four partitions (counted from where the scale tile starts).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from hybrid.testing.nki.dtypes import Array
from hybrid.testing.nki.isa_tensor import check_destination, store
from hybrid.testing.nki.machine import current
from hybrid.testing.nki.memory import WRITTEN, MemoryRegion
from hybrid.testing.nki.operands import check_tile, check_written, count, read
from hybrid.testing.nki.refusal import refuse
from hybrid.testing.nki.tile import Tile

_ELEMENT: dict[str, np.dtype[Any]] = {
    "float8_e5m2_x4": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e4m3fn_x4": np.dtype(ml_dtypes.float8_e4m3fn),
    "float4_e2m1fn_x4": np.dtype(ml_dtypes.float4_e2m1fn),
}
_MAX = {"float8_e5m2_x4": 57344.0, "float8_e4m3fn_x4": 448.0}
_MAX_EXPONENT = {"float8_e5m2_x4": 15, "float8_e4m3fn_x4": 8}
_SCALES = ("float8_e8m0fnu", "uint8")
_BIAS = 127


def _check_scale(scale: Tile, data: Tile, what: str) -> None:
    if scale.dtype not in _SCALES:
        refuse("mx-dtypes", f"{what} is {scale.dtype}", valid=_SCALES)
    if scale.free_size != data.free_size:
        refuse("mx-layout", f"{what} has {scale.free_size} scales for {data.free_size} packed elements")


def _scale_rows(partitions: int, available: int) -> list[int]:
    """Return the partition of the scale tile that holds each group of 8 partitions of the data."""
    rows = [group // 4 * 32 + group % 4 for group in range(partitions // 8)]
    if partitions <= 0 or partitions % 32 or partitions > 128 or rows[-1] >= available:
        refuse("mx-layout", f"{partitions} partitions with {available} partitions of scales", valid="32, 64, 96, 128")
    return rows


def _check_sbuf(*tiles: Tile) -> None:
    for tile in tiles:
        if check_tile(tile, "an MX operand").buffer is not MemoryRegion.sbuf:
            refuse("sbuf-only", f"an MX operand is in {tile.buffer.value}", value=tile)


def quantize_mx(dst: Tile, src: Tile, dst_scale: Tile, name: str | None = None) -> None:
    """Quantise 16-bit floats to packed MXFP8 and their block scales."""
    count("quantize_mx")
    current().generation.require("mx", "MX")
    _check_sbuf(dst, src, dst_scale)
    if src.dtype not in ("float16", "bfloat16") or dst.dtype not in _MAX_EXPONENT:
        refuse("mx-dtypes", f"quantize_mx from {src.dtype} to {dst.dtype}", valid=_MAX_EXPONENT)
    if dst.shape[0] != src.shape[0] or src.free_size != 4 * dst.free_size:
        refuse("mx-layout", f"quantize_mx from {src.shape} to {dst.shape}")
    _check_scale(dst_scale, dst, "dst_scale")
    rows = _scale_rows(src.shape[0], dst_scale.shape[0])
    groups = read(src, "src").reshape(len(rows), 8, -1, 4)
    largest = np.abs(groups).max(axis=(1, 3))
    # floor(log2(amax)) of a finite float32 is frexp's exponent less one.
    exponent = np.frexp(largest)[1] - 1 - (_MAX_EXPONENT[dst.dtype] - 1)
    exponent = np.where(largest == 0, -_BIAS, np.clip(exponent, -_BIAS, _BIAS))
    element = _ELEMENT[dst.dtype]
    limit = _MAX[dst.dtype]
    scaled = np.clip(np.ldexp(groups, -exponent[:, None, :, None]), -limit, limit).astype(element)
    packed = np.ascontiguousarray(scaled.reshape(*src.shape[:1], -1)).view(np.uint32)
    dst.array()[...] = packed.reshape(dst.shape)
    dst.state()[...] = WRITTEN
    scales = dst_scale.array().reshape(dst_scale.shape[0], -1).view(np.uint8)
    scales[rows] = (exponent + _BIAS).astype(np.uint8)
    for row in rows:
        dst_scale[row : row + 1].state()[...] = WRITTEN
    dst_scale.array()[...] = scales.view(dst_scale.array().dtype).reshape(dst_scale.shape)


def nc_matmul_mx(
    dst: Tile,
    stationary: Tile,
    moving: Tile,
    stationary_scale: Tile,
    moving_scale: Tile,
    tile_position: tuple[int, ...] | None = None,
    tile_size: tuple[int, ...] | None = None,
    accumulate: bool | None = None,
    name: str | None = None,
) -> None:
    """Write or accumulate the product of two scaled matrices into a PSUM region."""
    count("nc_matmul_mx")
    g = current().generation
    g.require("mx", "MX")
    if tile_position or tile_size:
        refuse("not-in-subset", "row tiling of nc_matmul_mx")
    _check_sbuf(stationary, moving, stationary_scale, moving_scale)
    if check_tile(dst, "dst").buffer is not MemoryRegion.psum:
        refuse("matmul-operand-buffers", f"the destination is in {dst.buffer.value}", value=dst)
    if stationary.shape[0] != moving.shape[0]:
        refuse("matmul-contraction", f"{stationary.shape[0]} and {moving.shape[0]} partitions")
    if stationary.free_size > g.stationary_free_max or stationary.free_size % 2:
        refuse("matmul-stationary-size", f"a stationary free size of {stationary.free_size}", valid="even, at most 128")
    check_destination(dst, stationary.free_size, moving.free_size)
    left = _dequantise(stationary, stationary_scale, "stationary")
    right = _dequantise(moving, moving_scale, "moving")
    store(dst, left.T @ right, accumulate)


def _dequantise(data: Tile, scale: Tile, what: str) -> Array:
    """Return a packed tile as float32 [4 × partitions, free]."""
    if data.dtype not in _ELEMENT:
        refuse("mx-dtypes", f"{what} is {data.dtype}", valid=_ELEMENT)
    _check_scale(scale, data, f"{what}_scale")
    check_written(data, what)
    rows = _scale_rows(data.shape[0], scale.shape[0])
    for row in rows:
        check_written(scale[row : row + 1], f"{what}_scale")
    packed = np.ascontiguousarray(data.array().reshape(data.shape[0], -1))
    if data.dtype == "float4_e2m1fn_x4":
        nibbles = (packed[..., None] >> np.array([0, 4, 8, 12], np.uint16)) & np.uint16(0xF)
        elements = nibbles.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    else:
        elements = packed.view(_ELEMENT[data.dtype]).astype(np.float32).reshape(*packed.shape, 4)
    exponents = scale.array().copy().view(np.uint8).reshape(scale.shape[0], -1)[rows].astype(np.int32) - _BIAS
    scaled = np.ldexp(elements, np.repeat(exponents, 8, axis=0)[:, :, None])
    return np.ascontiguousarray(scaled.transpose(0, 2, 1)).reshape(-1, packed.shape[1])
