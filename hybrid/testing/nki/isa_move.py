"""`nki.isa`: instructions that move or make data: DMA, copies, fills, patterns, selections."""

from __future__ import annotations

import numpy as np

from hybrid.testing.nki.dtypes import INTEGER, Array, cast
from hybrid.testing.nki.enums import DgeMode, Engine, OobMode, check_enum
from hybrid.testing.nki.machine import current
from hybrid.testing.nki.memory import WRITTEN, MemoryRegion
from hybrid.testing.nki.operands import (
    check_castable,
    check_engine,
    check_on_chip,
    check_same_layout,
    check_sbuf,
    check_tile,
    check_written,
    count,
    operation,
    read,
    read_bits,
    write,
)
from hybrid.testing.nki.operators import Operation
from hybrid.testing.nki.refusal import refuse
from hybrid.testing.nki.tile import Tile, is_packed

Pattern = list[list[int]]


def dma_copy(
    dst: Tile,
    src: Tile,
    priority: int | None = None,
    oob_mode: OobMode = OobMode.error,
    dge_mode: DgeMode = DgeMode.unknown,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """Copy between HBM and SBUF in row-major order; a change of type goes through float32."""
    machine = current()
    count("dma_copy")
    check_enum(oob_mode, OobMode, "oob_mode")
    check_enum(dge_mode, DgeMode, "dge_mode")
    check_engine(engine, (Engine.sync, Engine.scalar))
    for tile, what in ((check_tile(dst, "dst"), "dst"), (check_tile(src, "src"), "src")):
        if tile.buffer is MemoryRegion.psum:
            refuse("dma-no-psum", f"{what} of dma_copy is in PSUM", value=tile)
    if dge_mode is DgeMode.hwdge:
        machine.generation.require("hardware_dge", "hardware descriptor generation")
        if dst.dtype != src.dtype:
            refuse("dma-hwdge-cast", f"hwdge from {src.dtype} to {dst.dtype}", fix="view() the source as the same type")
    if priority is not None:
        machine.generation.require("dma_priority", "DMA priority")
    if dst.size != src.size:
        refuse("dma-size", f"{src.size} elements into {dst.size}", value=(src, dst))
    check_written(src, "src")
    machine.dma_bytes += dst.size * dst.itemsize
    values = src.array().copy()
    if dst.dtype != src.dtype:
        check_castable(src)
        check_castable(dst)
        values = cast(values.astype(np.float32), dst.dtype)
    dst.array()[...] = values.reshape(dst.shape)
    dst.state()[...] = WRITTEN
    dst.storage.changed = True


def tensor_copy(dst: Tile, src: Tile, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    """Copy on chip: bit for bit within one type, else through float32."""
    count("tensor_copy")
    check_on_chip(dst, "dst")
    check_on_chip(src, "src")
    check_engine(engine, (Engine.vector, Engine.scalar, Engine.gpsimd), dst, src)
    if engine is Engine.scalar:
        current().generation.require("scalar_engine_copy", "tensor_copy on the Scalar Engine")
    check_same_layout(dst, src)
    _transfer(dst, src)


def _transfer(dst: Tile, src: Tile) -> None:
    if dst.dtype != src.dtype:
        write(dst, read(src, "src"))
        return
    dst.array()[...] = read_bits(src, "src").reshape(dst.shape)
    dst.state()[...] = WRITTEN


def memset(dst: Tile, value: float, engine: Engine = Engine.unknown, name: str | None = None) -> None:
    """Fill a tile with a constant of its type."""
    count("memset")
    check_on_chip(dst, "dst")
    check_engine(engine, (Engine.vector, Engine.gpsimd), dst)
    if dst.dtype in INTEGER and not isinstance(value, int | np.integer):
        refuse("memset-dtype", f"a {dst.dtype} tile is filled with a {type(value).__name__}", value=value)
    if is_packed(dst) and value != 0:
        refuse("memset-dtype", f"a packed {dst.dtype} tile is filled with something else than 0", value=value)
    write(dst, np.full(dst.shape, value, np.int64 if dst.dtype in INTEGER else np.float32))


def tensor_copy_predicated(
    dst: Tile, src: Tile | float, predicate: Tile, reverse_pred: bool = False, name: str | None = None
) -> None:
    """Copy `src` where the predicate is true; leave `dst` elsewhere."""
    count("tensor_copy_predicated")
    check_on_chip(dst, "dst")
    check_on_chip(predicate, "predicate")
    check_same_layout(dst, predicate)
    if predicate.dtype not in ("uint8", "uint16", "uint32"):
        refuse("predicate-dtype", f"a {predicate.dtype} predicate", valid="uint8, uint16, uint32")
    chosen = (read_bits(predicate, "predicate") != 0) != reverse_pred
    old = read_bits(dst, "dst")
    if isinstance(src, Tile):
        check_on_chip(src, "src")
        check_same_layout(dst, src)
        if src.dtype != dst.dtype:
            refuse("predicate-dtype", f"{src.dtype} is copied into {dst.dtype}")
        if src.buffer is predicate.buffer is MemoryRegion.psum:
            refuse("both-in-psum", "src and predicate are both in PSUM")
        new: Array = read_bits(src, "src")
    else:
        new = cast(np.full(old.shape, src, np.float32), dst.dtype)
    dst.array()[...] = np.where(chosen, new, old).reshape(dst.shape)
    dst.state()[...] = WRITTEN


def iota(dst: Tile, pattern: Pattern, offset: int = 0, channel_multiplier: int = 0, name: str | None = None) -> None:
    """Write `offset + partition · channel_multiplier + Σ step·index`."""
    count("iota")
    check_sbuf(dst, "dst")
    write(dst, _affine(dst, pattern, offset, channel_multiplier))


def _affine(dst: Tile, pattern: Pattern, offset: int, channel_multiplier: int) -> Array:
    """Return the affine values of a pattern, shape (partitions, elements a partition)."""
    sizes = [int(p[1]) for p in pattern]
    if not 1 <= len(pattern) <= 4 or int(np.prod(sizes)) != dst.free_size:
        refuse("iota-pattern", f"the pattern has sizes {sizes}", value=pattern, valid=f"{dst.free_size} elements")
    values = np.zeros(1, np.int64)
    for step, num in pattern:
        values = (values[:, None] + np.arange(num, dtype=np.int64) * step).reshape(-1)
    partitions = np.arange(dst.shape[0], dtype=np.int64)[:, None] * channel_multiplier
    return (values[None, :] + partitions + offset).astype(np.int32)


def comparison(op: object, what: str) -> Operation:
    """Return a comparing operator.

    Raises:
        NkiRefused: rule `compare-op`.
    """
    found = operation(op, what, "compare-op")
    if not found.compares:
        refuse("compare-op", f"nl.{found.name} does not compare")
    return found


class _Equal:
    operator_name = "equal"


def affine_select(
    dst: Tile,
    pattern: Pattern,
    channel_multiplier: int,
    on_true_tile: Tile,
    on_false_value: float,
    cmp_op: object = _Equal,
    offset: int = 0,
    name: str | None = None,
) -> None:
    """Keep `on_true_tile` where an affine expression compares with 0, else the constant."""
    count("affine_select")
    check_sbuf(dst, "dst")
    check_sbuf(on_true_tile, "on_true_tile")
    check_same_layout(dst, on_true_tile)
    compare = comparison(cmp_op, "cmp_op")
    assert compare.binary is not None
    chosen = compare.binary(_affine(dst, pattern, offset, channel_multiplier), 0)
    kept = read_bits(on_true_tile, "on_true_tile")
    if dst.dtype != on_true_tile.dtype:
        kept = kept.astype(np.float32)
    write(dst, np.where(chosen, cast(kept, dst.dtype), cast(np.full((1, 1), on_false_value, np.float32), dst.dtype)))
