"""`nki.isa`: the Vector (and GpSimd) engine's elementwise operations, reductions, scans and statistics.

Arithmetic is float32; when every tile of `tensor_tensor` holds 32-bit integers it is exact integer arithmetic.
"""

from __future__ import annotations

import numpy as np

from hybrid.testing.nki.dtypes import Array, storage_of
from hybrid.testing.nki.enums import Engine
from hybrid.testing.nki.machine import current
from hybrid.testing.nki.memory import WRITTEN, MemoryRegion
from hybrid.testing.nki.operands import (
    check_engine,
    check_on_chip,
    check_same_layout,
    count,
    is_integer,
    operation,
    per_partition,
    read,
    read_bits,
    write,
)
from hybrid.testing.nki.operators import Operation
from hybrid.testing.nki.refusal import refuse
from hybrid.testing.nki.tile import Tile

_ENGINES = (Engine.vector, Engine.gpsimd)
_WORDS = ("int32", "uint32")


def _binary(op: object, what: str) -> Operation:
    found = operation(op, what)
    if found.binary is None:
        refuse("alu-op", f"nl.{found.name} is not a binary operator")
    return found


def _apply(op: Operation, a: Array, b: Array, reverse: bool = False) -> Array:
    assert op.binary is not None
    with np.errstate(all="ignore"):
        found: Array = op.binary(b, a) if reverse else op.binary(a, b)
    return found if op.bitwise or found.dtype.kind in "iu" else found.astype(np.float32)


def _not_both_in_psum(first: Tile, second: Tile) -> None:
    if first.buffer is second.buffer is MemoryRegion.psum:
        refuse("both-in-psum", "both inputs are in PSUM", value=(first, second))


def _check_bitwise(*tiles: Tile) -> None:
    if not is_integer(*tiles):
        refuse("bitvec-integer", "a bitwise operator on tiles that are not all integers", value=tiles)


def tensor_tensor(
    dst: Tile, data1: Tile, data2: Tile, op: object, engine: Engine = Engine.unknown, name: str | None = None
) -> None:
    """`dst = data1 <op> data2`, element by element."""
    count("tensor_tensor")
    tiles = (check_on_chip(dst, "dst"), check_on_chip(data1, "data1"), check_on_chip(data2, "data2"))
    check_same_layout(dst, data1, data2)
    _not_both_in_psum(data1, data2)
    operator = _binary(op, "op")
    check_engine(engine, _ENGINES, *tiles)
    if operator.name == "power":
        check_engine(Engine.gpsimd, _ENGINES, *tiles)
    if operator.bitwise:
        _check_bitwise(*tiles)
        _store_integers(dst, _apply(operator, read_bits(data1, "data1"), read_bits(data2, "data2")))
    elif all(tile.dtype in _WORDS for tile in tiles) and engine is not Engine.vector:
        a, b = (read_bits(tile, "data").astype(np.int64) for tile in (data1, data2))
        _store_integers(dst, _apply(operator, a, b))
    else:
        write(dst, _apply(operator, read(data1, "data1"), read(data2, "data2")))


def _store_integers(dst: Tile, values: Array) -> None:
    """Store integers modulo the word, as an integer unit does."""
    dst.array()[...] = values.astype(np.int64).astype(storage_of(dst.dtype)).reshape(dst.shape)
    dst.state()[...] = WRITTEN


def tensor_scalar(
    dst: Tile,
    data: Tile,
    op0: object,
    operand0: Tile | float | None,
    reverse0: bool = False,
    op1: object = None,
    operand1: Tile | float | None = None,
    reverse1: bool = False,
    engine: Engine = Engine.unknown,
    name: str | None = None,
) -> None:
    """`dst = (data <op0> operand0) <op1> operand1` with numbers or `[partitions, 1]` operands."""
    count("tensor_scalar")
    check_on_chip(dst, "dst")
    check_on_chip(data, "data")
    check_same_layout(dst, data)
    check_engine(engine, (Engine.vector, Engine.scalar, Engine.gpsimd), dst, data)
    first = operation(op0, "op0")
    second = None if op1 is None else operation(op1, "op1")
    if second is None and operand1 is not None:
        refuse("unary-operand", "operand1 without op1")
    if second is not None and first.bitwise != second.bitwise:
        refuse("alu-op-kinds", f"nl.{first.name} with nl.{second.name}")
    if engine is Engine.scalar:
        _check_scalar_engine(first, second)
    if first.bitwise:
        _check_bitwise(dst, data)
        values: Array = read_bits(data, "data")
    else:
        values = read(data, "data")
    values = _step(first, values, operand0, data, reverse0, "operand0")
    if second is not None:
        values = _step(second, values, operand1, data, reverse1, "operand1")
    if first.bitwise:
        _store_integers(dst, values)
    else:
        write(dst, values)


def _check_scalar_engine(first: Operation, second: Operation | None) -> None:
    names = (first.name, None if second is None else second.name)
    if names not in (("multiply", "add"), ("multiply", None), ("add", None)):
        refuse("scalar-engine-ops", f"the Scalar Engine with {names}")


def _step(op: Operation, values: Array, operand: Tile | float | None, data: Tile, reverse: bool, what: str) -> Array:
    """Apply one operator of tensor_scalar."""
    if op.binary is None:
        if op.unary is None:
            refuse("alu-op", f"nl.{op.name} is an activation, not a vector operator", fix="use nisa.activation")
        if operand is not None and (isinstance(operand, Tile) or operand != 0):
            refuse("unary-operand", f"nl.{op.name} with {what}", value=repr(operand))
        with np.errstate(all="ignore"):
            found: Array = op.unary(values)
        return found
    if operand is None:
        refuse("operand-vector", f"nl.{op.name} without {what}")
    if op.bitwise:
        if isinstance(operand, Tile) or not isinstance(operand, int):
            refuse("bitvec-integer", f"{what} of a bitwise operator is not an integer", value=repr(operand))
        return _apply(op, values, np.asarray(operand).astype(values.dtype), reverse)
    return _apply(op, values, per_partition(operand, data, what), reverse)


def scalar_tensor_tensor(
    dst: Tile,
    data: Tile,
    op0: object,
    operand0: Tile | float,
    op1: object,
    operand1: Tile,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> None:
    """`dst = (data <op0> operand0) <op1> operand1` where operand1 is a whole tile."""
    count("scalar_tensor_tensor")
    for tile, what in ((dst, "dst"), (data, "data"), (operand1, "operand1")):
        check_on_chip(tile, what)
    check_same_layout(dst, data, operand1)
    _not_both_in_psum(data, operand1)
    first, second = _binary(op0, "op0"), _binary(op1, "op1")
    if first.bitwise or second.bitwise:
        refuse("alu-op", "a bitwise operator in scalar_tensor_tensor")
    values = _apply(first, read(data, "data"), per_partition(operand0, data, "operand0"), reverse0)
    write(dst, _apply(second, values, read(operand1, "operand1"), reverse1))


def tensor_reduce(
    dst: Tile,
    op: object,
    data: Tile,
    axis: int | tuple[int, ...] | list[int],
    negate: bool = False,
    keepdims: bool = False,
    name: str | None = None,
) -> None:
    """Reduce the last free dimensions of `data`."""
    count("tensor_reduce")
    check_on_chip(dst, "dst")
    check_on_chip(data, "data")
    operator = operation(op)
    if not operator.reduces:
        refuse("reduce-op", f"nl.{operator.name} is no legal reduction")
    axes = sorted(a % data.ndim for a in ((axis,) if isinstance(axis, int) else tuple(axis)))
    if not axes or axes[0] == 0 or axes != list(range(axes[0], data.ndim)):
        refuse("reduce-axis", f"axes {axes} of a tile of {data.ndim} dimensions")
    kept = data.shape[: axes[0]]
    if dst.shape[0] != data.shape[0] or dst.size != int(np.prod(kept)):
        refuse("tile-shape", f"the reduction of {data.shape} over {axes} into {dst.shape}")
    if operator.bitwise:
        _check_bitwise(dst, data)
        values = read_bits(data, "data")
    else:
        values = read(data, "data")
    result = reduce_last(operator, values.reshape(*kept, -1))
    if operator.bitwise:
        _store_integers(dst, result)
    else:
        write(dst, -result if negate else result)


def reduce_last(op: Operation, values: Array) -> Array:
    """Reduce the last dimension, in float32 for arithmetic operators."""
    with np.errstate(all="ignore"):
        if op.name == "add":
            total: Array = values.sum(axis=-1, dtype=np.float32)
            return total
        found: Array = values[..., 0]
        for index in range(1, values.shape[-1]):
            found = _apply(op, found, values[..., index])
        return found


def reciprocal(dst: Tile, data: Tile, name: str | None = None) -> None:
    """`dst = 1 / data` on the Vector Engine."""
    count("reciprocal")
    check_on_chip(dst, "dst")
    check_on_chip(data, "data")
    check_same_layout(dst, data)
    with np.errstate(all="ignore"):
        write(dst, np.float32(1.0) / read(data, "data"))


def tensor_tensor_scan(
    dst: Tile,
    data0: Tile,
    data1: Tile,
    initial: Tile | float,
    op0: object,
    op1: object,
    reverse0: bool = False,
    reverse1: bool = False,
    name: str | None = None,
) -> None:
    """`dst[:, i] = (data0[:, i] <op0> dst[:, i-1]) <op1> data1[:, i]`, from `initial`."""
    count("tensor_tensor_scan")
    for tile, what in ((dst, "dst"), (data0, "data0"), (data1, "data1")):
        check_on_chip(tile, what)
    check_same_layout(dst, data0, data1)
    _not_both_in_psum(data0, data1)
    first, second = _binary(op0, "op0"), _binary(op1, "op1")
    if first.bitwise or second.bitwise:
        refuse("alu-op", "a bitwise operator in a scan")
    a, b = read(data0, "data0"), read(data1, "data1")
    state = np.broadcast_to(per_partition(initial, data0, "initial", any_dtype=True), (a.shape[0], 1))[:, 0]
    result = np.empty_like(a)
    for i in range(a.shape[1]):
        state = _apply(second, _apply(first, a[:, i], state, reverse0), b[:, i], reverse1)
        result[:, i] = state
    write(dst, result)


def bn_stats(dst: Tile, data: Tile, name: str | None = None) -> None:
    """Write count, mean and count × variance of the even and of the odd elements."""
    count("bn_stats")
    check_on_chip(dst, "dst")
    check_on_chip(data, "data")
    limit = current().generation.bn_stats_fmax
    if data.free_size > limit or dst.free_size != 6 or dst.shape[0] != data.shape[0]:
        refuse("bn-size", f"bn_stats of {data.shape} into {dst.shape}", valid=f"at most {limit} into 6")
    values = read(data, "data")
    columns: list[Array] = []
    for part in (values[:, 0::2], values[:, 1::2]):
        n = part.shape[1]
        mean = part.mean(axis=1, dtype=np.float32) if n else np.zeros(part.shape[0], np.float32)
        spread = ((part - mean[:, None]) ** 2).sum(axis=1, dtype=np.float32)
        columns += [np.full(part.shape[0], n, np.float32), mean, spread]
    write(dst, np.stack(columns, axis=1))


def bn_aggr(dst: Tile, data: Tile, name: str | None = None) -> None:
    """Write mean and variance from (count, mean, count × variance) triples."""
    count("bn_aggr")
    check_on_chip(dst, "dst")
    check_on_chip(data, "data")
    if data.free_size % 3 or dst.free_size != 2 or dst.shape[0] != data.shape[0]:
        refuse("bn-size", f"bn_aggr of {data.shape} into {dst.shape}", valid="triples into 2")
    triples = read(data, "data").reshape(data.shape[0], -1, 3)
    n, mean, spread = triples[..., 0], triples[..., 1], triples[..., 2]
    total = n.sum(axis=1)
    overall = (n * mean).sum(axis=1) / total
    variance = (spread + n * (mean - overall[:, None]) ** 2).sum(axis=1) / total
    write(dst, np.stack([overall, variance], axis=1))
