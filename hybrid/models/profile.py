"""The built-in decoder's profile by arithmetic: FLOPs, parameters, saved and sent bytes of each layer.

Pure: no torch, so that a driver plans without importing it. Tests hold each formula against torch's own
counter and against what autograd saves in a real run.
"""

from __future__ import annotations

from hybrid.config import ModelConfig, Precision
from hybrid.scheduler.profile import LayerProfile, ModelProfile

_ACTIVATION_BYTES = {"fp32": 4, "bf16": 2, "fp64": 8}
# Statistics (a norm's scale, attention's log-sum-exp, the loss) are kept in the parameters' width.
_PARAMETER_BYTES = {"fp32": 4, "bf16": 4, "fp64": 8}
_ID_BYTES = 8


def build_profile(model: ModelConfig, *, microbatch: int, precision: Precision) -> ModelProfile:
    """Return what each layer costs for one microbatch.

    FLOPs are those of matrix products, two a multiply-add, attention counted without the saving of its
    causal half, as torch's counter does; the backward's are twice the forward's. Saved bytes are what
    autograd holds from a layer's forward to its backward beyond the weights and their compute copies; the
    head's include the loss.
    """
    rows = [_embedding(model, microbatch, precision)]
    rows += [_block(model, index, microbatch, precision) for index in range(model.num_blocks)]
    rows.append(_head(model, microbatch, precision))
    return ModelProfile(
        model=f"decoder of {model.num_blocks} blocks of {model.hidden_size}",
        microbatch=microbatch,
        sequence_length=model.sequence_length,
        precision=precision,
        bytes_per_parameter=bytes_per_parameter(precision),
        source="analytic",
        layers=tuple(rows),
    )


def bytes_per_parameter(precision: Precision) -> int:
    """Return bytes held for a parameter: weight, gradient, two Adam moments, and under bf16 the bf16 copy."""
    return 4 * _PARAMETER_BYTES[precision] + (2 if precision == "bf16" else 0)


def _embedding(model: ModelConfig, microbatch: int, precision: Precision) -> LayerProfile:
    tokens = microbatch * model.sequence_length
    return LayerProfile(
        name="embedding",
        kind="embedding",
        num_parameters=model.vocab_size * model.hidden_size,
        forward_flops=0.0,
        backward_flops=0.0,
        saved_activation_bytes=tokens * _ID_BYTES,
        output_bytes=tokens * model.hidden_size * _ACTIVATION_BYTES[precision],
    )


def _block(model: ModelConfig, index: int, microbatch: int, precision: Precision) -> LayerProfile:
    tokens = microbatch * model.sequence_length
    hidden, inner = model.hidden_size, model.intermediate_size
    narrow = model.num_kv_heads * model.head_size
    matrices = 2 * hidden * hidden + 2 * hidden * narrow + 3 * hidden * inner
    forward_flops = 2.0 * tokens * matrices + 4.0 * tokens * model.sequence_length * hidden
    # Two residuals, two normed inputs, query and mixed values are `hidden` wide; key and value `narrow`;
    # gate, its silu, up and their product `inner`.
    widths = 6 * hidden + 2 * narrow + 4 * inner
    statistics = model.num_heads + 2
    return LayerProfile(
        name=f"block.{index:02d}",
        kind="block",
        num_parameters=matrices + 2 * hidden,
        forward_flops=forward_flops,
        backward_flops=2.0 * forward_flops,
        saved_activation_bytes=tokens
        * (widths * _ACTIVATION_BYTES[precision] + statistics * _PARAMETER_BYTES[precision]),
        output_bytes=tokens * hidden * _ACTIVATION_BYTES[precision],
    )


def _head(model: ModelConfig, microbatch: int, precision: Precision) -> LayerProfile:
    tokens = microbatch * model.sequence_length
    hidden, vocab = model.hidden_size, model.vocab_size
    forward_flops = 2.0 * tokens * hidden * vocab
    wide = _PARAMETER_BYTES[precision]
    return LayerProfile(
        name="head",
        kind="head",
        num_parameters=vocab * hidden + hidden,
        forward_flops=forward_flops,
        backward_flops=2.0 * forward_flops,
        # The norm's input, scale and output; the loss's log-probabilities and targets, and their number.
        saved_activation_bytes=tokens * (2 * hidden * _ACTIVATION_BYTES[precision] + wide + vocab * wide + _ID_BYTES)
        + wide,
        output_bytes=0,
    )
