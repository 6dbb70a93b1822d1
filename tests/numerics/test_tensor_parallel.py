"""A stage whose weights are cut over several ranks computes what the whole stage computes."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid.backends.weight_gradients import Deferral
from hybrid.config import ModelConfig
from hybrid.models.axis import Axis
from hybrid.models.axis_functions import Cut, Join
from hybrid.models.shards import shard_of
from hybrid.models.stage import Stage, build_stage, named_state
from hybrid.models.tensor_parallel import TensorParallel
from hybrid.runtime.axes import StageAxes
from hybrid.runtime.stage_sums import counted_squares, sum_gradients
from hybrid.scheduler.reshard import cut
from hybrid.testing.stage_threads import run_on_axis

MODEL = ModelConfig(
    num_blocks=2,
    hidden_size=32,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=48,
    vocab_size=320,
    sequence_length=12,
    tied_embeddings=False,
)
DEGREES = [(2, True), (2, False), (4, True), (4, False)]
LAST = MODEL.num_layers - 1


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Found:
    """What one rank made of a stage's forward and backward."""

    out: Tensor
    grad_x: Tensor | None
    grads: dict[str, Tensor]


def _input(stage: Stage, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if stage.is_first:
        return torch.randint(0, MODEL.vocab_size, (3, 12), generator=generator)
    return torch.randn(3, 12, 32, generator=generator, dtype=torch.float64).to(_dtype(stage))


def _dtype(stage: Stage) -> torch.dtype:
    return next(stage.parameters()).dtype


def _targets() -> Tensor:
    return torch.randint(0, MODEL.vocab_size, (3, 12), generator=torch.Generator().manual_seed(2))


def _run(stage: Stage, x: Tensor, grad: Tensor | None) -> Found:
    leaf = x if stage.is_first else x.clone().requires_grad_()
    out = stage(leaf)
    if stage.is_last:
        out = stage.loss(out, _targets())
    torch.autograd.backward(out, grad)
    grads = {name: parameter.grad for name, parameter in named_state(stage).items()}
    return Found(out=out.detach(), grad_x=None if stage.is_first else leaf.grad, grads=grads)


def _whole(first: int, end: int, dtype: torch.dtype) -> tuple[Stage, Found]:
    stage = build_stage(MODEL, first, end, seed=5, dtype=dtype)
    return stage, _run(stage, _input(stage), None if stage.is_last else _grad(dtype))


def _grad(dtype: torch.dtype) -> Tensor:
    return torch.randn(3, 12, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def _sharded(first: int, end: int, dtype: torch.dtype, degree: int, sequence_parallel: bool) -> list[Found]:
    def work(axis: Axis) -> Found:
        parallel = TensorParallel(axis=axis, sequence_parallel=sequence_parallel)
        stage = build_stage(MODEL, first, end, seed=5, dtype=dtype, parallel=parallel)
        x, grad = _input(stage), None if stage.is_last else _own_tokens(_grad(dtype), axis)
        return _run(stage, x if stage.is_first else _own_tokens(x, axis), grad)

    found: list[Found] = run_on_axis(degree, work)
    return found


def _own_tokens(x: Tensor, axis: Any) -> Tensor:
    each = x.shape[1] // axis.size
    return x[:, axis.rank * each : (axis.rank + 1) * each].contiguous()


def _gradient(found: list[Found], name: str, whole: Tensor, *, sequence_parallel: bool) -> Tensor:
    """Return a whole parameter's gradient from what the ranks hold of it."""
    total = torch.zeros_like(whole)
    local = name.split(".", 2)[-1] if name.startswith("block") else name.split(".", 1)[-1]
    for rank, one in enumerate(found):
        shard = shard_of(MODEL, local, degree=len(found), rank=rank)
        if shard.is_whole and not sequence_parallel and not shard.counted:
            assert torch.equal(one.grads[name], found[0].grads[name]), "ranks that hold all tokens agree bit for bit"
            continue
        total.narrow(shard.dim, shard.first, shard.end - shard.first).add_(one.grads[name])
    return total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("degree", "sequence_parallel"), DEGREES)
@pytest.mark.parametrize("layers", [(0, LAST + 1), (1, LAST), (2, LAST + 1)], ids=["model", "middle", "last"])
def test_a_cut_stage_has_the_whole_stages_outputs_and_gradients_within_rounding(
    layers: tuple[int, int], degree: int, sequence_parallel: bool, dtype: torch.dtype
) -> None:
    _, wanted = _whole(*layers, dtype)
    found = _sharded(*layers, dtype, degree, sequence_parallel)
    bound = {"rtol": 0.0, "atol": 1e-13 if dtype == torch.float64 else 1e-5}
    if wanted.out.ndim == 0:
        for one in found:
            torch.testing.assert_close(one.out, wanted.out, **bound)
        assert len({one.out.item() for one in found}) == 1, "every rank has the same loss"
    else:
        torch.testing.assert_close(torch.cat([one.out for one in found], 1), wanted.out, **bound)
    if wanted.grad_x is not None:
        grad_x = torch.cat([one.grad_x for one in found if one.grad_x is not None], 1)
        torch.testing.assert_close(grad_x, wanted.grad_x, **bound)
    for name, gradient in wanted.grads.items():
        got = _gradient(found, name, gradient, sequence_parallel=sequence_parallel)
        scale = gradient.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(
            got / scale, gradient / scale, **bound, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("sequence_parallel", [True, False])
def test_a_backward_in_two_parts_has_the_bits_of_a_whole_one(sequence_parallel: bool) -> None:
    def work(axis: Axis) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        parallel = TensorParallel(axis=axis, sequence_parallel=sequence_parallel)
        whole, parts = (
            build_stage(MODEL, 1, LAST + 1, seed=5, dtype=torch.float64, parallel=parallel) for _ in range(2)
        )
        x = _own_tokens(_input(whole), axis)
        whole.loss(whole(x.clone().requires_grad_()), _targets()).backward()
        deferral = Deferral()
        with deferral.catching():
            loss = parts.loss(parts(x.clone().requires_grad_()), _targets())
        deferral.puts_off = True
        loss.backward()
        assert parts.layers[1].mlp.down.weight.grad is None, "nothing was put off"
        deferral.run()
        one, other = ({name: p.grad for name, p in named_state(stage).items()} for stage in (whole, parts))
        return one, other

    for one, other in run_on_axis(2, work):
        different = [name for name in one if not torch.equal(one[name], other[name])]
        assert not different


@pytest.mark.parametrize("num_tokens", [4, 5, 7])
def test_tokens_that_do_not_divide_are_joined_and_cut_without_a_loss(num_tokens: int) -> None:
    whole = torch.randn(2, num_tokens, 3, generator=torch.Generator().manual_seed(0))

    def work(axis: Axis) -> tuple[Tensor, Tensor | None, Tensor | None]:
        first, end = cut(num_tokens, axis.size)[axis.rank]
        own = whole[:, first:end].clone().requires_grad_()
        joined = Join.apply(own, num_tokens, axis)
        joined.backward(whole * 2)
        leaf = whole.clone().requires_grad_()
        Cut.apply(leaf, axis).backward(whole[:, first:end] * 3)
        return joined.detach(), own.grad, leaf.grad

    found = run_on_axis(3, work)
    assert torch.equal(torch.cat([own_grad for _, own_grad, _ in found], 1), whole * 2)
    for joined, _, whole_grad in found:
        assert torch.equal(joined, whole)
        assert torch.equal(whole_grad, whole * 3)


@pytest.mark.parametrize("sequence_parallel", [True, False])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_the_norm_of_cut_gradients_is_the_whole_models_and_shared_heads_hold_one_sum(
    num_kv_heads: int, sequence_parallel: bool
) -> None:
    model = MODEL.model_copy(update={"num_kv_heads": num_kv_heads})

    def gradients(parallel: TensorParallel | None) -> Stage:
        stage = build_stage(model, 0, LAST + 1, seed=5, dtype=torch.float64, parallel=parallel)
        stage.loss(stage(_input(stage)), _targets()).backward()
        return stage

    def work(axis: Axis) -> tuple[dict[int, float], Tensor]:
        stage = gradients(TensorParallel(axis=axis, sequence_parallel=sequence_parallel))
        axes = StageAxes(tensor=axis, width=None)
        sum_gradients(stage, axes)
        return counted_squares(stage, axes), named_state(stage)["block.00.attention.key.weight"].grad

    whole = gradients(None)
    found = run_on_axis(4, work)
    wanted = counted_squares(whole, StageAxes(tensor=None, width=None))
    assert found[0][0] == pytest.approx(wanted, rel=1e-13)
    assert all(squares == found[0][0] for squares, _ in found), "every rank has the same bits"
    copies = 4 // num_kv_heads
    heads = torch.cat([found[rank][1] for rank in range(0, 4, copies)])
    torch.testing.assert_close(heads, named_state(whole)["block.00.attention.key.weight"].grad, rtol=1e-12, atol=1e-16)
    assert all(torch.equal(found[rank][1], found[rank // copies * copies][1]) for rank in range(4))
