"""`nki.isa`: the Tensor Engine: nc_matmul and nc_transpose.

A matmul's result overwrites or accumulates by what its own PSUM region holds, not by what the tile holds.
"""

from __future__ import annotations

import math

import numpy as np

from hybrid.testing.nki.dtypes import Array
from hybrid.testing.nki.enums import Engine, MatmulPerfMode, check_enum
from hybrid.testing.nki.machine import current
from hybrid.testing.nki.memory import MATMUL, WRITTEN, ZEROED, MemoryRegion
from hybrid.testing.nki.operands import check_engine, check_on_chip, check_written, count, read, read_bits, write
from hybrid.testing.nki.refusal import refuse
from hybrid.testing.nki.tile import Tile

_FP8 = ("float8_e4m3", "float8_e5m2", "float8_e4m3fn")
_WIDE = ("tfloat32", "float32")
_MATMUL_TYPES = (*_FP8, "bfloat16", "float16", *_WIDE)


def nc_matmul(
    dst: Tile,
    stationary: Tile,
    moving: Tile,
    is_stationary_onezero: bool = False,
    is_moving_onezero: bool = False,
    is_transpose: bool = False,
    accumulate: bool | None = None,
    tile_position: tuple[int, ...] = (),
    tile_size: tuple[int, ...] = (),
    perf_mode: MatmulPerfMode = MatmulPerfMode.none,
    name: str | None = None,
) -> None:
    """Write or accumulate `stationary.T @ moving` into a PSUM region."""
    count("nc_matmul")
    check_enum(perf_mode, MatmulPerfMode, "perf_mode")
    check_operand_buffers(dst, stationary, moving)
    double_row = perf_mode is MatmulPerfMode.double_row
    _check_types(stationary, moving, double_row)
    left, right = _matrices(stationary, moving, double_row)
    _check_tiling(stationary.shape[0], left.shape[1], tuple(tile_position or ()), tuple(tile_size or ()), double_row)
    check_destination(dst, left.shape[1], right.shape[1])
    with np.errstate(all="ignore"):
        store(dst, left.T @ right, accumulate)


def check_operand_buffers(dst: Tile, *inputs: Tile) -> None:
    """Refuse inputs outside SBUF or a destination outside PSUM (rule `matmul-operand-buffers`)."""
    for tile in inputs:
        if check_on_chip(tile, "a matmul input").buffer is not MemoryRegion.sbuf:
            refuse("matmul-operand-buffers", f"an input is in {tile.buffer.value}", value=tile)
    if check_on_chip(dst, "dst").buffer is not MemoryRegion.psum:
        refuse("matmul-operand-buffers", f"the destination is in {dst.buffer.value}", value=dst)


def _check_types(stationary: Tile, moving: Tile, double_row: bool) -> None:
    generation, types = current().generation, (stationary.dtype, moving.dtype)
    for dtype in types:
        if dtype not in _MATMUL_TYPES:
            refuse("matmul-dtypes", f"a {dtype} operand", valid=_MATMUL_TYPES)
    if "float8_e4m3fn" in types:
        if "float8_e4m3" in types:
            refuse("matmul-fp8-mix", "float8_e4m3 and float8_e4m3fn in one matmul")
        generation.require("ocp_fp8", "float8_e4m3fn matmul")
    if (types[0] in _WIDE) != (types[1] in _WIDE):
        refuse("matmul-dtypes", f"{types[0]} with {types[1]}")
    if double_row:
        generation.require("double_row", "double_row mode")
        if not set(types) <= set(_FP8):
            refuse("matmul-double-row", f"double_row of {types[0]} and {types[1]}", valid=_FP8)


def _matrices(stationary: Tile, moving: Tile, double_row: bool) -> tuple[Array, Array]:
    """Return the operands as float32 matrices [K, M] and [K, N]; with double_row K is 2 × the partitions."""
    if stationary.shape[0] != moving.shape[0]:
        refuse("matmul-contraction", f"{stationary.shape[0]} and {moving.shape[0]} partitions")
    left, right = read(stationary, "stationary"), read(moving, "moving")
    if double_row:
        if stationary.ndim < 3 or moving.ndim < 3 or stationary.shape[1] != 2 or moving.shape[1] != 2:
            refuse(
                "matmul-double-row", f"shapes {stationary.shape} and {moving.shape}", valid="[K, 2, M] and [K, 2, N]"
            )
        left = left.reshape(2 * left.shape[0], -1)
        right = right.reshape(2 * right.shape[0], -1)
    limit = current().generation.stationary_free_max
    if left.shape[1] > limit:
        refuse("matmul-stationary-size", f"a stationary free size of {left.shape[1]}", valid=f"at most {limit}")
    return left, right


def _check_tiling(rows: int, columns: int, position: tuple[int, ...], size: tuple[int, ...], double_row: bool) -> None:
    if not position and not size:
        return
    valid = current().generation.row_tiles
    if len(position) != 2 or len(size) != 2:
        refuse("matmul-tiling", "tile_position and tile_size are not both pairs", value=(position, size))
    aligned = all(s in valid and p % s == 0 and 0 <= p < 128 for p, s in zip(position, size, strict=True))
    if not aligned or rows > size[0] or columns > size[1]:
        refuse("matmul-tiling", f"[{rows}, {columns}] at {position} of {size}", valid=f"tiles of {valid}")
    if double_row and size[1] != 128:
        refuse("matmul-double-row", "double_row with column tiling")


def check_destination(dst: Tile, rows: int, columns: int) -> None:
    """Refuse a destination of another shape, type or size than the generation's matmul writes.

    Raises:
        NkiRefused: rules `matmul-moving-size`, `matmul-dst-shape`, `matmul-dst-dtype`, `matmul-dst-bank`.
    """
    g = current().generation
    if dst.dtype not in (("float32", "bfloat16") if "psum_bf16" in g.has else ("float32",)):
        refuse("matmul-dst-dtype", f"a {dst.dtype} destination on {g.name}")
    limit = g.moving_free_max_bf16 if dst.dtype == "bfloat16" else g.moving_free_max_fp32
    if columns > limit:
        refuse("matmul-moving-size", f"a moving free size of {columns} on {g.name}", valid=f"at most {limit}")
    if (dst.shape[0], dst.free_size) != (rows, columns):
        refuse("matmul-dst-shape", f"destination {dst.shape}", valid=f"[{rows}, {columns}]")
    first, end = dst.free_span_bytes()
    if g.moving_free_max_fp32 * 4 <= g.psum_bank_bytes and first // g.psum_bank_bytes != (end - 1) // g.psum_bank_bytes:
        refuse("matmul-dst-bank", f"the destination spans bytes {first} to {end} of a partition", value=dst)


def store(dst: Tile, product: Array, accumulate: bool | None) -> None:
    """Overwrite or accumulate, by the state of the region.

    Raises:
        NkiRefused: rules `psum-accumulate-first`, `psum-foreign-accumulate`, `psum-partial-overlap`.
    """
    state = dst.state()
    open_group, written = state & MATMUL != 0, state & WRITTEN != 0
    foreign = written & ~open_group & (state & ZEROED == 0)
    if accumulate is False:
        write(dst, product, by_matmul=True)
        return
    later_generation = "memset_then_accumulate" in current().generation.has
    if foreign.any():
        if not (foreign.all() and later_generation):
            refuse("psum-foreign-accumulate", "another instruction wrote this PSUM region", value=dst)
        add = True
    else:
        if open_group.any() and not open_group.all():
            refuse("psum-partial-overlap", "matmuls wrote only a part of this PSUM region", value=dst)
        add = bool(open_group.all())
        if accumulate and not add and not (later_generation and written.all()):
            refuse("psum-accumulate-first", "accumulate=True onto a region that no matmul started", value=dst)
    if add:
        product = product + read(dst, "dst")
    write(dst, product, by_matmul=True)


def nc_transpose(dst: Tile, data: Tile, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    """Transpose partitions and (flattened) free elements."""
    count("nc_transpose")
    g = current().generation
    check_on_chip(dst, "dst")
    check_on_chip(data, "data")
    check_engine(engine, (Engine.tensor, Engine.vector))
    rows, columns = data.shape[0], data.free_size
    if dst.shape[0] != columns or math.prod(dst.shape[1:]) != rows:
        refuse("transpose-shape", f"{data.shape} into {dst.shape}", valid=f"[{columns}, {rows}]")
    if dst.dtype != data.dtype:
        refuse("transpose-dtype", f"{data.dtype} into {dst.dtype}")
    on_tensor = data.buffer is MemoryRegion.sbuf and dst.buffer is MemoryRegion.psum
    small = max(rows, columns) <= g.transpose_vector_max
    if engine is Engine.tensor or (engine is Engine.unknown and not small):
        if not on_tensor:
            refuse("transpose-buffers", f"{data.buffer.value} into {dst.buffer.value}", valid="sbuf into psum")
        if max(rows, columns) > g.transpose_tensor_max:
            refuse("transpose-shape", f"{data.shape} on the Tensor Engine", valid=f"at most {g.transpose_tensor_max}")
        check_written(data, "data")
        if "exact_transpose" not in g.has and not np.isfinite(read(data, "data")).all():
            refuse("transpose-nan", f"the tile holds NaN or infinity on {g.name}")
    elif not small:
        refuse("transpose-shape", f"{data.shape} on the Vector Engine", valid=f"at most {g.transpose_vector_max}")
    dst.array()[...] = read_bits(data, "data").T.reshape(dst.shape)
    dst.state()[...] = WRITTEN
