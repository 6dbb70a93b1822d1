"""What the ranks of one stage add up at the end of a step: gradients of what several of them hold, squares, the loss.

Everything here is a no-op on a stage of one rank. Every rank of the stage calls the same functions in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hybrid.models.axis import Axis
from hybrid.models.decoder import layer_name
from hybrid.models.shards import Shard, shard_of
from hybrid.models.stage import Stage, tied_parameters
from hybrid.runtime.axes import StageAxes
from hybrid.runtime.optimizer import squared_norm

BUCKET_ELEMENTS = 4 * 2**20
"""How many elements of gradients are joined into one reduction."""


def shards_of(stage: Stage) -> dict[str, Shard]:
    """Return the part that this rank holds of each parameter, by its name in the whole model."""
    axis = stage.parallel.axis if stage.parallel else None
    degree, rank = (axis.size, axis.rank) if axis else (1, 0)
    return {
        f"{layer_name(stage.config, index)}.{name}": shard_of(stage.config, name, degree=degree, rank=rank)
        for index, layer in stage.layers.items()
        for name, _ in layer.named_parameters()
    }


def gradients_of(stage: Stage) -> dict[str, Tensor]:
    """Return the gradients by the parameters' names in the whole model."""
    return {
        f"{layer_name(stage.config, index)}.{name}": parameter.grad
        for index, layer in stage.layers.items()
        for name, parameter in layer.named_parameters()
        if parameter.grad is not None
    }


def sum_gradients(stage: Stage, axes: StageAxes) -> None:
    """Give every holder of an element the sum of all its holders' gradients, the same bits on all.

    Over the tensor-parallel ranks: the norms' where tokens are shared out, and those of key and value heads that
    several ranks hold. Then over the copies of the stage: all.
    """
    gradients = gradients_of(stage)
    if axes.tensor is not None and stage.parallel is not None:
        shards = shards_of(stage)
        whole = [
            gradients[n] for n, shard in shards.items() if shard.copies == axes.tensor.size and _is_summed(stage, shard)
        ]
        _all_reduce(whole, axes.tensor)
        for name, shard in shards.items():
            if 1 < shard.copies < axes.tensor.size:
                _sum_overlapping(gradients[name], shard, axes.tensor)
    if axes.width is not None:
        _all_reduce(list(gradients.values()), axes.width)


def _is_summed(stage: Stage, shard: Shard) -> bool:
    assert stage.parallel is not None
    return shard.sums_copies or stage.parallel.sequence_parallel


def _sum_overlapping(gradient: Tensor, shard: Shard, axis: Axis) -> None:
    """Sum among the ranks that hold the same rows, as one reduction of all rows: no group of theirs is needed."""
    shape = list(gradient.shape)
    shape[shard.dim] = shard.size
    total = gradient.new_zeros(shape)
    own = total.narrow(shard.dim, shard.first, shard.end - shard.first)
    own.copy_(gradient)
    axis.all_reduce(total)
    gradient.copy_(own)


def _all_reduce(tensors: Sequence[Tensor], axis: Axis) -> None:
    """Sum tensors of one format over the axis, several in one reduction, in their order."""
    run: list[Tensor] = []
    for index, tensor in enumerate(tensors):
        run.append(tensor)
        if index == len(tensors) - 1 or sum(x.numel() for x in run) >= BUCKET_ELEMENTS:
            flat = torch.cat([x.reshape(-1) for x in run])
            axis.all_reduce(flat)
            for x, part in zip(run, torch.split(flat, [x.numel() for x in run]), strict=True):
                x.copy_(part.view_as(x))
            run = []


def share_first_copy(gradient: Tensor, axes: StageAxes) -> None:
    """Give every copy of a stage the first copy's gradient; the others add exact zeros to it."""
    if axes.width is not None:
        if axes.width.rank > 0:
            gradient.zero_()
        axes.width.all_reduce(gradient)


def counted_squares(stage: Stage, axes: StageAxes) -> dict[int, float]:
    """Return each layer's sum of squared gradients, of all the stage's ranks; every element counts once.

    A tied weight counts in the embedding.
    """
    gradients, uncounted = gradients_of(stage), uncounted_names(stage)
    squares = {}
    for index in stage.layers:
        prefix = layer_name(stage.config, index) + "."
        names = [name for name in gradients if name.startswith(prefix) and name not in uncounted]
        squares[index] = squared_norm([gradients[name] for name in names])
    return add_squares(squares, stage, axes)


def uncounted_names(stage: Stage) -> frozenset[str]:
    """Return the parameters whose squares another of the stage's ranks, or another parameter, counts."""
    tied = tied_parameters(stage.config)
    elsewhere = {name for name, shard in shards_of(stage).items() if not shard.counted}
    return frozenset(elsewhere if tied is None else {*elsewhere, tied[1]})


def add_squares(squares: dict[int, float], stage: Stage, axes: StageAxes) -> dict[int, float]:
    """Return each layer's sum of squares over the tensor-parallel ranks."""
    return squares if axes.tensor is None else _add_rows(squares, axes.tensor, _device(stage))


def add_losses(loss: float | None, stage: Stage, axes: StageAxes) -> float | None:
    """Return the sum of the copies' shares of the loss."""
    if loss is None or axes.width is None:
        return loss
    return _add_rows({0: loss}, axes.width, _device(stage))[0]


def share_from_first(row: Sequence[float] | None, length: int, stage: Stage, axes: StageAxes) -> list[float]:
    """Return, on every rank of a stage, the numbers that its first rank has.

    Args:
        row: `length` numbers on the first rank, None on the others, which add exact zeros.
    """
    values = dict(enumerate(row if row is not None else [0.0] * length))
    for axis in (axes.tensor, axes.width):
        if axis is not None:
            values = _add_rows(values, axis, _device(stage))
    return list(values.values())


def _add_rows(values: Mapping[int, float], axis: Axis, device: torch.device) -> dict[int, float]:
    # An accelerator may have no float64; a loss or a norm has more digits than a step's rounding anyway.
    row = torch.tensor(list(values.values()), dtype=torch.float64 if device.type == "cpu" else torch.float32)
    on_device = row.to(device)
    axis.all_reduce(on_device)
    return dict(zip(values, on_device.to("cpu").double().tolist(), strict=True))


def _device(stage: Stage) -> torch.device:
    return next(stage.parameters()).device
