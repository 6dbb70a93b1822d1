"""`nki.isa`: the Scalar Engine's activations, their valid ranges and reduction registers; trn3's exponential."""

from __future__ import annotations

import numpy as np

from hybrid.testing.nki.dtypes import Array
from hybrid.testing.nki.enums import ReduceCmd, check_enum
from hybrid.testing.nki.generations import activation_ranges
from hybrid.testing.nki.machine import current, registers
from hybrid.testing.nki.operands import (
    check_on_chip,
    check_same_layout,
    count,
    operation,
    per_partition,
    read,
    write,
)
from hybrid.testing.nki.operators import Operation
from hybrid.testing.nki.refusal import refuse
from hybrid.testing.nki.tile import Tile


def activation(
    dst: Tile,
    op: object,
    data: Tile,
    bias: Tile | float | None = None,
    scale: Tile | float = 1.0,
    reduce_op: object = None,
    reduce_res: Tile | None = None,
    reduce_cmd: ReduceCmd = ReduceCmd.idle,
    name: str | None = None,
) -> None:
    """`dst = op(data · scale + bias)`; optionally the registers gain each partition's sum of it."""
    count("activation")
    check_on_chip(dst, "dst")
    check_on_chip(data, "data")
    check_same_layout(dst, data)
    check_enum(reduce_cmd, ReduceCmd, "reduce_cmd")
    if reduce_cmd is ReduceCmd.load_reduce:
        refuse("activation-reduce", "load_reduce on the Scalar Engine")
    function = operation(op, "op", "activation-op")
    if function.activation is None:
        refuse("activation-op", f"nl.{function.name} is no activation")
    with np.errstate(all="ignore"):
        values = read(data, "data") * per_partition(scale, data, "scale")
        if bias is not None:
            values = values + _bias(bias, data, function)
    check_range(function.name, values)
    with np.errstate(all="ignore"):
        result: Array = function.activation(values).astype(np.float32)
    write(dst, result)
    _reduce(result, reduce_op, reduce_res, reduce_cmd, data)


def _bias(bias: Tile | float, data: Tile, function: Operation) -> Array:
    g = current().generation
    if "scalar_bias" not in g.has:
        if not isinstance(bias, Tile):
            refuse("activation-bias", f"a bias that is a number on {g.name}", value=bias)
        if function.name == "reciprocal":
            refuse("activation-bias", f"reciprocal with a bias on {g.name}")
    return per_partition(bias, data, "bias", any_dtype=True)


def check_range(name: str, values: Array) -> None:
    """Refuse inputs outside an activation's documented range; NaN passes, and stays NaN.

    Raises:
        NkiRefused: rule `activation-range`.
    """
    valid = activation_ranges().get(name)
    if valid is None:
        return
    compared = np.abs(values) if valid.magnitude else values
    outside = (compared < valid.low) | (compared > valid.high)
    if outside.any():
        refuse(
            "activation-range",
            f"nl.{name} of a value outside its range",
            value=float(values[outside].flat[0]),
            valid=f"{'±' if valid.magnitude else ''}[{valid.low:.6g}, {valid.high:.6g}]",
        )


def _reduce(result: Array, reduce_op: object, reduce_res: Tile | None, reduce_cmd: ReduceCmd, data: Tile) -> None:
    machine = current()
    if reduce_op is not None and operation(reduce_op, "reduce_op").name != "add":
        refuse("activation-reduce", "reduce_op is not nl.add")
    if reduce_cmd in (ReduceCmd.reset, ReduceCmd.reset_reduce):
        machine.scalar_registers = registers()
    if reduce_cmd in (ReduceCmd.reduce, ReduceCmd.reset_reduce):
        if reduce_op is None:
            refuse("activation-reduce", f"reduce_cmd {reduce_cmd.name} without reduce_op")
        if machine.scalar_registers is None:
            refuse("reduce-registers", "the Scalar Engine's registers are reduced into before a reset")
        machine.scalar_registers[: result.shape[0]] += result.sum(axis=1, dtype=np.float32, keepdims=True)
    if reduce_res is not None:
        if machine.scalar_registers is None:
            refuse("reduce-registers", "the Scalar Engine's registers are read before a reset")
        check_on_chip(reduce_res, "reduce_res")
        if (reduce_res.shape[0], reduce_res.free_size) != (data.shape[0], 1):
            refuse("operand-vector", f"reduce_res has shape {reduce_res.shape}", valid=f"[{data.shape[0]}, 1]")
        write(reduce_res, machine.scalar_registers[: data.shape[0]])


def activation_reduce(
    dst: Tile,
    op: object,
    data: Tile,
    reduce_op: object,
    reduce_res: Tile,
    bias: Tile | float | None = None,
    scale: Tile | float = 1.0,
    name: str | None = None,
) -> None:
    """`activation` with `reset_reduce`."""
    activation(dst, op, data, bias, scale, reduce_op, reduce_res, ReduceCmd.reset_reduce, name)


def exponential(
    dst: Tile,
    src: Tile,
    max_value: Tile | float = 0.0,
    reduce_res: Tile | None = None,
    reduce_cmd: ReduceCmd = ReduceCmd.idle,
    reduce_init: Tile | float = 0.0,
    name: str | None = None,
) -> None:
    """`dst = exp(src - max_value)` on trn3's Vector Engine, with its running sum."""
    count("exponential")
    machine = current()
    machine.generation.require("exponential", "nisa.exponential")
    check_on_chip(dst, "dst")
    check_on_chip(src, "src")
    check_same_layout(dst, src)
    check_enum(reduce_cmd, ReduceCmd, "reduce_cmd")
    with np.errstate(all="ignore"):
        result = np.exp(read(src, "src") - per_partition(max_value, src, "max_value"))
    write(dst, result)
    if reduce_cmd is ReduceCmd.reset:
        refuse("reduce-registers", "exponential has no reduce_cmd reset")
    if reduce_cmd is ReduceCmd.idle:
        # The documents leave the accumulator unknown after an idle instruction.
        machine.vector_registers = None
        if reduce_res is not None:
            refuse("reduce-registers", "reduce_res with reduce_cmd idle")
        return
    if reduce_cmd is ReduceCmd.reset_reduce:
        machine.vector_registers = registers()
    elif reduce_cmd is ReduceCmd.load_reduce:
        machine.vector_registers = registers()
        machine.vector_registers[: src.shape[0]] = per_partition(reduce_init, src, "reduce_init")
    if machine.vector_registers is None:
        refuse("reduce-registers", "the Vector Engine's registers are reduced into before a reset")
    machine.vector_registers[: src.shape[0]] += result.sum(axis=1, dtype=np.float32, keepdims=True)
    if reduce_res is not None:
        check_on_chip(reduce_res, "reduce_res")
        write(reduce_res, machine.vector_registers[: src.shape[0]])
