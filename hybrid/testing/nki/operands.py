"""What instructions ask of their operands, checked in one place, and how they read and write them.

Values travel as two-dimensional arrays (partitions, elements a partition): instructions compare only these two sizes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hybrid.testing.nki.dtypes import INTEGER, Array, cast
from hybrid.testing.nki.enums import Engine, check_enum
from hybrid.testing.nki.machine import current
from hybrid.testing.nki.memory import MATMUL, WRITTEN, MemoryRegion
from hybrid.testing.nki.operators import OPERATIONS, Operation
from hybrid.testing.nki.refusal import refuse
from hybrid.testing.nki.tile import Tile


def check_tile(tile: object, what: str) -> Tile:
    """Return an operand as a tile.

    Raises:
        NkiRefused: rule `tile-shape`, where it is something else.
    """
    if not isinstance(tile, Tile):
        refuse("tile-shape", f"{what} is not a tile", value=repr(tile))
    return tile


def check_on_chip(tile: object, what: str) -> Tile:
    """Return an operand of a compute engine: in SBUF or PSUM and at a partition where an access may start.

    Raises:
        NkiRefused: rules `on-chip-only`, `start-partition`.
    """
    found = check_tile(tile, what)
    if not found.buffer.on_chip:
        refuse("on-chip-only", f"{what} is in {found.buffer.value}", value=found)
    start, count = found.start_partition, found.shape[0]
    allowed = (0,) if count > 64 else (0, 64) if count > 32 else (0, 32, 64, 96)
    if start not in allowed:
        refuse("start-partition", f"{what} starts at partition {start} with {count} partitions", valid=allowed)
    return found


def check_sbuf(tile: object, what: str) -> Tile:
    """Return an on-chip operand that must be in SBUF.

    Raises:
        NkiRefused: rule `sbuf-only`, and those of `check_on_chip`.
    """
    found = check_on_chip(tile, what)
    if found.buffer is not MemoryRegion.sbuf:
        refuse("sbuf-only", f"{what} is in {found.buffer.value}", value=found)
    return found


def check_written(tile: Tile, what: str) -> None:
    """Refuse to read what was never written (rule `uninitialised-read`)."""
    if not tile.is_written():
        refuse("uninitialised-read", f"{what} has elements that nothing wrote", value=tile)


def check_same_layout(dst: Tile, *sources: Tile) -> None:
    """Refuse operands of other partitions or other elements a partition than `dst` (rule `tile-shape`)."""
    for source in sources:
        if (source.shape[0], source.free_size) != (dst.shape[0], dst.free_size):
            refuse("tile-shape", "operands differ in partitions or elements a partition", value=(source, dst))


def check_engine(engine: Engine, allowed: tuple[Engine, ...], *tiles: Tile) -> None:
    """Refuse an engine that does not run the instruction, and GpSimd on PSUM.

    Raises:
        NkiRefused: rules `enum-not-int`, `engine-unsupported`, `gpsimd-no-psum`.
    """
    check_enum(engine, Engine, "engine")
    if engine is not Engine.unknown and engine not in allowed:
        refuse("engine-unsupported", f"the {engine.name} engine", valid=[e.name for e in allowed])
    if engine is Engine.gpsimd and any(tile.buffer is MemoryRegion.psum for tile in tiles):
        refuse("gpsimd-no-psum", "a GpSimd operand is in PSUM", value=tiles)


def operation(op: object, what: str = "op", rule: str = "alu-op") -> Operation:
    """Return the facts of an operator value.

    Raises:
        NkiRefused: `rule`.
    """
    name = getattr(op, "operator_name", None)
    if name is None or name not in OPERATIONS:
        refuse(rule, f"`{what}` is no operator of nki.language", value=repr(op), fix="pass an operator such as nl.add")
    return OPERATIONS[name]


def check_castable(tile: Tile) -> None:
    """Refuse to cast from or to the OCP e4m3 where the generation does not have it (rule `generation-lacks`)."""
    if tile.dtype == "float8_e4m3fn":
        current().generation.require("ocp_fp8", "float8_e4m3fn")


def read(tile: Tile, what: str) -> Array:
    """Return a written operand as float32, shape (partitions, elements a partition)."""
    check_written(tile, what)
    check_castable(tile)
    with np.errstate(all="ignore"):
        return tile.array().astype(np.float32).reshape(tile.shape[0], -1)


def read_bits(tile: Tile, what: str) -> Array:
    """Return a written operand in its own type, shape (partitions, elements a partition)."""
    check_written(tile, what)
    return tile.array().copy().reshape(tile.shape[0], -1)


def write(tile: Tile, values: Array, *, by_matmul: bool = False) -> None:
    """Cast `values` to the tile's type and store them."""
    check_castable(tile)
    tile.array()[...] = cast(values, tile.dtype).reshape(tile.shape)
    tile.state()[...] = WRITTEN | MATMUL if by_matmul else WRITTEN


def per_partition(operand: Any, data: Tile, what: str, *, any_dtype: bool = False) -> Array:
    """Return a scalar or a `[partitions, 1]` operand as float32 that broadcasts over a partition.

    Raises:
        NkiRefused: rules `operand-vector`, `operand-float32`.
    """
    if not isinstance(operand, Tile):
        if isinstance(operand, bool) or not isinstance(operand, int | float | np.integer | np.floating):
            refuse("operand-vector", f"{what} is neither a number nor a tile", value=repr(operand))
        with np.errstate(all="ignore"):
            return np.full((1, 1), operand, np.float32)
    check_on_chip(operand, what)
    if operand.shape[0] != data.shape[0] or operand.free_size != 1:
        refuse("operand-vector", f"{what} has shape {operand.shape}", valid=f"[{data.shape[0]}, 1]")
    if operand.dtype != "float32" and not any_dtype:
        refuse("operand-float32", f"{what} is {operand.dtype}", valid="float32")
    return read(operand, what)


def is_integer(*tiles: Tile) -> bool:
    """Return True where all tiles hold integers."""
    return all(tile.dtype in INTEGER for tile in tiles)


def count(instruction: str) -> None:
    """Count an instruction on the current machine."""
    current().count(instruction)
