"""Cross-entropy of the output projection on a NeuronCore: logits exist as one tile of 128 tokens by 512 words.

Letters: N tokens, H hidden size, V vocabulary (below 2^24, so that float32 holds every word's index). May import only
nki and torch; written for NKI 0.6. Executed only by an interpreter of a documented NKI subset, never on a Trainium.
"""

from __future__ import annotations

import nki
import nki.isa as nisa
import nki.language as nl
import torch
from torch import Tensor

LOWEST = -3.0e38
"""A running maximum before the first logit; its exponential against any logit is 0."""


def cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int, scale: float) -> Tensor:
    """Return `scale` times the sum of the tokens' losses; see `ref.cross_entropy`."""
    return token_losses(hidden, weight, labels, ignore_index=ignore_index).sum() * scale


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int) -> Tensor:
    """Return each token's loss (N,), in float32; see `ref.token_losses`."""
    if hidden.shape[0] == 0:
        return torch.zeros(0, device=hidden.device)
    losses, _ = losses_kernel(hidden, weight, _column(labels), ignore_index)
    return losses.reshape(-1)  # type: ignore[no-any-return]


def cross_entropy_with_gradients(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int,
    scale: float,
    needs_hidden: bool = True,
    needs_weight: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the loss and, where needed, the gradients; see `ref.cross_entropy_with_gradients`."""
    if hidden.shape[0] == 0:
        none = torch.zeros((), device=hidden.device)
        return none, torch.empty_like(hidden), torch.zeros_like(weight)
    column = _column(labels)
    losses, logsumexp = losses_kernel(hidden, weight, column, ignore_index)
    grad_hidden = grad_weight = None
    if needs_hidden:
        grad_hidden = hidden_gradient_kernel(hidden, weight, column, logsumexp, ignore_index, scale)
    if needs_weight:
        grad_weight = weight_gradient_kernel(hidden, weight, column, logsumexp, ignore_index, scale)
    return losses.sum() * scale, grad_hidden, grad_weight


def _column(labels: Tensor) -> Tensor:
    # The device has no 64-bit integers.
    return labels.to(torch.int32).reshape(-1, 1)


def load_transposed(source: nl.NkiTensor, first: int, rows: int, free: int) -> list[nl.NkiTensor]:
    """Return rows of a matrix (R, H) as tiles (up to 128 of H, rows) in float32, in the order of H."""
    width = source.shape[1]
    pmax = nl.tile_size.pmax
    turned = []
    for start in range(0, width, pmax):
        size = min(pmax, width - start)
        tile = nl.ndarray((size, free), dtype=nl.float32, buffer=nl.sbuf)
        for at in range(0, rows, pmax):
            count = min(pmax, rows - at)
            straight = nl.ndarray((count, size), dtype=nl.float32, buffer=nl.sbuf)
            nisa.dma_copy(dst=straight, src=source[first + at : first + at + count, start : start + size])
            crossed = nl.ndarray((size, count), dtype=nl.float32, buffer=nl.psum)
            nisa.nc_transpose(dst=crossed, data=straight, engine=nisa.engine.tensor)
            nisa.tensor_copy(dst=tile[:, at : at + count], src=crossed)
        turned.append(tile)
    return turned


def logits_tile(hidden_t: list[nl.NkiTensor], weight_t: list[nl.NkiTensor], rows: int, words: int) -> nl.NkiTensor:
    """Return hidden @ weight.T for the rows and words whose transposes are given, (rows, words) in PSUM."""
    logits = nl.ndarray((rows, words), dtype=nl.float32, buffer=nl.psum)
    for i in range(len(hidden_t)):
        nisa.nc_matmul(
            dst=logits, stationary=hidden_t[i][:, 0:rows], moving=weight_t[i][:, 0:words], accumulate=(i > 0)
        )
    return logits


def load_labels(labels: nl.NkiTensor, first: int, rows: int) -> nl.NkiTensor:
    """Return labels as float32 (rows, 1)."""
    tile = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=labels[first : first + rows, :])
    return tile


def word_indices(rows: int, first: int, words: int) -> nl.NkiTensor:
    """Return the words' indices in float32 on every partition, (rows, words)."""
    tile = nl.ndarray((rows, words), dtype=nl.float32, buffer=nl.sbuf)
    nisa.iota(dst=tile, pattern=[[1, words]], offset=first, channel_multiplier=0)
    return tile


@nki.jit  # type: ignore[untyped-decorator]
def losses_kernel(
    hidden: nl.NkiTensor, weight: nl.NkiTensor, labels: nl.NkiTensor, ignore_index: int
) -> tuple[nl.NkiTensor, nl.NkiTensor]:
    """Return each token's loss and logsumexp, (N, 1) in float32; hidden (N, H), weight (V, H), labels (N, 1)."""
    num_tokens = hidden.shape[0]
    vocabulary = weight.shape[0]
    pmax, chunk = nl.tile_size.pmax, nl.tile_size.psum_bank_fmax
    losses = nl.ndarray((num_tokens, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    logsumexp = nl.ndarray((num_tokens, 1), dtype=nl.float32, buffer=nl.shared_hbm)
    for first in range(0, num_tokens, pmax):
        rows = min(pmax, num_tokens - first)
        hidden_t = load_transposed(hidden, first, rows, rows)
        label = load_labels(labels, first, rows)
        highest = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        total = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        own = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=highest, value=LOWEST)
        nisa.memset(dst=total, value=0.0)
        nisa.memset(dst=own, value=0.0)
        for word in range(0, vocabulary, chunk):
            words = min(chunk, vocabulary - word)
            weight_t = load_transposed(weight, word, words, words)
            logits = nl.ndarray((rows, words), dtype=nl.float32, buffer=nl.sbuf)
            nisa.tensor_copy(dst=logits, src=logits_tile(hidden_t, weight_t, rows, words))
            add_own_logit(own, logits, label, word)
            add_exponentials(highest, total, logits)
        lse = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        loss = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        kept_loss = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
        kept = nl.ndarray((rows, 1), dtype=nl.uint8, buffer=nl.sbuf)
        # The sum is at least 1, the exponential of the largest logit: inside the logarithm's valid range.
        nisa.activation(dst=lse, op=nl.log, data=total)
        nisa.tensor_tensor(dst=lse, data1=lse, data2=highest, op=nl.add)
        nisa.tensor_tensor(dst=loss, data1=lse, data2=own, op=nl.subtract)
        # Selected, not multiplied: an ignored token's loss is 0 whatever its logits.
        nisa.tensor_scalar(dst=kept, data=label, op0=nl.not_equal, operand0=ignore_index)
        nisa.memset(dst=kept_loss, value=0.0)
        nisa.tensor_copy_predicated(dst=kept_loss, src=loss, predicate=kept)
        nisa.dma_copy(dst=losses[first : first + rows, :], src=kept_loss)
        nisa.dma_copy(dst=logsumexp[first : first + rows, :], src=lse)
    return losses, logsumexp


def add_own_logit(own: nl.NkiTensor, logits: nl.NkiTensor, label: nl.NkiTensor, word: int) -> None:
    """Add the label's logit to `own`, if it is among these words."""
    rows, words = logits.shape
    hits = nl.ndarray((rows, words), dtype=nl.uint8, buffer=nl.sbuf)
    picked = nl.ndarray((rows, words), dtype=nl.float32, buffer=nl.sbuf)
    found = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=hits, data=word_indices(rows, word, words), op0=nl.equal, operand0=label)
    nisa.memset(dst=picked, value=0.0)
    nisa.tensor_copy_predicated(dst=picked, src=logits, predicate=hits)
    nisa.tensor_reduce(dst=found, op=nl.add, data=picked, axis=1)
    nisa.tensor_tensor(dst=own, data1=own, data2=found, op=nl.add)


def add_exponentials(highest: nl.NkiTensor, total: nl.NkiTensor, logits: nl.NkiTensor) -> None:
    """Add the logits' exponentials to `total`, both relative to the largest logit so far, which is updated."""
    rows, words = logits.shape
    new_highest = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    below = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    shrink = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    part = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    powers = nl.ndarray((rows, words), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_reduce(dst=new_highest, op=nl.maximum, data=logits, axis=1)
    nisa.tensor_tensor(dst=new_highest, data1=new_highest, data2=highest, op=nl.maximum)
    nisa.tensor_scalar(dst=below, data=new_highest, op0=nl.multiply, operand0=-1.0)
    nisa.activation(dst=shrink, op=nl.exp, data=highest, bias=below)
    nisa.activation(
        dst=powers,
        op=nl.exp,
        data=logits,
        bias=below,
        reduce_op=nl.add,
        reduce_res=part,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    nisa.scalar_tensor_tensor(dst=total, data=total, op0=nl.multiply, operand0=shrink, op1=nl.add, operand1=part)
    nisa.tensor_copy(dst=highest, src=new_highest)


def logit_gradients(
    logits: nl.NkiTensor,
    label: nl.NkiTensor,
    logsumexp: nl.NkiTensor,
    word: int,
    ignore_index: int,
    scale: float,
) -> nl.NkiTensor:
    """Return scale * (softmax - one_hot), zeros in the rows of ignored tokens; (rows, words) in SBUF."""
    rows, words = logits.shape
    below = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    grad = nl.ndarray((rows, words), dtype=nl.float32, buffer=nl.sbuf)
    hits = nl.ndarray((rows, words), dtype=nl.float32, buffer=nl.sbuf)
    kept = nl.ndarray((rows, words), dtype=nl.uint8, buffer=nl.sbuf)
    out = nl.ndarray((rows, words), dtype=nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=below, data=logsumexp, op0=nl.multiply, operand0=-1.0)
    nisa.activation(dst=grad, op=nl.exp, data=logits, bias=below)
    nisa.tensor_scalar(dst=hits, data=word_indices(rows, word, words), op0=nl.equal, operand0=label)
    nisa.tensor_tensor(dst=grad, data1=grad, data2=hits, op=nl.subtract)
    nisa.tensor_scalar(dst=grad, data=grad, op0=nl.multiply, operand0=scale)
    nisa.tensor_scalar(dst=kept, data=label.broadcast(1, words), op0=nl.not_equal, operand0=ignore_index)
    nisa.memset(dst=out, value=0.0)
    nisa.tensor_copy_predicated(dst=out, src=grad, predicate=kept)
    return out


def load_column(source: nl.NkiTensor, first: int, rows: int) -> nl.NkiTensor:
    """Return rows of an (N, 1) tensor in SBUF."""
    tile = nl.ndarray((rows, 1), dtype=nl.float32, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=source[first : first + rows, :])
    return tile


def add_product(sums: nl.NkiTensor, stationary: nl.NkiTensor, matrix: nl.NkiTensor, first: int, rows: int) -> None:
    """Add stationary.T @ matrix[first : first + rows] to sums (M, H), a PSUM bank at a time."""
    height, width = sums.shape
    step = nl.tile_size.psum_bank_fmax
    for start in range(0, width, step):
        size = min(step, width - start)
        moving = nl.ndarray((rows, size), dtype=nl.float32, buffer=nl.sbuf)
        nisa.dma_copy(dst=moving, src=matrix[first : first + rows, start : start + size])
        product = nl.ndarray((height, size), dtype=nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=product, stationary=stationary, moving=moving)
        running = sums[:, start : start + size]
        nisa.tensor_tensor(dst=running, data1=running, data2=product, op=nl.add)


def store_rows(target: nl.NkiTensor, sums: nl.NkiTensor, first: int) -> None:
    """Write sums (M, H) to rows of an HBM matrix, in its format."""
    rows, width = sums.shape
    narrow = nl.ndarray((rows, width), dtype=target.dtype, buffer=nl.sbuf)
    nisa.tensor_copy(dst=narrow, src=sums)
    nisa.dma_copy(dst=target[first : first + rows, :], src=narrow)


@nki.jit  # type: ignore[untyped-decorator]
def hidden_gradient_kernel(
    hidden: nl.NkiTensor,
    weight: nl.NkiTensor,
    labels: nl.NkiTensor,
    logsumexp: nl.NkiTensor,
    ignore_index: int,
    scale: float,
) -> nl.NkiTensor:
    """Return the gradient of hidden (N, H); logsumexp (N, 1) as `losses_kernel` returned it."""
    num_tokens, width = hidden.shape
    vocabulary = weight.shape[0]
    pmax = nl.tile_size.pmax
    grad = nl.ndarray((num_tokens, width), dtype=hidden.dtype, buffer=nl.shared_hbm)
    for first in range(0, num_tokens, pmax):
        rows = min(pmax, num_tokens - first)
        hidden_t = load_transposed(hidden, first, rows, rows)
        label, lse = load_labels(labels, first, rows), load_column(logsumexp, first, rows)
        sums = nl.ndarray((rows, width), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=sums, value=0.0)
        for word in range(0, vocabulary, pmax):
            words = min(pmax, vocabulary - word)
            weight_t = load_transposed(weight, word, words, words)
            logits = logits_tile(hidden_t, weight_t, rows, words)
            grads = logit_gradients(logits, label, lse, word, ignore_index, scale)
            crossed = nl.ndarray((words, rows), dtype=nl.float32, buffer=nl.psum)
            grads_t = nl.ndarray((words, rows), dtype=nl.float32, buffer=nl.sbuf)
            nisa.nc_transpose(dst=crossed, data=grads, engine=nisa.engine.tensor)
            nisa.tensor_copy(dst=grads_t, src=crossed)
            add_product(sums, grads_t, weight, word, words)
        store_rows(grad, sums, first)
    return grad


@nki.jit  # type: ignore[untyped-decorator]
def weight_gradient_kernel(
    hidden: nl.NkiTensor,
    weight: nl.NkiTensor,
    labels: nl.NkiTensor,
    logsumexp: nl.NkiTensor,
    ignore_index: int,
    scale: float,
) -> nl.NkiTensor:
    """Return the gradient of weight (V, H); logsumexp (N, 1) as `losses_kernel` returned it."""
    num_tokens, width = hidden.shape
    vocabulary = weight.shape[0]
    pmax = nl.tile_size.pmax
    grad = nl.ndarray((vocabulary, width), dtype=weight.dtype, buffer=nl.shared_hbm)
    for word in range(0, vocabulary, pmax):
        words = min(pmax, vocabulary - word)
        weight_t = load_transposed(weight, word, words, words)
        sums = nl.ndarray((words, width), dtype=nl.float32, buffer=nl.sbuf)
        nisa.memset(dst=sums, value=0.0)
        for first in range(0, num_tokens, pmax):
            rows = min(pmax, num_tokens - first)
            hidden_t = load_transposed(hidden, first, rows, rows)
            label, lse = load_labels(labels, first, rows), load_column(logsumexp, first, rows)
            logits = logits_tile(hidden_t, weight_t, rows, words)
            grads = logit_gradients(logits, label, lse, word, ignore_index, scale)
            add_product(sums, grads, hidden, first, rows)
        store_rows(grad, sums, word)
    return grad
