"""Causal grouped-query attention on a NeuronCore, with the softmax kept online: scores exist as one tile of 128 × 128.

Letters: B batch, Q query heads, K key-value heads (Q is a multiple of K), S positions, D head size (at most 512). May
import only nki and torch; written for NKI 0.6. Executed only by an interpreter of a documented NKI subset, never on a
Trainium.
"""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl
import torch
from torch import Tensor

LOWEST = -3.0e38
"""A masked score: its exponential against any score is 0."""


def attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Return the attention (B, Q, S, D); see `ref.attention`."""
    return attention_with_logsumexp(query, key, value, scale=scale)[0]


def attention_with_logsumexp(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Return the attention and the logsumexp of its scores; see `ref.attention_with_logsumexp`."""
    if query.numel() == 0:
        return torch.empty_like(query), torch.empty(query.shape[:3], device=query.device)
    out, logsumexp = attention_kernel(_heads(query), _heads(key), _heads(value), _group(query, key), scale)
    return out.reshape(query.shape), logsumexp.reshape(query.shape[:3])


def attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor | None = None,
    logsumexp: Tensor | None = None,
    *,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; see `ref.attention_backward`."""
    if query.numel() == 0:
        return torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    if out is None or logsumexp is None:
        out, logsumexp = attention_with_logsumexp(query, key, value, scale=scale)
    column = logsumexp.reshape(-1, query.shape[2], 1)
    heads = (_heads(grad_out), _heads(query), _heads(key), _heads(value), _heads(out), column)
    group = _group(query, key)
    grad_query = query_gradient_kernel(*heads, group, scale)
    grad_key, grad_value = key_value_gradient_kernel(*heads, group, scale)
    return grad_query.reshape(query.shape), grad_key.reshape(key.shape), grad_value.reshape(value.shape)


def _heads(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def _group(query: Tensor, key: Tensor) -> int:
    # Heads of all samples in one row: query head h reads key-value head h // group, sample by sample.
    return query.shape[1] // key.shape[1]


def load(source: nl.NkiTensor, head: int, first: int, rows: int) -> nl.NkiTensor:
    """Return positions of a head as float32, (rows, D)."""
    tile = nl.ndarray((rows, source.shape[2]), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=source[head, first : first + rows, :])
    return tile


def turn(tile: nl.NkiTensor) -> nl.NkiTensor:
    """Return the transpose of a tile of at most 128 × 128, in SBUF."""
    rows, columns = tile.shape
    crossed = nl.ndarray((columns, rows), dtype=nl.float32, buffer=nl.psum)
    turned = nl.ndarray((columns, rows), dtype=nl.float32, buffer=nl.sbuf)
    nisa.nc_transpose(dst=crossed, data=tile, engine=nisa.engine.tensor)
    nisa.tensor_copy(dst=turned, src=crossed)
    return turned


def turn_features(tile: nl.NkiTensor) -> list[nl.NkiTensor]:
    """Return the transpose of a tile (rows, D) as tiles of at most 128 features each."""
    pmax = nl.tile_size.pmax
    turned = []
    for start in range(0, tile.shape[1], pmax):
        turned.append(turn(tile[:, start : min(start + pmax, tile.shape[1])]))
    return turned


def dot(left_t: list[nl.NkiTensor], right_t: list[nl.NkiTensor]) -> nl.NkiTensor:
    """Return left @ right.T from the transposes of both, in PSUM."""
    product = nl.ndarray((left_t[0].shape[1], right_t[0].shape[1]), dtype=nl.float32, buffer=nl.psum)
    for i in range(len(left_t)):
        nisa.nc_matmul(dst=product, stationary=left_t[i], moving=right_t[i], accumulate=(i > 0))
    return product


def masked_scores(
    query_t: list[nl.NkiTensor], key_t: list[nl.NkiTensor], query_first: int, key_first: int, scale: float
) -> nl.NkiTensor:
    """Return scale * query @ key.T with later positions at LOWEST, (queries, keys) in SBUF."""
    product = dot(query_t, key_t)
    rows, columns = product.shape
    scores = nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=scores, data=product, op0=nl.multiply, operand0=scale)
    if key_first + columns - 1 > query_first:
        nisa.affine_select(
            dst=scores,
            pattern=[[-1, columns]],
            channel_multiplier=1,
            on_true_tile=scores,
            on_false_value=LOWEST,
            cmp_op=nl.greater_equal,
            offset=query_first - key_first,
        )
    return scores


def add_matmul(sums: nl.NkiTensor, stationary: nl.NkiTensor, moving: nl.NkiTensor) -> None:
    """Add stationary.T @ moving to sums, which are in SBUF."""
    product = nl.ndarray(sums.shape, dtype=nl.float32, buffer=nl.psum)
    nisa.nc_matmul(dst=product, stationary=stationary, moving=moving)
    nisa.tensor_tensor(dst=sums, data1=sums, data2=product, op=nl.add)


def zeros(rows: int, columns: int) -> nl.NkiTensor:
    """Return a tile of zeros in float32."""
    tile = nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.memset(dst=tile, value=0.0)
    return tile


def store(target: nl.NkiTensor, head: int, first: int, tile: nl.NkiTensor) -> None:
    """Write a tile (rows, D) to positions of a head, in the target's format."""
    rows, columns = tile.shape
    narrow = nl.ndarray((rows, columns), dtype=target.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=narrow, src=tile)
    nisa.dma_copy(dst=target[head, first : first + rows, :], src=narrow)


@nki.jit  # type: ignore[untyped-decorator]
def attention_kernel(
    query: nl.NkiTensor, key: nl.NkiTensor, value: nl.NkiTensor, group: int, scale: float
) -> tuple[nl.NkiTensor, nl.NkiTensor]:
    """Return the attention (B·Q, S, D) and its logsumexp (B·Q, S, 1); key and value (B·K, S, D), group = Q / K."""
    num_heads, length, size = query.shape
    pmax = nl.tile_size.pmax
    out = nl.ndarray((num_heads, length, size), dtype=query.dtype, buffer=nl.shared_hbm)
    logsumexp = nl.ndarray((num_heads, length, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    for head in range(num_heads):
        for first in range(0, length, pmax):
            rows = min(pmax, length - first)
            query_t = turn_features(load(query, head, first, rows))
            highest = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.memset(dst=highest, value=LOWEST)
            total, sums = zeros(rows, 1), zeros(rows, size)
            for start in range(0, first + rows, pmax):
                columns = min(pmax, length - start)
                key_t = turn_features(load(key, head // group, start, columns))
                scores = masked_scores(query_t, key_t, first, start, scale)
                weights = weigh(scores, highest, total, sums)
                add_matmul(sums, turn(weights), load(value, head // group, start, columns))
            inverse = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
            lse = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
            nisa.reciprocal(dst=inverse, data=total)
            nisa.tensor_scalar(dst=sums, data=sums, op0=nl.multiply, operand0=inverse)
            # The sum is at least 1, the exponential of the largest score: inside the logarithm's valid range.
            nisa.activation(dst=lse, op=nl.log, data=total)
            nisa.tensor_tensor(dst=lse, data1=lse, data2=highest, op=nl.add)
            store(out, head, first, sums)
            store(logsumexp, head, first, lse)
    return out, logsumexp


def weigh(scores: nl.NkiTensor, highest: nl.NkiTensor, total: nl.NkiTensor, sums: nl.NkiTensor) -> nl.NkiTensor:
    """Return the exponentials of the scores; rescale the running total and sums to the new largest score."""
    rows, columns = scores.shape
    new_highest = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    below = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    shrink = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    part = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    weights = nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=new_highest, op=nl.maximum, data=scores, axis=1)
    nisa.tensor_tensor(dst=new_highest, data1=new_highest, data2=highest, op=nl.maximum)
    nisa.tensor_scalar(dst=below, data=new_highest, op0=nl.multiply, operand0=-1.0)
    nisa.activation(dst=shrink, op=nl.exp, data=highest, bias=below)
    nisa.activation(
        dst=weights,
        op=nl.exp,
        data=scores,
        bias=below,
        reduce_op=nl.add,
        reduce_res=part,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    nisa.scalar_tensor_tensor(dst=total, data=total, op0=nl.multiply, operand0=shrink, op1=nl.add, operand1=part)
    nisa.tensor_scalar(dst=sums, data=sums, op0=nl.multiply, operand0=shrink)
    nisa.tensor_copy(dst=highest, src=new_highest)
    return weights


def row_sums(grad_out: nl.NkiTensor, out: nl.NkiTensor) -> nl.NkiTensor:
    """Return the sum over features of grad_out * out, (rows, 1)."""
    rows, columns = out.shape
    product = nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.sbuf)
    sums = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=product, data1=grad_out, data2=out, op=nl.multiply)
    nisa.tensor_reduce(dst=sums, op=nl.add, data=product, axis=1)
    return sums


def softmax_of(scores: nl.NkiTensor, logsumexp: nl.NkiTensor) -> nl.NkiTensor:
    """Return exp(scores - logsumexp), of the scores' shape."""
    rows, columns = scores.shape
    below = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    weights = nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=below, data=logsumexp, op0=nl.multiply, operand0=-1.0)
    nisa.activation(dst=weights, op=nl.exp, data=scores, bias=below)
    return weights


def score_gradients(
    weights: nl.NkiTensor,
    grad_out_t: list[nl.NkiTensor],
    value_t: list[nl.NkiTensor],
    sums: nl.NkiTensor,
    scale: float,
) -> nl.NkiTensor:
    """Return scale * weights * (grad_out @ value.T - row sums), of the weights' shape."""
    rows, columns = weights.shape
    grad = nl.ndarray((rows, columns), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(
        dst=grad, data=dot(grad_out_t, value_t), op0=nl.subtract, operand0=sums, op1=nl.multiply, operand1=scale
    )
    nisa.tensor_tensor(dst=grad, data1=grad, data2=weights, op=nl.multiply)
    return grad


@nki.jit  # type: ignore[untyped-decorator]
def query_gradient_kernel(
    grad_out: nl.NkiTensor,
    query: nl.NkiTensor,
    key: nl.NkiTensor,
    value: nl.NkiTensor,
    out: nl.NkiTensor,
    logsumexp: nl.NkiTensor,
    group: int,
    scale: float,
) -> nl.NkiTensor:
    """Return the gradient of query (B·Q, S, D); the operands as `attention_kernel` takes and returns them."""
    num_heads, length, size = query.shape
    pmax = nl.tile_size.pmax
    grad = nl.ndarray((num_heads, length, size), dtype=query.dtype, buffer=nl.shared_hbm)
    for head in range(num_heads):
        for first in range(0, length, pmax):
            rows = min(pmax, length - first)
            query_t = turn_features(load(query, head, first, rows))
            grad_tile, lse = load(grad_out, head, first, rows), load(logsumexp, head, first, rows)
            sums = row_sums(grad_tile, load(out, head, first, rows))
            grad_t = turn_features(grad_tile)
            total = zeros(rows, size)
            for start in range(0, first + rows, pmax):
                columns = min(pmax, length - start)
                key_tile = load(key, head // group, start, columns)
                value_t = turn_features(load(value, head // group, start, columns))
                scores = masked_scores(query_t, turn_features(key_tile), first, start, scale)
                grads = score_gradients(softmax_of(scores, lse), grad_t, value_t, sums, scale)
                add_matmul(total, turn(grads), key_tile)
            store(grad, head, first, total)
    return grad


@nki.jit  # type: ignore[untyped-decorator]
def key_value_gradient_kernel(
    grad_out: nl.NkiTensor,
    query: nl.NkiTensor,
    key: nl.NkiTensor,
    value: nl.NkiTensor,
    out: nl.NkiTensor,
    logsumexp: nl.NkiTensor,
    group: int,
    scale: float,
) -> tuple[nl.NkiTensor, nl.NkiTensor]:
    """Return the gradients of key and value (B·K, S, D), summed over each group's query heads."""
    num_heads, length, size = key.shape
    pmax = nl.tile_size.pmax
    grad_key = nl.ndarray((num_heads, length, size), dtype=key.dtype, buffer=nl.shared_hbm)
    grad_value = nl.ndarray((num_heads, length, size), dtype=value.dtype, buffer=nl.shared_hbm)
    for kv_head in range(num_heads):
        for start in range(0, length, pmax):
            columns = min(pmax, length - start)
            key_t = turn_features(load(key, kv_head, start, columns))
            value_t = turn_features(load(value, kv_head, start, columns))
            key_total, value_total = zeros(columns, size), zeros(columns, size)
            for head in range(kv_head * group, (kv_head + 1) * group):
                for first in range(start, length, pmax):
                    rows = min(pmax, length - first)
                    query_tile, grad_tile = load(query, head, first, rows), load(grad_out, head, first, rows)
                    sums = row_sums(grad_tile, load(out, head, first, rows))
                    scores = masked_scores(turn_features(query_tile), key_t, first, start, scale)
                    weights = softmax_of(scores, load(logsumexp, head, first, rows))
                    grads = score_gradients(weights, turn_features(grad_tile), value_t, sums, scale)
                    add_matmul(value_total, weights, grad_tile)
                    add_matmul(key_total, grads, query_tile)
            store(grad_key, kv_head, start, key_total)
            store(grad_value, kv_head, start, value_total)
    return grad_key, grad_value
