"""`nki.language`: creation, ranges, and the convenience functions, which are made of instructions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np

from hybrid.testing.nki.dtypes import STORAGE, Array
from hybrid.testing.nki.isa_move import dma_copy, memset, tensor_copy
from hybrid.testing.nki.isa_scalar import activation
from hybrid.testing.nki.isa_tensor import nc_matmul, nc_transpose
from hybrid.testing.nki.isa_vector import tensor_reduce, tensor_scalar, tensor_tensor
from hybrid.testing.nki.machine import current
from hybrid.testing.nki.memory import MemoryRegion
from hybrid.testing.nki.operands import check_tile
from hybrid.testing.nki.operators import OPERATIONS
from hybrid.testing.nki.refusal import refuse
from hybrid.testing.nki.tile import DynamicSlice, Tile

sbuf, psum = MemoryRegion.sbuf, MemoryRegion.psum
private_hbm, shared_hbm = MemoryRegion.private_hbm, MemoryRegion.shared_hbm


class NKIObject:
    """Base class of the classes that a kernel may declare."""


class UnaryOperator:
    """An operator of one operand: a value for `op=`, or a function of a tile."""

    def __init__(self, name: str) -> None:
        self.operator_name = name

    def __call__(self, x: Tile, dtype: str | None = None) -> Tile:
        """Return `op(x)` as a new SBUF tile."""
        check_tile(x, "x")
        operation = OPERATIONS[self.operator_name]
        if self.operator_name == "rsqrt" and x.buffer is psum:
            refuse("gpsimd-no-psum", "nl.rsqrt of a PSUM tile", fix="use nisa.activation with op=nl.rsqrt")
        out = current().allocate(x.shape, dtype or x.dtype, sbuf)
        if operation.unary is not None:
            tensor_scalar(out, x, self, None)
        elif self.operator_name == "copy":
            tensor_copy(out, x)
        else:
            activation(out, self, x)
        return out

    def __repr__(self) -> str:
        return f"nl.{self.operator_name}"


class BinaryOperator:
    """An operator of two operands: a value for `op=`, or a function of a tile and a tile or number."""

    def __init__(self, name: str) -> None:
        self.operator_name = name

    def __call__(self, x: Tile | float, y: Tile | float, dtype: str | None = None) -> Tile:
        """Return `x op y` as a new SBUF tile; a number or a `[partitions, 1]` tile spreads over the partition."""
        if isinstance(x, Tile):
            out = current().allocate(x.shape, dtype or x.dtype, sbuf)
            if isinstance(y, Tile) and y.shape == x.shape:
                tensor_tensor(out, x, y, self)
            else:
                tensor_scalar(out, x, self, y)
            return out
        tile = check_tile(y, "y")
        out = current().allocate(tile.shape, dtype or tile.dtype, sbuf)
        tensor_scalar(out, tile, self, x, reverse0=True)
        return out

    def __repr__(self) -> str:
        return f"nl.{self.operator_name}"


@final
class TileSize:
    """`nl.tile_size`: the constants of the current generation."""

    pmax = property(lambda self: current().generation.partitions)
    psum_fmax = property(lambda self: current().generation.psum_bank_bytes // 4)
    psum_bank_fmax = psum_fmax
    psum_bank_fmax_bytes = property(lambda self: current().generation.psum_bank_bytes)
    psum_num_banks = property(lambda self: current().generation.psum_banks)
    gemm_stationary_fmax = property(lambda self: current().generation.stationary_free_max)
    gemm_moving_fmax = property(lambda self: current().generation.gemm_moving_fmax)
    bn_stats_fmax = property(lambda self: current().generation.bn_stats_fmax)
    sbuf_fmax_bytes = property(lambda self: current().generation.sbuf_partition_bytes)
    sbuf_fmax = property(lambda self: current().generation.sbuf_partition_bytes // 4)
    total_available_sbuf_size = sbuf_fmax_bytes
    sbuf_size_bytes = property(lambda self: current().generation.sbuf_partition_bytes * current().generation.partitions)


Shape = tuple[int, ...]


def ndarray(shape: Shape, dtype: str, buffer: MemoryRegion = sbuf, name: str = "", address: object = None) -> Tile:
    """Return a tile of undefined content."""
    if address is not None:
        refuse("manual-address", "nl.ndarray with an address", value=address)
    return current().allocate(shape, dtype, buffer, name)


def zeros(shape: Shape, dtype: str, buffer: MemoryRegion = sbuf, name: str = "") -> Tile:
    """Return a tile of zeros."""
    return current().zero_filled(shape, dtype, buffer, name)


def full(shape: Shape, fill_value: float, dtype: str, buffer: MemoryRegion = sbuf, name: str = "") -> Tile:
    """Return a tile of one value."""
    tile = current().allocate(shape, dtype, buffer, name)
    memset(tile, fill_value)
    return tile


def ones(shape: Shape, dtype: str, buffer: MemoryRegion = sbuf, name: str = "") -> Tile:
    """Return a tile of ones."""
    return full(shape, 1, dtype, buffer, name)


def zeros_like(x: Tile, dtype: str | None = None, buffer: MemoryRegion | None = None, name: str = "") -> Tile:
    """Return zeros of a tile's shape."""
    return zeros(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def empty_like(x: Tile, dtype: str | None = None, buffer: MemoryRegion | None = None, name: str = "") -> Tile:
    """Return an undefined tile of a tile's shape."""
    return ndarray(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def shared_identity_matrix(n: int, dtype: str = "uint8", dst: Tile | None = None) -> Tile:
    """Return the identity of n rows in SBUF."""
    tile = dst if dst is not None else current().allocate((n, n), dtype, sbuf)
    tile.storage.state[:] = 1
    tile.array()[...] = np.eye(n, dtype=np.float32).astype(STORAGE[tile.dtype])
    return tile


def shared_constant(constant: Array | str) -> Tile:
    """Return constant data in shared HBM."""
    data = np.load(Path(constant)) if isinstance(constant, str) else constant
    tile = current().argument(data)
    tile.storage.region = shared_hbm
    return tile


def load(src: Tile, dtype: str | None = None) -> Tile:
    """Return an SBUF copy of an HBM tile."""
    tile = ndarray(src.shape, dtype or src.dtype)
    dma_copy(tile, src)
    return tile


def store(dst: Tile, value: Tile) -> None:
    """Copy an SBUF tile to HBM."""
    dma_copy(dst, value)


def broadcast_to(x: Tile, shape: Shape, dtype: str | None = None) -> Tile:
    """Return a tile of `shape` that repeats the dimensions of size one."""
    if len(shape) != x.ndim or any(n not in (1, m) for n, m in zip(x.shape, shape, strict=True)):
        refuse("broadcast-size-1", f"{x.shape} to {shape}")
    if tuple(shape) == x.shape and dtype in (None, x.dtype):
        return x
    out = ndarray(shape, dtype or x.dtype)
    spread = x.array()
    copied = current().allocate(shape, x.dtype, private_hbm)
    copied.array()[...] = np.broadcast_to(spread, shape)
    copied.state()[...] = np.broadcast_to(x.state(), (*shape, x.itemsize))
    dma_copy(out, copied)
    return out


def expand_dims(x: Tile, axis: int) -> Tile:
    """Return a view with a dimension of size one more."""
    return x.expand_dim(axis)


def transpose(x: Tile, dtype: str | None = None) -> Tile:
    """Return the transposed 2-D tile, in PSUM."""
    out = ndarray((x.shape[1], x.shape[0]), dtype or x.dtype, psum)
    nc_transpose(out, x)
    return out


def matmul(x: Tile, y: Tile, transpose_x: bool = False) -> Tile:
    """Return `x @ y` (or `x.T @ y`) in PSUM."""
    if not transpose_x:
        turned = transpose(x)
        x = ndarray(turned.shape, turned.dtype)
        tensor_copy(x, turned)
    out = ndarray((x.shape[1], y.shape[1]), "float32", psum)
    nc_matmul(out, x, y)
    return out


def _reduce(op: str, x: Tile, axis: Any, dtype: str | None, keepdims: bool) -> Tile:
    axes = [a % x.ndim for a in ((axis,) if isinstance(axis, int) else axis)]
    kept = tuple(1 if d in axes else n for d, n in enumerate(x.shape) if keepdims or d not in axes)
    shape = kept if len(kept) > 1 else (*kept, 1)
    out = ndarray(shape, dtype or x.dtype)
    tensor_reduce(out, BinaryOperator(op), x, tuple(axes), keepdims=keepdims)
    return out


def sum(x: Tile, axis: Any, dtype: str | None = None, keepdims: bool = False) -> Tile:
    """Return the sum over free dimensions."""
    return _reduce("add", x, axis, dtype, keepdims)


def max(x: Tile, axis: Any, dtype: str | None = None, keepdims: bool = False) -> Tile:
    """Return the maximum over free dimensions."""
    return _reduce("maximum", x, axis, dtype, keepdims)


def min(x: Tile, axis: Any, dtype: str | None = None, keepdims: bool = False) -> Tile:
    """Return the minimum over free dimensions."""
    return _reduce("minimum", x, axis, dtype, keepdims)


def ds(start: int, size: int) -> DynamicSlice:
    """Return a slice by start and size."""
    return DynamicSlice(start, size)


def affine_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Return a range; loops unroll."""
    return range(start) if stop is None else range(start, stop, step)


def sequential_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Return a range; loops unroll."""
    return affine_range(start, stop, step)


def static_range(start: int, stop: int | None = None, step: int = 1) -> range:
    """Return a range; loops unroll."""
    return affine_range(start, stop, step)


def program_id(axis: int = 0) -> int:
    """Return 0: one core is interpreted."""
    return 0


def num_programs(axes: int = 0) -> int:
    """Return 1: one core is interpreted."""
    return 1


def program_ndim() -> int:
    """Return 0: there is no launch grid."""
    return 0


def device_print(print_prefix: str, tensor: Tile) -> None:
    """Print a tile's values."""
    print(print_prefix, tensor.array())


@contextmanager
def no_reorder() -> Iterator[None]:
    """Do nothing: the interpreter keeps program order."""
    yield


def is_hbm(buffer: MemoryRegion) -> bool:
    """Return True for an HBM region."""
    return not buffer.on_chip


def is_on_chip(buffer: MemoryRegion) -> bool:
    """Return True for SBUF and PSUM."""
    return buffer.on_chip


def is_psum(buffer: MemoryRegion) -> bool:
    """Return True for PSUM."""
    return buffer is psum


def is_sbuf(buffer: MemoryRegion) -> bool:
    """Return True for SBUF."""
    return buffer is sbuf


def operators() -> dict[str, UnaryOperator | BinaryOperator]:
    """Return the operator values, by name."""
    return {
        name: UnaryOperator(name) if row.binary is None else BinaryOperator(name) for name, row in OPERATIONS.items()
    }
