"""The analytic profile: each number equals what torch counts or holds in a real run."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from hybrid.config import ModelConfig
from hybrid.models.decoder import layer_name
from hybrid.models.measure import measure_saved_bytes
from hybrid.models.profile import build_profile
from hybrid.models.stage import (
    boundary_dtype,
    boundary_shape,
    build_stage,
    compute_context,
    named_state,
    parameter_dtype,
)

SHAPES = {
    "grouped": ModelConfig(
        num_blocks=2,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=176,
        vocab_size=512,
        sequence_length=32,
    ),
    "one-key-head": ModelConfig(
        num_blocks=3,
        hidden_size=96,
        num_heads=6,
        num_kv_heads=1,
        intermediate_size=256,
        vocab_size=1000,
        sequence_length=64,
        tied_embeddings=False,
    ),
    "odd-sizes": ModelConfig(
        num_blocks=1,
        hidden_size=60,
        num_heads=3,
        num_kv_heads=3,
        intermediate_size=101,
        vocab_size=301,
        sequence_length=17,
    ),
}


@pytest.fixture(params=SHAPES)
def config(request):
    return SHAPES[request.param]


@pytest.mark.parametrize("microbatch", [1, 3])
def test_flops_are_those_that_torch_counts(config, microbatch):
    rows = build_profile(config, microbatch=microbatch, precision="fp32").layers
    shape = boundary_shape(config, microbatch)
    for index, row in enumerate(rows):
        layer = build_stage(config, index, index + 1, seed=0, dtype=torch.float32).to("meta")
        if index == 0:
            x = torch.zeros(shape[:2], dtype=torch.int64, device="meta")
        else:
            x = torch.zeros(shape, device="meta", requires_grad=True)
        with FlopCounterMode(display=False) as forward:
            y = layer(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
        counted = (forward.get_total_flops(), backward.get_total_flops())
        assert counted == (row.forward_flops, row.backward_flops), row.name


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_saved_bytes_are_those_that_autograd_holds(config, precision):
    rows = build_profile(config, microbatch=3, precision=precision).layers
    for index, row in enumerate(rows):
        stage = build_stage(config, index, index + 1, seed=0, dtype=parameter_dtype(precision))
        held = measure_saved_bytes(stage, microbatch=3, precision=precision)
        assert held == row.saved_activation_bytes, row.name


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_holds_what_its_layers_hold(config, precision):
    rows = build_profile(config, microbatch=2, precision=precision).layers
    for first, end in [(0, 2), (1, config.num_layers), (0, config.num_layers)]:
        stage = build_stage(config, first, end, seed=0, dtype=torch.float32)
        held = measure_saved_bytes(stage, microbatch=2, precision=precision)
        assert held == sum(row.saved_activation_bytes for row in rows[first:end])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_fake_tensors_tell_the_same_bytes(config, precision):
    real = build_stage(config, 0, config.num_layers, seed=0, dtype=torch.float32)
    with FakeTensorMode():
        fake = build_stage(config, 0, config.num_layers, seed=0, dtype=torch.float32)
        held = measure_saved_bytes(fake, microbatch=2, precision=precision)
    assert held == measure_saved_bytes(real, microbatch=2, precision=precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
def test_parameters_and_outputs_are_those_of_the_modules(config, precision):
    rows = build_profile(config, microbatch=2, precision=precision).layers
    assert [row.name for row in rows] == [layer_name(config, index) for index in range(config.num_layers)]
    dtype = boundary_dtype(precision)
    for index, row in enumerate(rows):
        stage = build_stage(config, index, index + 1, seed=0, dtype=parameter_dtype(precision))
        assert row.num_parameters == sum(p.numel() for p in named_state(stage).values())
        if stage.is_last:
            assert row.output_bytes == 0
            continue
        shape = boundary_shape(config, 2)
        x = torch.zeros(shape[:2], dtype=torch.int64) if index == 0 else torch.zeros(shape, dtype=dtype)
        with compute_context(precision):
            y = stage(x)
        assert (y.shape, y.dtype) == (shape, dtype)
        assert row.output_bytes == y.nbytes


def test_a_bf16_copy_of_the_weights_is_held_once_a_step_and_not_once_a_microbatch():
    config = SHAPES["grouped"]
    stage = build_stage(config, 1, 2, seed=0, dtype=torch.float32)
    x = torch.zeros(boundary_shape(config, 3), dtype=torch.bfloat16)
    counted = []

    def pack(x):
        if x.dtype == torch.bfloat16:
            counted.append((x.untyped_storage().data_ptr(), tuple(x.shape)))
        return x

    alive = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), compute_context("bf16"):
        alive += [stage(x), stage(x)]
    weights = {tuple(p.shape[::-1]) for p in stage.parameters() if p.dim() == 2}
    copies = {(pointer, shape) for pointer, shape in counted if shape in weights or shape[::-1] in weights}
    assert len({pointer for pointer, _ in copies}) == 7


@pytest.mark.parametrize(("precision", "expected"), [("fp32", 16), ("bf16", 18), ("fp64", 32)])
def test_a_parameter_costs_its_weight_its_gradient_and_two_moments(precision, expected):
    assert build_profile(ModelConfig(), microbatch=1, precision=precision).bytes_per_parameter == expected


def test_layers_of_a_kind_cost_the_same():
    rows = build_profile(SHAPES["one-key-head"], microbatch=2, precision="fp32").layers
    blocks = [row for row in rows if row.kind == "block"]
    assert len(blocks) == 3
    assert len({(b.num_parameters, b.forward_flops, b.saved_activation_bytes, b.output_bytes) for b in blocks}) == 1
