"""A backward in two parts, or after a second forward, leaves the bits of a whole one; and frees what it says."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import hybrid_kernels as hk
from hybrid.backends.cpu import CpuBackend
from hybrid.backends.number_emulation import MatmulNumerics, emulated_matmuls
from hybrid.backends.weight_gradients import Deferral, active_deferral
from hybrid.config import ModelConfig
from hybrid.hardware import load_catalog
from hybrid.models.stage import (
    Stage,
    boundary_dtype,
    boundary_shape,
    build_stage,
    microbatch_loss,
    named_state,
    parameter_dtype,
)
from hybrid.runtime.compute import StageCompute
from hybrid.runtime.warmup import warm_up

NUM_MICROBATCHES = 3
BATCH = 2
STAGES = {"whole model": (0, 5), "first": (0, 2), "middle": (1, 4), "last": (3, 5), "embedding": (0, 1), "head": (4, 5)}
WAYS = {
    "split": {"splits": True},
    "whole, though it could be split": {"splits": True},
    "recomputed": {"recompute": True},
    "recomputed and split": {"recompute": True, "splits": True},
}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def _model(*, tied: bool = True, num_kv_heads: int = 2) -> ModelConfig:
    return ModelConfig(
        num_blocks=3,
        hidden_size=32,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        intermediate_size=48,
        vocab_size=320,
        sequence_length=16,
        tied_embeddings=tied,
    )


def _compute(model: ModelConfig, layers: tuple[int, int], precision: str, **way: bool) -> StageCompute:
    stage = build_stage(model, *layers, seed=1, dtype=parameter_dtype(precision))
    backend = CpuBackend(capabilities_of_cpu())
    return StageCompute(stage, backend, precision=precision, num_microbatches=NUM_MICROBATCHES, **way)


def capabilities_of_cpu():
    from hybrid.runtime.capabilities import capabilities_of

    return capabilities_of(load_catalog().chip("cpu"), None)


def _step(compute: StageCompute, precision: str, order: tuple[str, ...]) -> list[Tensor | None]:
    """Run a step in an order of actions (`F0`, `B0`, `I0`, `W0`); return everything that it makes."""
    model, made = compute.stage.config, []
    shape = boundary_shape(model, BATCH)
    with compute.context():
        for action in order:
            kind, microbatch = action[0], int(action[1:])
            chance = torch.Generator().manual_seed(microbatch)
            ids, targets = (torch.randint(model.vocab_size, shape[:2], generator=chance) for _ in range(2))
            x, grad = (torch.randn(shape, generator=chance).to(boundary_dtype(precision)) for _ in range(2))
            upstream = None if compute.is_last else grad
            match kind:
                case "F":
                    made.append(compute.forward(microbatch, ids if compute.is_first else x, targets))
                case "B":
                    made.append(compute.backward(microbatch, upstream))
                case "I":
                    made.append(compute.backward_input(microbatch, upstream))
                case _:
                    compute.backward_weight(microbatch)
    if compute.is_last:
        made.append(torch.tensor(compute.take_loss(), dtype=torch.float64))
    return [*made, *(parameter.grad for parameter in named_state(compute.stage).values())]


def _is_same(one: list[Tensor | None], other: list[Tensor | None]) -> bool:
    return len(one) == len(other) and all(
        a is b if a is None or b is None else torch.equal(a, b) for a, b in zip(one, other, strict=True)
    )


WHOLE = ("F0", "F1", "B0", "F2", "B1", "B2")
SPLIT = ("F0", "F1", "I0", "F2", "I1", "W0", "I2", "W1", "W2")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_the_bits_are_those_of_a_whole_backward(precision: str, stage: str, way: str, tied: bool) -> None:
    model = _model(tied=tied)
    wanted = _step(_compute(model, STAGES[stage], precision), precision, WHOLE)
    compute = _compute(model, STAGES[stage], precision, **WAYS[way])
    found = _step(compute, precision, SPLIT if way.split()[-1] == "split" else WHOLE)
    assert any(tensor is not None and tensor.count_nonzero() for tensor in wanted)
    assert _is_same(found, wanted)


def test_heads_that_are_not_grouped_split_too() -> None:
    model = _model(num_kv_heads=4)
    wanted = _step(_compute(model, (1, 5), "fp64"), "fp64", WHOLE)
    assert _is_same(_step(_compute(model, (1, 5), "fp64", splits=True), "fp64", SPLIT), wanted)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("matmul", ["bf16", "fp8"])
def test_emulated_products_split_with_the_same_bits(matmul: str, rounding: str) -> None:
    numerics = MatmulNumerics(matmul=matmul, rounding=rounding)

    def run(order: tuple[str, ...], **way: bool) -> list[Tensor | None]:
        compute = _compute(_model(), (1, 4), "fp32", **way)
        with emulated_matmuls(compute.stage, numerics, seed=3):
            return _step(compute, "fp32", order)

    # One microbatch: chance is drawn in the order of the products.
    assert _is_same(run(("F0", "I0", "W0"), splits=True), run(("F0", "B0")))


class _Kernels(nn.Module):
    """A block made of the project's kernels between products with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.ones(8, dtype=torch.float64))
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(8, 8, dtype=torch.float64)) for _ in range(5)])
        self.head = nn.Parameter(torch.randn(11, 8, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, gate, up = (F.linear(hk.rmsnorm(x, self.norm, eps=1e-5), weight) for weight in self.weights)
        cos, sin = hk.rope_tables(x.shape[1], 4, theta=1e4, dtype=torch.float64)
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in (q, k, v))
        mixed = hk.attention(hk.rope(q, cos, sin), hk.rope(k, cos, sin), v).transpose(1, 2).flatten(2)
        y = F.linear(mixed + hk.swiglu(gate, up), self.weights[0])
        labels = torch.arange(y.shape[0] * y.shape[1]) % 11
        return hk.cross_entropy(y.flatten(0, 1), self.head, labels).sum()


def test_the_projects_kernels_split_with_the_same_bits() -> None:
    def run(puts_off: bool) -> list[Tensor | None]:
        torch.manual_seed(0)
        block, deferral = _Kernels(), Deferral()
        x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
        with deferral.catching():
            loss = block(x)
        deferral.puts_off = puts_off
        loss.backward()
        if puts_off:
            assert all(weight.grad is None for weight in block.weights)
            assert deferral.held_bytes > 0
            deferral.run()
        return [x.grad, *(parameter.grad for parameter in block.parameters())]

    torch.manual_seed(0)
    block = _Kernels()
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    block(x).backward()
    wanted = [x.grad, *(parameter.grad for parameter in block.parameters())]
    assert _is_same(run(True), wanted)
    assert _is_same(run(False), wanted)


def _saved_by_forward(compute: StageCompute) -> list[weakref.ref[Tensor]]:
    """Run a forward; return what autograd saved of it, without holding it."""
    saved: list[weakref.ref[Tensor]] = []
    own = {parameter.untyped_storage()._cdata for parameter in compute.stage.parameters()}
    own |= {buffer.untyped_storage()._cdata for buffer in compute.stage.buffers()}

    def pack(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            saved.append(weakref.ref(x))
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        compute.forward(0, torch.randn(boundary_shape(compute.stage.config, BATCH)), None)
    return saved


def test_the_inputs_part_frees_what_the_weights_part_does_not_need() -> None:
    compute = _compute(_model(), (1, 4), "fp32", splits=True)
    saved = _saved_by_forward(compute)
    before = sum(ref() is not None for ref in saved)
    compute.backward_input(0, torch.randn(boundary_shape(compute.stage.config, BATCH)))
    alive = [tensor for ref in saved if (tensor := ref()) is not None]
    weights = named_state(compute.stage)
    put_off = {name for name, weight in weights.items() if weight.grad is None}
    assert put_off == {name for name, weight in weights.items() if weight.dim() == 2}
    # Of each block the inputs of its seven products stay: three different ones and the MLP's.
    assert before > 30
    assert len({tensor.untyped_storage()._cdata for tensor in alive}) <= 3 * 4
    del alive
    compute.backward_weight(0)
    assert not any(ref() is not None for ref in saved)


def test_what_is_held_is_measured_and_told_to_the_backend() -> None:
    compute = _compute(_model(), (1, 4), "fp32", splits=True)
    assert set(warm_up(compute, BATCH, "fp32")) == {"F", "I", "W"}
    assert 0 < compute.put_off_bytes < compute.saved_bytes
    held = []
    x = torch.randn(boundary_shape(compute.stage.config, BATCH))
    for act in (
        lambda: compute.forward(0, x, None),
        lambda: compute.backward_input(0, x),
        lambda: compute.backward_weight(0),
    ):
        act()
        held.append(compute.backend.memory_stats().allocated_bytes)
    assert held == [compute.saved_bytes, compute.put_off_bytes, 0]


def test_a_forward_that_will_be_run_again_holds_its_input_only() -> None:
    compute = _compute(_model(), (1, 4), "fp32", recompute=True)
    assert set(warm_up(compute, BATCH, "fp32")) == {"F", "B"}
    saved = _saved_by_forward(compute)
    assert saved == [], "the inner hooks see all that is saved"
    x = torch.randn(boundary_shape(compute.stage.config, BATCH))
    assert compute.backend.memory_stats().allocated_bytes == compute.input_bytes == x.nbytes
    compute.backward(0, x)
    assert compute.backend.memory_stats().allocated_bytes == 0
    assert compute.backend.memory_stats().peak_bytes == compute.saved_bytes


def test_only_products_with_parameters_of_this_threads_forward_are_caught() -> None:
    weight, x = nn.Parameter(torch.ones(2, 2)), torch.ones(1, 2)
    deferral = Deferral()
    with deferral.catching():
        assert active_deferral() is deferral
        caught, plain = F.linear(x, weight), F.linear(x, torch.ones(2, 2, requires_grad=True))
        frozen = F.linear(x, nn.Parameter(torch.ones(2, 2), requires_grad=False))
    assert active_deferral() is None
    assert "_Linear" in type(caught.grad_fn).__name__
    assert "_Linear" not in type(plain.grad_fn).__name__
    assert frozen.grad_fn is None
    assert "_Linear" not in type(F.linear(x, weight).grad_fn).__name__


def test_a_stage_of_the_reference_is_not_changed_by_being_split() -> None:
    stage = build_stage(_model(), 3, 5, seed=1, dtype=torch.float32)
    assert isinstance(stage, Stage)
    x = torch.randn(boundary_shape(stage.config, BATCH))
    targets = torch.zeros(BATCH, stage.config.sequence_length, dtype=torch.int64)
    before = microbatch_loss(stage(x), targets)
    with Deferral().catching():
        caught = microbatch_loss(stage(x), targets)
    assert torch.equal(before, caught)
