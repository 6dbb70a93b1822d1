"""Tensor parallelism of the decoder: its layers with cut weights, and what the ranks of an axis exchange.

    embedding      rows of the vocabulary: each rank looks up what it has, and the sum is everyone's
    attention      whole heads: x -> enter -> its heads -> its columns of `output` -> leave
    mlp            a part of the inner width: x -> enter -> gate, up, down -> leave
    head           x -> enter -> logits of its part of the vocabulary -> a cross-entropy over all parts

With sequence parallelism each rank holds its tokens alone between `leave` and `enter`: norms and residuals are computed
once, `enter` gathers the tokens and `leave` sums and scatters them. Without it every rank holds all tokens: `enter`
does nothing and `leave` sums. Their backwards are each other's. Attention and MLP are the decoder's own modules, with
fewer rows.

Own autograd functions over an `Axis`, not DTensor: they run over any group, also that of threads, whose process has no
torch.distributed group of theirs, and the products stay plain `F.linear` of plain parameters, which the split backward,
the emulated formats and the kernels know.

Legend: B samples, T tokens, S tokens of one rank, H hidden, V vocabulary of one rank.

Source:
    Shoeybi et al. 2019, "Megatron-LM"; Korthikanti et al. 2022, "Reducing activation recomputation in large transformer
    models" (sequence parallelism).
"""

# ruff: noqa: N806 - the capitals at the end of a name are its dims; see the legend above
from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid.config import ModelConfig
from hybrid.models.axis import Axis
from hybrid.models.axis_functions import Cut, Gather, Join, SumBackward, SumForward, SumScatter
from hybrid.models.decoder import Block, Embedding, Head, in_compute_format
from hybrid.models.shards import shard_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorParallel:
    """Over which ranks a stage's weights are cut, and whether its tokens are too."""

    axis: Axis
    sequence_parallel: bool

    def enter(self, x: Tensor) -> Tensor:
        """Return what a product of cut rows needs: all tokens; its gradient is summed over the ranks.

        Shapes:
            x: (B, S, H) with sequence parallelism, else (B, T, H).  returns: (B, T, H).
        """
        y: Tensor = (Gather if self.sequence_parallel else SumBackward).apply(x, self.axis)  # type: ignore[no-untyped-call]
        return y

    def leave(self, partial: Tensor) -> Tensor:
        """Return the sum of every rank's part of a product of cut columns.

        Shapes:
            partial: (B, T, H).  returns: (B, S, H) with sequence parallelism, else (B, T, H).
        """
        function = SumScatter if self.sequence_parallel else SumForward
        y: Tensor = function.apply(partial, self.axis)  # type: ignore[no-untyped-call]
        return y

    def join_input(self, x: Tensor, num_tokens: int) -> Tensor:
        """Return a stage's input as its first layer takes it, from this rank's tokens.

        Shapes:
            x: (B, S, H).  returns: (B, S, H) with sequence parallelism, else (B, T, H).
        """
        if self.sequence_parallel:
            return x
        y: Tensor = Join.apply(x, num_tokens, self.axis)  # type: ignore[no-untyped-call]
        return y

    def cut_output(self, x: Tensor) -> Tensor:
        """Return this rank's tokens of a stage's output.

        Shapes:
            x: (B, S, H) with sequence parallelism, else (B, T, H).  returns: (B, S, H).
        """
        if self.sequence_parallel:
            return x
        y: Tensor = Cut.apply(x, self.axis)  # type: ignore[no-untyped-call]
        return y


def shard_layer(layer: nn.Module, config: ModelConfig, parallel: TensorParallel) -> nn.Module:
    """Return a layer of this rank's part of the weights, from the whole layer, whose modules it takes over."""
    _cut_weights(layer, config, parallel.axis)
    if isinstance(layer, Embedding):
        return ShardedEmbedding(layer, parallel)
    if isinstance(layer, Head):
        return ShardedHead(layer, parallel)
    assert isinstance(layer, Block), "a decoder's layer"
    layer.attention.grouped = layer.attention.query.weight.shape[0] != layer.attention.key.weight.shape[0]
    return ShardedBlock(layer, parallel)


def _cut_weights(layer: nn.Module, config: ModelConfig, axis: Axis) -> None:
    for name, parameter in list(layer.named_parameters()):
        shard = shard_of(config, name, degree=axis.size, rank=axis.rank)
        if not shard.is_whole:
            part = parameter.detach().narrow(shard.dim, shard.first, shard.end - shard.first)
            owner, _, last = name.rpartition(".")
            # A copy: a view would keep the whole weight alive.
            setattr(layer.get_submodule(owner), last, nn.Parameter(part.clone(memory_format=torch.contiguous_format)))


@final
class ShardedEmbedding(nn.Module):
    """Token ids to vectors, from rows that are spread over the ranks."""

    def __init__(self, whole: Embedding, parallel: TensorParallel) -> None:
        super().__init__()
        self.weight = whole.weight
        self._parallel = parallel
        self._first = parallel.axis.rank * self.weight.shape[0]

    def forward(self, ids: Tensor) -> Tensor:
        """Look up the ids that this rank has; the others' rows come by the sum, to which each adds exact zeros.

        Shapes:
            ids: (B, T) int64.  returns: (B, S, H) with sequence parallelism, else (B, T, H).
        """
        own = ids.to(self.weight.device) - self._first
        absent = (own < 0) | (own >= self.weight.shape[0])
        rows_BTH = F.embedding(own.masked_fill(absent, 0), self.weight).masked_fill(absent[..., None], 0.0)
        return self._parallel.leave(in_compute_format(rows_BTH))


@final
class ShardedBlock(nn.Module):
    """A block whose heads and inner width are spread over the ranks."""

    def __init__(self, whole: Block, parallel: TensorParallel) -> None:
        super().__init__()
        self.attention_norm = whole.attention_norm
        self.attention = whole.attention
        self.mlp_norm = whole.mlp_norm
        self.mlp = whole.mlp
        self._parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return the next hidden state.

        Shapes:
            x: (B, S, H) with sequence parallelism, else (B, T, H).  returns: the same.
        """
        enter, leave = self._parallel.enter, self._parallel.leave
        x = x + leave(self.attention(enter(self.attention_norm(x))))
        y: Tensor = x + leave(self.mlp(enter(self.mlp_norm(x))))
        return y


@final
class ShardedHead(nn.Module):
    """Final norm and the projection to this rank's part of the vocabulary."""

    def __init__(self, whole: Head, parallel: TensorParallel) -> None:
        super().__init__()
        self.norm = whole.norm
        self.weight = whole.weight
        self._parallel = parallel

    def forward(self, x: Tensor) -> Tensor:
        """Return this rank's logits.

        Shapes:
            x: (B, S, H) with sequence parallelism, else (B, T, H).  returns: (B, T, V).
        """
        return F.linear(self._parallel.enter(self.norm(x)), self.weight)
