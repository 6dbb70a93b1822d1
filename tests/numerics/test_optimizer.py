"""AdamW against its formula and torch's own, the learning rate at known steps, clipping by the norm of all layers."""

import math

import pytest
import torch

from hybrid.config import OptimizerConfig
from hybrid.runtime.optimizer import (
    BLOCK,
    AdamW,
    block_squares,
    clip_coefficient,
    global_norm,
    learning_rate,
    squared_norm,
    sum_in_order,
)

CONFIG = OptimizerConfig(learning_rate=0.01, warmup_steps=2, beta1=0.9, beta2=0.95, weight_decay=0.1, clip_norm=None)
SHAPES = {"matrix": (17, 9), "vector": (33,), "wide": (3, 5000)}
NUM_STEPS = 8


def _parameters(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(1)
    made = {name: torch.randn(shape, generator=chance, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


def _gradients(step: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    chance = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(shape, generator=chance, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}


def _run(config: OptimizerConfig, dtype: torch.dtype, norm: float = 1.0) -> tuple[dict[str, torch.Tensor], AdamW]:
    parameters = _parameters(dtype)
    optimizer = AdamW(parameters, config, NUM_STEPS)
    for step in range(NUM_STEPS):
        for name, gradient in _gradients(step, dtype).items():
            parameters[name].grad = gradient
        optimizer.step(step, norm)
    return {name: value.detach() for name, value in parameters.items()}, optimizer


def _by_formula(config: OptimizerConfig, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Loshchilov and Hutter's algorithm 2, line by line, in float64."""
    out = {}
    for name, start in _parameters(torch.float64).items():
        theta, m, v = start.detach().clone(), torch.zeros(SHAPES[name]).double(), torch.zeros(SHAPES[name]).double()
        decay = config.weight_decay if theta.ndim >= 2 else 0.0
        for t in range(1, NUM_STEPS + 1):
            g = _gradients(t - 1, torch.float64)[name] * scale
            rate = learning_rate(config, t - 1, NUM_STEPS)
            m = config.beta1 * m + (1 - config.beta1) * g
            v = config.beta2 * v + (1 - config.beta2) * g * g
            m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
            theta = theta - rate * (m_hat / (v_hat.sqrt() + config.eps) + decay * theta)
        out[name] = theta
    return out


def test_adamw_is_its_formula_in_float64():
    ours, _ = _run(CONFIG, torch.float64)
    for name, wanted in _by_formula(CONFIG).items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-13, atol=1e-15)


def test_adamw_is_torchs_own_in_float64():
    parameters = _parameters(torch.float64)
    groups = [
        {"params": [parameters["matrix"], parameters["wide"]], "weight_decay": CONFIG.weight_decay},
        {"params": [parameters["vector"]], "weight_decay": 0.0},
    ]
    theirs = torch.optim.AdamW(groups, betas=(CONFIG.beta1, CONFIG.beta2), eps=CONFIG.eps, foreach=False)
    for step in range(NUM_STEPS):
        for name, gradient in _gradients(step, torch.float64).items():
            parameters[name].grad = gradient
        for group in theirs.param_groups:
            group["lr"] = learning_rate(CONFIG, step, NUM_STEPS)
        theirs.step()
    ours, optimizer = _run(CONFIG, torch.float64)
    for name, value in parameters.items():
        torch.testing.assert_close(ours[name], value.detach(), rtol=1e-13, atol=1e-15)
        for key, moment in optimizer.state()[name].items():
            torch.testing.assert_close(moment, theirs.state[value][key], rtol=1e-13, atol=1e-15)


def test_in_float32_it_stays_near_the_formula_in_float64():
    ours, _ = _run(CONFIG, torch.float32)
    for name, wanted in _by_formula(CONFIG).items():
        torch.testing.assert_close(ours[name].double(), wanted, rtol=2e-5, atol=2e-6)


def test_gradients_beyond_the_norm_are_scaled_down_together():
    clipped = CONFIG.model_copy(update={"clip_norm": 0.5})
    ours, _ = _run(clipped, torch.float64, norm=4.0)
    for name, wanted in _by_formula(CONFIG, scale=0.125).items():
        torch.testing.assert_close(ours[name], wanted, rtol=1e-12, atol=1e-14)
    within, _ = _run(clipped, torch.float64, norm=0.5)
    free, _ = _run(CONFIG, torch.float64)
    assert all(torch.equal(within[name], free[name]) for name in SHAPES)


def test_vectors_do_not_decay_and_matrices_do():
    still = CONFIG.model_copy(update={"warmup_steps": 0})
    parameters = _parameters(torch.float64)
    before = {name: value.detach().clone() for name, value in parameters.items()}
    optimizer = AdamW(parameters, still, NUM_STEPS)
    for value in parameters.values():
        value.grad = torch.zeros_like(value)
    optimizer.step(0, 0.0)
    assert torch.equal(parameters["vector"].detach(), before["vector"])
    torch.testing.assert_close(parameters["matrix"].detach(), before["matrix"] * (1 - 0.01 * 0.1), rtol=1e-15, atol=0)


def test_the_gradients_are_cleared_and_keep_their_memory():
    parameters = _parameters(torch.float32)
    optimizer = AdamW(parameters, CONFIG, NUM_STEPS)
    gradient = torch.ones(SHAPES["matrix"])
    parameters["matrix"].grad = gradient
    optimizer.step(0, 1.0)
    assert parameters["matrix"].grad is gradient
    assert not gradient.any()
    assert parameters["vector"].grad is None


def test_a_state_that_is_saved_and_loaded_goes_on_with_the_same_bits():
    whole, _ = _run(CONFIG, torch.float32)
    parameters = _parameters(torch.float32)
    first = AdamW(parameters, CONFIG, NUM_STEPS)
    for step in range(NUM_STEPS):
        if step == 5:
            state = {name: {key: m.clone() for key, m in moments.items()} for name, moments in first.state().items()}
            first = AdamW(parameters, CONFIG, NUM_STEPS)
            first.load_state(state)
        for name, gradient in _gradients(step, torch.float32).items():
            parameters[name].grad = gradient
        first.step(step, 1.0)
    assert all(torch.equal(parameters[name].detach(), whole[name]) for name in SHAPES)


@pytest.mark.parametrize(
    ("step", "wanted"),
    [
        (0, 1e-4),  # a tenth of the peak
        (4, 5e-4),
        (9, 1e-3),  # the peak, at the last step of the warm-up
        (10, 1e-3),
        (60 - 1 - 24 - 1, 1e-4 + 9e-4 * 0.5 * (1 + math.cos(math.pi * 24 / 49))),
        (59, 1e-4),  # the floor, at the last step
        (100, 1e-4),  # and beyond
    ],
)
def test_the_learning_rate_at_known_steps(step, wanted):
    config = OptimizerConfig(learning_rate=1e-3, warmup_steps=10, min_learning_rate_share=0.1)
    assert learning_rate(config, step, 60) == pytest.approx(wanted, rel=1e-12)


def test_the_learning_rate_without_warm_up_and_of_the_shortest_jobs():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, min_learning_rate_share=0.0)
    assert learning_rate(config, 0, 11) == 1.0
    assert learning_rate(config, 5, 11) == pytest.approx(0.5)
    assert learning_rate(config, 10, 11) == pytest.approx(0.0, abs=1e-15)
    assert learning_rate(config, 0, 1) == 1.0
    long = OptimizerConfig(learning_rate=1.0, warmup_steps=100)
    assert [learning_rate(long, step, 3) for step in range(3)] == pytest.approx([0.01, 0.02, 0.03])


def test_the_global_norm_is_that_of_all_gradients_and_adds_in_layer_order():
    layers = [[torch.randn(7, 3), torch.randn(5)], [torch.randn(1000)], [torch.randn(2, 2, 2)]]
    flat = torch.cat([tensor.double().flatten() for layer in layers for tensor in layer])
    squares = [squared_norm(layer) for layer in layers]
    assert global_norm(squares) == pytest.approx(flat.norm().item(), rel=1e-12)
    assert global_norm([1e16, 1.0, 1.0]) == math.sqrt(1e16 + 1.0 + 1.0)
    assert global_norm([]) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_makes_a_norm_that_is_no_number(bad):
    assert math.isnan(global_norm([1.0, squared_norm([torch.tensor([1.0, bad])]), 2.0]))


def test_squares_that_overflow_float32_are_still_summed():
    assert squared_norm([torch.full((4,), 1e30)]) == pytest.approx(4e60)


@pytest.mark.parametrize(
    ("norm", "limit", "wanted"), [(2.0, None, 1.0), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0), (4.0, 1.0, 0.25), (0.0, 1.0, 1.0)]
)
def test_the_clipping_coefficient(norm, limit, wanted):
    assert clip_coefficient(norm, limit) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_owners_of_parts_update_the_bits_of_an_update_of_the_whole(dtype, clip_norm):
    chance = torch.Generator().manual_seed(5)
    config = OptimizerConfig(clip_norm=clip_norm)
    size = 3 * BLOCK + 1237
    first = torch.randn(size, generator=chance, dtype=dtype).view(1, -1)
    parts = (slice(0, BLOCK), slice(BLOCK, 3 * BLOCK), slice(3 * BLOCK, size))
    whole = first.clone().requires_grad_()
    copies = [first.clone().requires_grad_() for _ in parts]
    one = AdamW({"w": whole}, config, 10)
    owners = [AdamW({"w": copy}, config, 10, {"w": part}) for copy, part in zip(copies, parts, strict=True)]
    for step in range(5):
        grad = torch.randn(size, generator=chance, dtype=dtype).view(1, -1)
        for parameter, optimizer in zip((whole, *copies), (one, *owners), strict=True):
            parameter.grad = grad.clone()
            optimizer.step(step, 2.0)
        for copy, part, owner in zip(copies, parts, owners, strict=True):
            assert torch.equal(copy.view(-1)[part], whole.view(-1)[part])
            assert owner.state()["w"]["exp_avg"].numel() == part.stop - part.start


def test_the_norm_of_parts_in_their_order_is_the_norm_of_the_whole():
    x = torch.randn(5 * BLOCK + 77)
    parts = [block_squares(x[: 2 * BLOCK]), block_squares(x[2 * BLOCK : 3 * BLOCK]), block_squares(x[3 * BLOCK :])]
    assert sum_in_order(parts) == squared_norm([x])
    assert sum_in_order(parts) == pytest.approx(float(x.double().square().sum()))
