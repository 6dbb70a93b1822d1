"""What ranks exchange at the end of a step: tied gradients, and each layer's sum of squares for the global norm.

The sums go up the pipeline behind the last backwards, which end first on the last stage and last on the first, and come
down ahead of the next step's first activations: on the critical path lies one small message, not a barrier.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from hybrid.config import ModelConfig
from hybrid.models.stage import tied_parameters
from hybrid.runtime.edges import TiedRows
from hybrid.runtime.interpreter import host_bytes
from hybrid.transports.base import Transport


def add_tied_gradients(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    other_ends: Sequence[TiedRows],
    *,
    step: int,
    timeout_s: float,
) -> None:
    """Give both copies of a tied weight the sum of their gradients, the same bits on both.

    Args:
        state: this rank's parameters by their names in the whole model.
        other_ends: who holds the other copy, where this rank holds just one.

    Numerics:
        (sum over microbatches of the head's) + (sum over microbatches of the embedding's), in this order.
    """
    names = tied_parameters(config)
    if names is None:
        return
    embedding, head = (state.get(name) for name in names)
    if embedding is not None and head is not None:
        total = _grad(head) + _grad(embedding)
        _grad(embedding).copy_(total)
        _grad(head).copy_(total)
        return
    own = embedding if embedding is not None else head
    if own is None:
        return
    assert other_ends, "no edge to the tied weight's other copy"
    tag = f"{step}/tied"
    mine = _grad(own).to("cpu").contiguous()
    other = torch.empty_like(mine)
    pendings = [rows.edge.recv(tag, [host_bytes(other[rows.first : rows.end])]) for rows in other_ends]
    pendings += [rows.edge.send(tag, [host_bytes(mine[rows.first : rows.end])]) for rows in other_ends]
    for pending in pendings:
        pending.wait(timeout_s)
    # Addition of two numbers commutes bit for bit, so the order is the same on both ends.
    _grad(own).add_(other.to(own.device))


def _grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None, "a tied weight has no gradient after a step"
    return parameter.grad


def share_squares(
    squares_of_layer: Mapping[int, float],
    loss: float | None,
    *,
    rank: int,
    num_ranks: int,
    num_layers: int,
    edges: Mapping[int, Transport],
    step: int,
    timeout_s: float,
) -> tuple[list[float], float]:
    """Return every layer's sum of squares and the loss, on every rank.

    Args:
        loss: where this rank holds the last stage, else None.
        rank, num_ranks, edges: in pipeline ranks.

    Cost:
        2 messages of 8 (L + 1) bytes a rank.
    """
    row = np.zeros(num_layers + 1, dtype=np.float64)
    view = row.view(np.uint8).data
    if rank < num_ranks - 1:
        edges[rank + 1].recv(f"{step}/up", [view]).wait(timeout_s)
    for layer, square in squares_of_layer.items():
        row[layer] = square
    if loss is not None:
        row[num_layers] = loss
    if rank > 0:
        edges[rank - 1].send(f"{step}/up", [view]).wait(timeout_s)
        edges[rank - 1].recv(f"{step}/down", [view]).wait(timeout_s)
    if rank < num_ranks - 1:
        edges[rank + 1].send(f"{step}/down", [view]).wait(timeout_s)
    values = row.tolist()
    return values[:num_layers], values[num_layers]
