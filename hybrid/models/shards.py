"""Which part of each parameter a tensor-parallel rank holds, and which degrees a model can have.

    embedding, head   rows of the vocabulary        query, key, value   rows of whole heads
    gate, up          rows of the inner width       output, down        columns that meet those rows
    norms             whole, on every rank

With more ranks than key and value heads each such head is held by several neighbouring ranks. Pure: no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from hybrid.config import ModelConfig
from hybrid.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Elements [first, end) along `dim` of a parameter whose whole has `size` there."""

    dim: int
    """0 or 1; with 0 and the full range the parameter is whole."""
    first: int
    end: int
    size: int
    copies: int
    """How many ranks of the axis hold the same elements."""
    counted: bool
    """Whether this rank is the one of those that counts them in a norm."""
    sums_copies: bool
    """Whether the copies' gradients are parts of one sum also where every rank sees all tokens."""

    @property
    def is_whole(self) -> bool:
        """Whether every rank of the axis holds the whole parameter."""
        return self.end - self.first == self.size


def shard_of(config: ModelConfig, name: str, *, degree: int, rank: int) -> Shard:
    """Return the part of a parameter that one rank of the axis holds.

    Args:
        name: the parameter's name in its layer: `attention.query.weight`, or `weight` of the embedding and the head.
        degree: one that `check_degree` accepts.
    """
    match name:
        case "weight":
            return _even(0, config.vocab_size, degree, rank)
        case "attention.query.weight":
            return _even(0, config.hidden_size, degree, rank)
        case "attention.output.weight":
            return _even(1, config.hidden_size, degree, rank)
        case "attention.key.weight" | "attention.value.weight":
            copies = max(1, degree // config.num_kv_heads)
            part = _even(0, config.num_kv_heads * config.head_size, degree // copies, rank // copies)
            return replace(part, copies=copies, counted=rank % copies == 0, sums_copies=copies > 1)
        case "mlp.gate.weight" | "mlp.up.weight":
            return _even(0, config.intermediate_size, degree, rank)
        case "mlp.down.weight":
            return _even(1, config.intermediate_size, degree, rank)
        case "attention_norm.weight" | "mlp_norm.weight" | "norm.weight":
            size = config.hidden_size
            return replace(_even(0, size, 1, 0), copies=degree, counted=rank == 0)
    raise AssertionError(f"no parameter {name}")


def _even(dim: int, size: int, degree: int, rank: int) -> Shard:
    each = size // degree
    first = rank * each
    return Shard(dim=dim, first=first, end=first + each, size=size, copies=1, counted=True, sums_copies=False)


def check_degree(
    config: ModelConfig, degree: int, layers: Iterable[int], *, sequence_parallel: bool, where: str
) -> None:
    """Refuse a tensor-parallel degree that does not divide what must be divided.

    Args:
        layers: that the stage holds.
        sequence_parallel: tokens are shared out between norms.
        where: the stage, for the message.

    Raises:
        PlanError: names the number that would have to change.
    """
    held, last = set(layers), config.num_layers - 1
    divided: list[tuple[str, int]] = []
    if held & {0, last}:
        divided.append(("model.vocab_size", config.vocab_size))
    if held - {0, last}:
        divided += [("model.num_heads", config.num_heads), ("model.intermediate_size", config.intermediate_size)]
        if degree > config.num_kv_heads:
            _check_shared_heads(config, degree, where)
        else:
            divided.append(("model.num_kv_heads", config.num_kv_heads))
    if sequence_parallel:
        divided.append(("model.sequence_length", config.sequence_length))
    for name, size in divided:
        if size % degree:
            below, above = size // degree * degree, -(-size // degree) * degree
            raise PlanError(
                f"{name} {size} is not a multiple of tensor_parallel {degree}",
                value=degree,
                valid=f"a divisor of {size}, or {name} {f'{below} or {above}' if below else above}",
                where=where,
                fix=f"change {name} or the degree"
                + (", or set runtime.sequence_parallel to false" if name.endswith("sequence_length") else ""),
            )


def _check_shared_heads(config: ModelConfig, degree: int, where: str) -> None:
    """Refuse a degree above the number of key and value heads that does not repeat each the same number of times."""
    if degree % config.num_kv_heads:
        raise PlanError(
            f"tensor_parallel {degree} is not a multiple of model.num_kv_heads {config.num_kv_heads}",
            value=degree,
            valid=f"a divisor or a multiple of {config.num_kv_heads}",
            where=where,
            fix="change model.num_kv_heads or the degree",
        )
