"""A stage: a contiguous run of the model's layers, as one module.

What a worker holds and what the one-process reference holds are both stages, so that they compute the same
numbers. No optimizer, no clock; no communication but that of `tensor_parallel`, where several ranks hold one stage.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid.config import ModelConfig, Precision
from hybrid.models.decoder import build_layer, layer_name
from hybrid.models.sharded_loss import sharded_loss
from hybrid.models.tensor_parallel import TensorParallel, shard_layer
from hybrid.scheduler.reshard import cut


@final
class Stage(nn.Module):
    """Layers `[first, end)` of a model, whole, or with this rank's part of their weights.

    Args:
        parallel: over which ranks the weights are cut; None: they are whole.
    """

    def __init__(
        self, config: ModelConfig, layers: dict[int, nn.Module], parallel: TensorParallel | None = None
    ) -> None:
        super().__init__()
        self.config, self.parallel = config, parallel
        self.layers = layers
        """By index in the model, in order."""
        self._registered = nn.ModuleList(layers.values())

    @property
    def is_first(self) -> bool:
        """Whether it takes token ids."""
        return 0 in self.layers

    @property
    def is_last(self) -> bool:
        """Whether it returns logits."""
        return self.config.num_layers - 1 in self.layers

    def forward(self, x: Tensor) -> Tensor:
        """Run the layers.

        Shapes:
            x: (B, T) int64 ids for the first stage, else (B, T, H), of T this rank's tokens.
            returns: (B, T, V) for the last stage, of V this rank's part, else as x.
        """
        if self.parallel and not self.is_first:
            x = self.parallel.join_input(x, self.config.sequence_length)
        for layer in self.layers.values():
            x = layer(x)
        return self.parallel.cut_output(x) if self.parallel and not self.is_last else x

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the mean cross-entropy over the tokens of what the last stage returned; see `microbatch_loss`.

        Shapes:
            logits: (B, T, V), of V this rank's part.  targets: (B, T) int64, on any device.  returns: ().
        """
        if self.parallel:
            return sharded_loss(logits, targets, self.parallel.axis)
        return microbatch_loss(logits, targets)

    def boundary_shape(self, num_samples: int) -> tuple[int, int, int]:
        """Return (B, T, H) of the activations, and their gradients, that come to this rank and leave it."""
        num_tokens = self.config.sequence_length
        if self.parallel:
            first, end = cut(num_tokens, self.parallel.axis.size)[self.parallel.axis.rank]
            num_tokens = end - first
        return num_samples, num_tokens, self.config.hidden_size


def build_stage(
    config: ModelConfig,
    first: int,
    end: int,
    seed: int,
    dtype: torch.dtype,
    parallel: TensorParallel | None = None,
) -> Stage:
    """Return layers `[first, end)` with their first weights, on the CPU; no weight depends on the split.

    With `parallel` each layer is built whole, as everywhere else, and cut before the next one is built.
    """
    assert 0 <= first < end <= config.num_layers, f"layers [{first}, {end}) of {config.num_layers}"
    layers: dict[int, nn.Module] = {}
    for index in range(first, end):
        layer = build_layer(config, index, seed=seed, dtype=dtype)
        layers[index] = shard_layer(layer, config, parallel) if parallel else layer
    return Stage(config, layers, parallel)


def microbatch_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy over the microbatch's tokens, in nats, float32 (float64 for float64).

    Shapes:
        logits: (B, T, V).  targets: (B, T) int64, on any device.  returns: ().
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide.flatten(0, 1), targets.to(logits.device).flatten())


def compute_context(precision: Precision, device_type: str = "cpu") -> AbstractContextManager[object]:
    """Return the context in which a step's forwards and backwards run: autocast for `bf16`, else nothing.

    Enter it once a step, around all microbatches, and leave it before the optimizer. Autocast keeps the
    bf16 copy of each weight until the context ends: entered once a microbatch, it would make and hold one
    copy a microbatch in flight.
    """
    return torch.autocast(device_type, torch.bfloat16) if precision == "bf16" else nullcontext()


def parameter_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of the parameters: float32 masters, also under bf16."""
    return torch.float64 if precision == "fp64" else torch.float32


def boundary_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of an activation, and of its gradient, between two stages."""
    return torch.bfloat16 if precision == "bf16" else parameter_dtype(precision)


def boundary_shape(config: ModelConfig, microbatch: int) -> tuple[int, int, int]:
    """Return (B, T, H): the shape of an activation, and of its gradient, between two stages."""
    return microbatch, config.sequence_length, config.hidden_size


def tied_parameters(config: ModelConfig) -> tuple[str, str] | None:
    """Return the names of the two parameters that must stay equal, the embedding's first; None when untied.

    Each has its own gradient; the gradient of the shared weight is their sum, and both owners apply it.
    """
    if not config.tied_embeddings:
        return None
    return "embedding.weight", "head.weight"


def named_state(stage: Stage) -> dict[str, Tensor]:
    """Return the stage's parameters by their names in the whole model: `block.03.attention.query.weight`.

    The names and their order don't depend on the split. The tensors are the live parameters.
    """
    return {
        f"{layer_name(stage.config, index)}.{name}": parameter
        for index, layer in stage.layers.items()
        for name, parameter in layer.named_parameters()
    }
