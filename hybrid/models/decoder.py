"""The built-in model: a Llama-style decoder, one module a layer, built one layer at a time.

    0                 Embedding   ids (B, T) -> (B, T, H)
    1 .. num_blocks   Block       (B, T, H) -> (B, T, H)
    num_blocks + 1    Head        (B, T, H) -> (B, T, V)

A layer's first weights depend on (seed, layer) alone, so any split of the model starts from the same bits.
Weights are kept in the dtype asked for; under autocast the activations between layers have autocast's
dtype, so that a cut between two layers changes no number. No dropout, no state, no device's name.

Legend: B samples, T tokens, H hidden, V vocabulary, D head, N query heads, K key and value heads.
"""

# ruff: noqa: N803, N806 - the capitals at the end of a name are its dims; see the legend above
from __future__ import annotations

import hashlib
import math
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hybrid.config import ModelConfig

INIT_STD = 0.02


def layer_name(config: ModelConfig, index: int) -> str:
    """Return the layer's name in checkpoints, profiles and reports: `embedding`, `block.00`, …, `head`."""
    if index == 0:
        return "embedding"
    return "head" if index == config.num_layers - 1 else f"block.{index - 1:02d}"


def build_layer(config: ModelConfig, index: int, *, seed: int, dtype: torch.dtype) -> nn.Module:
    """Return one layer with its first weights, on the CPU.

    Args:
        config: the model.
        index: 0 for the embedding, 1 to `num_blocks` for the blocks, `num_blocks` + 1 for the head.
        seed: of the job.
        dtype: of the parameters: float32, or float64 (then the float32 values, widened).
    """
    assert 0 <= index < config.num_layers, f"layer {index} of {config.num_layers}"
    layer: nn.Module
    if index == 0:
        layer = Embedding(config, dtype)
    elif index < config.num_layers - 1:
        layer = Block(config, dtype)
    else:
        layer = Head(config, dtype)
    _fill(layer, config, index, seed)
    return layer


@final
class Embedding(nn.Module):
    """Token ids to vectors."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        """Look the ids up; they are moved to the weight's device, and indexing is all that is done with them.

        Shapes:
            ids: (B, T) int64.  returns: (B, T, H).
        """
        return in_compute_format(F.embedding(ids.to(self.weight.device), self.weight))


def in_compute_format(x: Tensor) -> Tensor:
    """Return an embedding's rows as the next layer gets them: autocast leaves them in fp32, a cut would not."""
    kind = x.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if autocast else x


@final
class Block(nn.Module):
    """Attention and a gated MLP, each behind a norm and around a residual."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config, dtype)
        self.attention = Attention(config, dtype)
        self.mlp_norm = RMSNorm(config, dtype)
        self.mlp = SwiGLU(config, dtype)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return the next hidden state.

        Shapes:
            x_BTH: (B, T, H).  returns: (B, T, H).
        """
        x_BTH = x_BTH + self.attention(self.attention_norm(x_BTH))
        y_BTH: Tensor = x_BTH + self.mlp(self.mlp_norm(x_BTH))
        return y_BTH


@final
class Head(nn.Module):
    """Final norm and the projection to the vocabulary; holds its own copy of a tied embedding."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(config, dtype)
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size, dtype=dtype))

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return logits.

        Shapes:
            x_BTH: (B, T, H).  returns: (B, T, V).
        """
        return F.linear(self.norm(x_BTH), self.weight)


@final
class RMSNorm(nn.Module):
    """x / rms(x) * weight, in float32 (float64 for float64), returned in x's dtype."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, dtype=dtype))
        self.eps = config.norm_eps

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return x, normed along its last dim.

        Shapes:
            x_BTH: (B, T, H).  returns: (B, T, H).
        """
        y_BTH: Tensor = _RMSNorm.apply(x_BTH, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return y_BTH


class _RMSNorm(torch.autograd.Function):
    """Keeps x as it came and one number a token; plain autograd keeps two float32 copies of x.

    Source:
        Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(weight.dtype)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * weight).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, grad_wide = x.to(weight.dtype) * scale, grad.to(weight.dtype)
        grad_normed = grad_wide * weight
        along_x = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = (grad_normed - normed * along_x) * scale
        grad_weight = (grad_wide * normed).flatten(0, -2).sum(0)
        return grad_x.to(x.dtype), grad_weight, None


@final
class Attention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions.

    Source:
        Ainslie et al. 2023, "GQA"; Su et al. 2021, "RoFormer" (halves rotated, as in Llama's checkpoints).
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        narrow = config.num_kv_heads * config.head_size
        self.head_size = config.head_size
        self.grouped = config.num_kv_heads != config.num_heads
        self.query = _linear(config.hidden_size, config.hidden_size, dtype)
        self.key = _linear(config.hidden_size, narrow, dtype)
        self.value = _linear(config.hidden_size, narrow, dtype)
        self.output = _linear(config.hidden_size, config.hidden_size, dtype)
        cos, sin = rotary_table(config, dtype)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Let each token attend to itself and to those before it.

        Shapes:
            x_BTH: (B, T, H), T at most `sequence_length`.  returns: (B, T, H).
        """
        q_BTND = self.query(x_BTH).unflatten(-1, (-1, self.head_size))
        k_BTKD = self.key(x_BTH).unflatten(-1, (-1, self.head_size))
        v_BTKD = self.value(x_BTH).unflatten(-1, (-1, self.head_size))
        mixed_BNTD = F.scaled_dot_product_attention(
            self._rotate(q_BTND).transpose(1, 2),
            self._rotate(k_BTKD).transpose(1, 2),
            v_BTKD.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.grouped,
        )
        y_BTH: Tensor = self.output(mixed_BNTD.transpose(1, 2).flatten(2))
        return y_BTH

    def _rotate(self, x_BTND: Tensor) -> Tensor:
        """Turn each pair (i, i + D/2) by its token's angle, in the table's precision."""
        length = x_BTND.shape[1]
        cos, sin = self.cos[:length, None], self.sin[:length, None]
        left, right = x_BTND.chunk(2, dim=-1)
        return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x_BTND.dtype)


@final
class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Source:
        Shazeer 2020, "GLU Variants Improve Transformer".
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = _linear(config.hidden_size, config.intermediate_size, dtype)
        self.up = _linear(config.hidden_size, config.intermediate_size, dtype)
        self.down = _linear(config.intermediate_size, config.hidden_size, dtype)

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return the MLP's output.

        Shapes:
            x_BTH: (B, T, H).  returns: (B, T, H).
        """
        y_BTH: Tensor = self.down(F.silu(self.gate(x_BTH)) * self.up(x_BTH))
        return y_BTH


def rotary_table(config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of every position's angles, computed in float64 on the CPU.

    Shapes:
        returns: (sequence_length, D / 2) twice.
    """
    pairs = torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size
    positions = torch.arange(config.sequence_length, dtype=torch.float64)
    angles = torch.outer(positions, config.rope_theta**-pairs)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _linear(width_in: int, width_out: int, dtype: torch.dtype) -> nn.Linear:
    # On `meta` first, so that no first weights are drawn only to be overwritten.
    linear = nn.Linear(width_in, width_out, bias=False, device="meta", dtype=dtype)
    linear.weight = nn.Parameter(torch.empty(width_out, width_in, dtype=dtype))
    return linear


@torch.no_grad()
def _fill(layer: nn.Module, config: ModelConfig, index: int, seed: int) -> None:
    """Give a layer its first weights: norms 1, matrices normal, those that write to the residual smaller.

    Source:
        Radford et al. 2019, "Language models are unsupervised multitask learners" (1 / sqrt(2 blocks)).
    """
    residual_std = INIT_STD / math.sqrt(2 * config.num_blocks)
    if isinstance(layer, Head):
        # A tied head starts as the embedding, though another process may hold that.
        index = 0 if config.tied_embeddings else index
    stream = hashlib.sha256(f"hybrid layer {index} of seed {seed}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(stream[:8], "little") >> 1)
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(1.0)
        else:
            writes_residual = name in ("attention.output.weight", "mlp.down.weight")
            _fill_normal(parameter, residual_std if writes_residual else INIT_STD, generator)


def _fill_normal(weight: Tensor, std: float, generator: torch.Generator) -> None:
    """Fill with sums of four uniform draws: nearly normal, and never beyond 3.5 standard deviations.

    `normal_` takes logarithms and cosines whose last bits depend on the CPU's instruction set. Uniform
    draws and sums don't, so that two hosts of different make start a tied embedding from the same bits.
    """
    draws = torch.zeros(weight.shape)
    for _ in range(4):
        draws += torch.rand(weight.shape, generator=generator)
    # The sum of four has mean 2 and variance 4/12.
    weight.copy_(draws.sub_(2.0).mul_(std * math.sqrt(3.0)))
