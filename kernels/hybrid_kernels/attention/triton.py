"""Causal grouped-query attention in Triton: online softmax, the scores never leave the chip.

Backward in two kernels without atomics: one walks the keys for a block of queries, one walks the queries, of every
head of a group, for a block of keys; so the sums have one order on every GPU. Letters as in `ref`. May import only
torch, triton and this package's own modules.

Source: Dao 2023, "FlashAttention-2".
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc"
# ruff: noqa: N803 - compile-time constants are in capitals, as everywhere in Triton

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_kernels.triton_launch import Specimen, handed, result_like


@triton.jit
def _load(base, rows, columns, length, size):
    """Load rows of (S, D), zeros outside."""
    inside = (rows[:, None] < length) & (columns[None, :] < size)
    return tl.load(base + rows[:, None] * size + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _store(base, rows, columns, length, size, values):
    inside = (rows[:, None] < length) & (columns[None, :] < size)
    tl.store(base + rows[:, None] * size + columns[None, :], values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _forward(
    query, key, value, out, logsumexp, length, size, heads, group, scale, ROWS: tl.constexpr, SIZE: tl.constexpr
):
    plane = tl.program_id(1).to(tl.int64)
    kv_plane = plane // heads * (heads // group) + plane % heads // group
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    q = _load(query + plane * length * size, rows, columns, length, size)
    largest = tl.full([ROWS], -float("inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    sums = tl.zeros([ROWS, SIZE], dtype=tl.float32)
    for first in range(0, (tl.program_id(0) + 1) * ROWS, ROWS):
        keys = first + tl.arange(0, ROWS)
        k = _load(key + kv_plane * length * size, keys, columns, length, size)
        v = _load(value + kv_plane * length * size, keys, columns, length, size)
        # ieee: TF32 would round float32 operands to ten bits.
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] < length)
        scores = tl.where(seen, scores, -float("inf"))
        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp(scores - larger[:, None])
        rescale = tl.exp(largest - larger)
        total = total * rescale + tl.sum(weights, axis=1)
        sums = sums * rescale[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        largest = larger
    _store(out + plane * length * size, rows, columns, length, size, sums / total[:, None])
    tl.store(logsumexp + plane * length + rows, largest + tl.log(total), mask=rows < length)


@triton.jit
def _weights(q, k, rows, keys, row_logsumexp, length, scale):
    """Return the attention weights of a tile again, from the rows' logsumexp."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    seen = (keys[None, :] <= rows[:, None]) & (keys[None, :] < length) & (rows[:, None] < length)
    return tl.exp(tl.where(seen, scores - row_logsumexp[:, None], -float("inf")))


@triton.jit
def _backward_query(
    grad_out, query, key, value, logsumexp, row_sums, grad_query, length, size, heads, group, scale,
    ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(1).to(tl.int64)
    kv_plane = plane // heads * (heads // group) + plane % heads // group
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    q = _load(query + plane * length * size, rows, columns, length, size)
    grad = _load(grad_out + plane * length * size, rows, columns, length, size)
    row_logsumexp = tl.load(logsumexp + plane * length + rows, mask=rows < length, other=0.0)
    row_sum = tl.load(row_sums + plane * length + rows, mask=rows < length, other=0.0)
    sums = tl.zeros([ROWS, SIZE], dtype=tl.float32)
    for first in range(0, (tl.program_id(0) + 1) * ROWS, ROWS):
        keys = first + tl.arange(0, ROWS)
        k = _load(key + kv_plane * length * size, keys, columns, length, size)
        v = _load(value + kv_plane * length * size, keys, columns, length, size)
        weights = _weights(q, k, rows, keys, row_logsumexp, length, scale)
        grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        grad_scores = weights * (grad_weights - row_sum[:, None]) * scale
        sums += tl.dot(grad_scores.to(k.dtype), k, input_precision="ieee")
    _store(grad_query + plane * length * size, rows, columns, length, size, sums)


@triton.jit
def _backward_key_value(
    grad_out, query, key, value, logsumexp, row_sums, grad_key, grad_value, length, size, heads, group, scale,
    ROWS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    kv_plane = tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    keys, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SIZE)
    k = _load(key + kv_plane * length * size, keys, columns, length, size)
    v = _load(value + kv_plane * length * size, keys, columns, length, size)
    key_sums = tl.zeros([ROWS, SIZE], dtype=tl.float32)
    value_sums = tl.zeros([ROWS, SIZE], dtype=tl.float32)
    for member in range(group):
        plane = kv_plane // kv_heads * heads + kv_plane % kv_heads * group + member
        for first in range(tl.program_id(0) * ROWS, length, ROWS):
            rows = first + tl.arange(0, ROWS)
            q = _load(query + plane * length * size, rows, columns, length, size)
            grad = _load(grad_out + plane * length * size, rows, columns, length, size)
            row_logsumexp = tl.load(logsumexp + plane * length + rows, mask=rows < length, other=0.0)
            row_sum = tl.load(row_sums + plane * length + rows, mask=rows < length, other=0.0)
            weights = _weights(q, k, rows, keys, row_logsumexp, length, scale)
            value_sums += tl.dot(tl.trans(weights).to(grad.dtype), grad, input_precision="ieee")
            grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
            grad_scores = weights * (grad_weights - row_sum[:, None]) * scale
            key_sums += tl.dot(tl.trans(grad_scores).to(q.dtype), q, input_precision="ieee")
    _store(grad_key + kv_plane * length * size, keys, columns, length, size, key_sums)
    _store(grad_value + kv_plane * length * size, keys, columns, length, size, value_sums)


def attention_with_logsumexp(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """See `ref.attention_with_logsumexp`."""
    out = result_like(query)
    logsumexp = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
    if query.numel():
        shape, blocks = _shape(query, key), _blocks(query, backward=False)
        operands = (handed(query), handed(key), handed(value))
        _forward[_grid(query, blocks)](*operands, out, logsumexp, *shape, scale, **blocks)
    return out.to(query.dtype), logsumexp


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `ref.attention_backward`."""
    grads = result_like(query), result_like(key), result_like(value)
    if query.numel():
        row_sums = (grad_out.float() * out.float()).sum(dim=-1)
        operands = (handed(grad_out), handed(query), handed(key), handed(value), logsumexp, row_sums)
        shape, blocks = _shape(query, key), _blocks(query, backward=True)
        _backward_query[_grid(query, blocks)](*operands, grads[0], *shape, scale, **blocks)
        _backward_key_value[_grid(key, blocks)](*operands, *grads[1:], *shape, scale, **blocks)
    return grads[0].to(query.dtype), grads[1].to(key.dtype), grads[2].to(value.dtype)


def _shape(query: Tensor, key: Tensor) -> tuple[int, int, int, int]:
    """Return (S, D, Q, Q/K)."""
    return query.shape[2], query.shape[3], query.shape[1], query.shape[1] // key.shape[1]


def _blocks(query: Tensor, *, backward: bool) -> dict[str, int]:
    """Return the tile: square, so that only the last one meets the diagonal, and small enough not to spill."""
    size = max(16, triton.next_power_of_2(query.shape[3]))
    return {"ROWS": 32 if backward or size > 64 else 64, "SIZE": size}


def _grid(x: Tensor, blocks: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(x.shape[2], blocks["ROWS"]), x.shape[0] * x.shape[1]


_OPERANDS = ("query", "key", "value")
_SHAPE = {**dict.fromkeys(("length", "size", "heads", "group"), "i32"), "scale": "fp32"}


def _specimens(dtype: str, size: int, rows: int, rows_backward: int) -> tuple[Specimen, ...]:
    element, single = f"*{dtype}", "*fp32"
    suffix = f"{dtype} D={size}"
    operands = dict.fromkeys(("grad_out", *_OPERANDS), element) | {"logsumexp": single, "row_sums": single}
    forward = {**dict.fromkeys((*_OPERANDS, "out"), element), "logsumexp": single, **_SHAPE}
    by_query = {**operands, "grad_query": element, **_SHAPE}
    by_key = {**operands, "grad_key": element, "grad_value": element, **_SHAPE}
    return tuple(
        Specimen(
            name=f"attention {name} {suffix}",
            kernel=kernel,
            signature=signature,
            constants={"ROWS": tile, "SIZE": size},
        )
        for name, kernel, signature, tile in (
            ("forward", _forward, forward, rows),
            ("backward query", _backward_query, by_query, rows_backward),
            ("backward key value", _backward_key_value, by_key, rows_backward),
        )
    )


SPECIMENS = (*_specimens("bf16", 64, 64, 32), *_specimens("bf16", 128, 32, 32))
