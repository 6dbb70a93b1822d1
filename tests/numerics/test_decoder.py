"""The decoder: equal to a plain reference, the same under every split, and able to learn."""

import itertools
import math

import numpy as np
import pytest
import torch

from hybrid.config import DataConfig, ModelConfig
from hybrid.models.decoder import INIT_STD, Block, Head, RMSNorm, build_layer, layer_name
from hybrid.models.sampler import batch_at, held_out_batch
from hybrid.models.stage import (
    Stage,
    boundary_dtype,
    boundary_shape,
    build_stage,
    compute_context,
    microbatch_loss,
    named_state,
    parameter_dtype,
    tied_parameters,
)
from hybrid.models.tokens import prepare_data


def small(**more):
    return ModelConfig(
        **{
            "num_blocks": 3,
            "hidden_size": 32,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 48,
            "vocab_size": 300,
            "sequence_length": 12,
            **more,
        }
    )


def tokens(config, samples=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, config.sequence_length)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    return ids, torch.randint(config.vocab_size, shape, generator=generator)


def every_split(num_layers):
    """Bounds of every way to cut the layers into contiguous stages."""
    for count in range(num_layers):
        for cuts in itertools.combinations(range(1, num_layers), count):
            yield (0, *cuts, num_layers)


def run_pipeline(stages, ids, targets, precision):
    """Forward and backward stage by stage, as workers do; nothing but values crosses a cut."""
    with compute_context(precision):
        sent, entered = ids, []
        for stage in stages:
            if not stage.is_first:
                sent = sent.detach().requires_grad_()
            entered.append((sent, out := stage(sent)))
            sent = out
        loss = microbatch_loss(sent, targets)
        loss.backward()
        for (_, out), (received, _) in reversed(list(itertools.pairwise(entered))):
            out.backward(received.grad)
    return loss


def states_and_grads(stages):
    state = {name: p for stage in stages for name, p in named_state(stage).items()}
    return state, {name: p.grad for name, p in state.items()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_every_split_gives_the_whole_models_loss_and_gradients_bit_for_bit(precision, tied):
    config = small(tied_embeddings=tied)
    batches = [tokens(config, seed=seed) for seed in range(2)]
    expected = None
    for bounds in every_split(config.num_layers):
        stages = [
            build_stage(config, first, end, seed=7, dtype=parameter_dtype(precision))
            for first, end in itertools.pairwise(bounds)
        ]
        losses = [run_pipeline(stages, *batch, precision) for batch in batches]
        state, grads = states_and_grads(stages)
        if expected is None:
            expected = (losses, state, grads)
            assert all(grad is not None and grad.abs().max() > 0 for grad in grads.values())
            continue
        assert list(state) == list(expected[1])
        assert all(torch.equal(mine, whole) for mine, whole in zip(losses, expected[0], strict=True))
        for name in state:
            assert torch.equal(state[name], expected[1][name]), (bounds, name)
            assert torch.equal(grads[name], expected[2][name]), (bounds, name)


def test_first_weights_depend_on_seed_and_layer_alone():
    config = small()
    before = {i: build_layer(config, i, seed=3, dtype=torch.float32) for i in range(config.num_layers)}
    torch.manual_seed(99)
    torch.rand(1000)
    for index in reversed(range(config.num_layers)):
        again = build_layer(config, index, seed=3, dtype=torch.float32).state_dict()
        other = build_layer(config, index, seed=4, dtype=torch.float32).state_dict()
        for name, weight in before[index].state_dict().items():
            assert torch.equal(weight, again[name])
            assert weight.dim() == 1 or not torch.equal(weight, other[name])
    assert not torch.equal(before[1].mlp.up.weight, before[2].mlp.up.weight)
    assert not torch.equal(before[1].mlp.up.weight, before[1].mlp.gate.weight)


def test_building_a_layer_leaves_torchs_own_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_layer(small(), 1, seed=3, dtype=torch.float32)
    assert torch.equal(torch.rand(3), expected)


def test_a_tied_head_starts_as_the_embedding_and_an_untied_one_does_not():
    for tied in (True, False):
        config = small(tied_embeddings=tied)
        state = named_state(build_stage(config, 0, config.num_layers, seed=1, dtype=torch.float32))
        assert torch.equal(state["embedding.weight"], state["head.weight"]) is tied
        assert state["embedding.weight"].data_ptr() != state["head.weight"].data_ptr()
        names = tied_parameters(config)
        assert names == (("embedding.weight", "head.weight") if tied else None)
        assert names is None or set(names) <= set(state)


def test_float64_weights_are_the_float32_ones_widened():
    config = small()
    narrow = named_state(build_stage(config, 0, config.num_layers, seed=1, dtype=torch.float32))
    wide = named_state(build_stage(config, 0, config.num_layers, seed=1, dtype=torch.float64))
    for name, weight in wide.items():
        assert weight.dtype == torch.float64
        assert torch.equal(weight.float(), narrow[name])
        assert torch.equal(weight, narrow[name].double())


def test_first_weights_are_spread_like_a_normal():
    config = small(hidden_size=256, num_heads=4, intermediate_size=512)
    state = build_layer(config, 1, seed=11, dtype=torch.float64).state_dict()
    residual = INIT_STD / math.sqrt(2 * config.num_blocks)
    for name, weight in state.items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
            continue
        std = residual if name in ("attention.output.weight", "mlp.down.weight") else INIT_STD
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert abs(weight.mean().item()) < 5 * std / math.sqrt(weight.numel())
        within = ((weight.abs() < std).sum() / weight.numel()).item()
        assert within == pytest.approx(0.6827, abs=0.02)


def test_names_in_the_whole_model_do_not_depend_on_the_split():
    config = small(num_blocks=12)
    assert [layer_name(config, index) for index in (0, 1, 11, 12, 13)] == [
        "embedding",
        "block.00",
        "block.10",
        "block.11",
        "head",
    ]
    stage = build_stage(config, 4, 6, seed=0, dtype=torch.float32)
    assert "block.03.attention.query.weight" in named_state(stage)
    assert len(named_state(stage)) == 18
    assert all(p.requires_grad for p in named_state(stage).values())


def test_a_stage_knows_its_ends():
    config = small()
    stages = [build_stage(config, a, b, seed=0, dtype=torch.float32) for a, b in ((0, 2), (2, 4), (4, 5), (0, 5))]
    assert [(s.is_first, s.is_last) for s in stages] == [
        (True, False),
        (False, False),
        (False, True),
        (True, True),
    ]
    assert boundary_shape(config, 4) == (4, 12, 32)


# The reference: one token, one head, one number at a time, in NumPy and float64.


def reference_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean() + eps) * weight


def reference_rotate(vector, position, theta):
    """Turn the complex number made of entries i and i + D/2."""
    half = len(vector) // 2
    pairs = vector[:half] + 1j * vector[half:]
    turned = pairs * np.exp(1j * position * theta ** -(np.arange(half) / half))
    return np.concatenate((turned.real, turned.imag))


def reference_block(config, state, x):
    """x: (T, H)."""
    size = config.head_size
    normed = [reference_norm(row, state["attention_norm.weight"], config.norm_eps) for row in x]
    out = []
    for t in range(len(x)):
        mixed = []
        for head in range(config.num_heads):
            shared = head // (config.num_heads // config.num_kv_heads)
            q_rows = slice(head * size, (head + 1) * size)
            k_rows = slice(shared * size, (shared + 1) * size)
            query = reference_rotate(state["attention.query.weight"][q_rows] @ normed[t], t, config.rope_theta)
            scores, values = [], []
            for s in range(t + 1):
                key = reference_rotate(state["attention.key.weight"][k_rows] @ normed[s], s, config.rope_theta)
                scores.append(query @ key / math.sqrt(size))
                values.append(state["attention.value.weight"][k_rows] @ normed[s])
            weights = np.exp(np.array(scores) - max(scores))
            mixed.append(weights @ np.array(values) / weights.sum())
        after = x[t] + state["attention.output.weight"] @ np.concatenate(mixed)
        inner = reference_norm(after, state["mlp_norm.weight"], config.norm_eps)
        gate = state["mlp.gate.weight"] @ inner
        inner = gate / (1 + np.exp(-gate)) * (state["mlp.up.weight"] @ inner)
        out.append(after + state["mlp.down.weight"] @ inner)
    return np.array(out)


def loud(layer):
    """Replace the quiet first weights, so that a wrong term would show."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.3 + (p.dim() == 1))
    return layer


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_a_block_equals_the_plain_reference(num_kv_heads):
    config = small(num_kv_heads=num_kv_heads, rope_theta=100.0)
    block = loud(Block(config, torch.float64))
    state = {name: p.detach().numpy() for name, p in block.named_parameters()}
    x = torch.randn(2, 12, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = np.stack([reference_block(config, state, row.numpy()) for row in x])
    np.testing.assert_allclose(block(x).detach().numpy(), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_a_blocks_gradients_are_those_of_finite_differences(num_kv_heads):
    config = small(hidden_size=8, num_heads=2, num_kv_heads=num_kv_heads, intermediate_size=5, sequence_length=4)
    block = loud(Block(config, torch.float64))
    names, values = zip(*block.named_parameters(), strict=True)
    x = torch.randn(2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(x, *parameters):
        return torch.func.functional_call(block, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x.requires_grad_(), *(value.detach().clone().requires_grad_() for value in values))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


def test_the_norms_gradients_are_those_of_finite_differences():
    norm = RMSNorm(small(hidden_size=8, num_heads=2), torch.float64)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(8, dtype=torch.float64, generator=generator).requires_grad_()

    def run(x, weight):
        return torch.func.functional_call(norm, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(run, (x, weight))


def test_the_norm_agrees_with_torchs_own_in_both_directions():
    config = small(hidden_size=64)
    norm = loud(RMSNorm(config, torch.float32))
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = norm.weight.detach().clone().requires_grad_()
    other = x.detach().clone().requires_grad_()
    ours, theirs = norm(x), torch.nn.functional.rms_norm(other, (64,), weight, config.norm_eps)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.weight.grad, weight.grad, rtol=1e-5, atol=1e-4)


def test_the_head_is_norm_and_projection():
    config = small()
    head = loud(Head(config, torch.float64))
    x = torch.randn(1, 2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    norm = head.norm.weight.detach().numpy()
    expected = [head.weight.detach().numpy() @ reference_norm(row.numpy(), norm, config.norm_eps) for row in x[0]]
    np.testing.assert_allclose(head(x)[0].detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_a_token_sees_none_that_comes_after_it():
    config = small()
    model = build_stage(config, 0, config.num_layers, seed=5, dtype=torch.float64)
    ids, _ = tokens(config)
    changed = ids.clone()
    changed[:, 7:] = (ids[:, 7:] + 1) % config.vocab_size
    with torch.no_grad():
        before, after = model(ids), model(changed)
    assert torch.equal(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7], after[:, 7])


def test_samples_of_a_microbatch_do_not_see_each_other():
    config = small()
    model = build_stage(config, 0, config.num_layers, seed=5, dtype=torch.float64)
    ids, _ = tokens(config, samples=4)
    with torch.no_grad():
        together, alone = model(ids), model(ids[2:3])
    torch.testing.assert_close(together[2:3], alone, rtol=1e-12, atol=1e-12)


def test_the_loss_is_the_mean_negative_log_likelihood():
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[0, 1, 2], [3, 4, 0]])
    rows = [row[t] - row.exp().sum().log() for row, t in zip(logits.view(6, 5), targets.flatten(), strict=True)]
    assert microbatch_loss(logits, targets).item() == pytest.approx(-sum(rows).item() / 6, rel=1e-12)
    assert microbatch_loss(logits, targets).dtype == torch.float64
    assert microbatch_loss(logits.bfloat16(), targets).dtype == torch.float32


def test_the_first_loss_is_that_of_a_uniform_guess():
    config = small(vocab_size=1000)
    model = build_stage(config, 0, config.num_layers, seed=5, dtype=torch.float32)
    assert microbatch_loss(model(tokens(config)[0]), tokens(config)[1]).item() == pytest.approx(math.log(1000), abs=0.1)


def gradient(model: Stage, precision, ids, targets):
    model.zero_grad()
    with compute_context(precision):
        loss = microbatch_loss(model(ids), targets)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_bf16_stays_close_to_fp32_and_keeps_float32_gradients():
    config = small(hidden_size=64, sequence_length=32)
    model = build_stage(config, 0, config.num_layers, seed=5, dtype=torch.float32)
    exact, exact_grad = gradient(model, "fp32", *tokens(config))
    rounded, rounded_grad = gradient(model, "bf16", *tokens(config))
    assert exact != rounded
    assert rounded == pytest.approx(exact, rel=2e-3)
    assert rounded_grad.dtype == torch.float32
    # bf16 keeps 8 bits: relative errors of some 2^-8, here 0.4%, add up over a few layers.
    assert (rounded_grad - exact_grad).norm() < 0.03 * exact_grad.norm()


def test_bf16_gradients_are_the_same_with_the_backward_inside_autocast():
    config = small()
    ids, targets = tokens(config)
    outside = build_stage(config, 0, config.num_layers, seed=5, dtype=torch.float32)
    inside = build_stage(config, 0, config.num_layers, seed=5, dtype=torch.float32)
    _, expected = gradient(outside, "bf16", ids, targets)
    with compute_context("bf16"):
        microbatch_loss(inside(ids), targets).backward()
    assert torch.equal(torch.cat([p.grad.flatten() for p in inside.parameters()]), expected)


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_every_layer_hands_on_the_boundarys_dtype(precision):
    config = small()
    stage = build_stage(config, 0, config.num_layers - 1, seed=5, dtype=parameter_dtype(precision))
    x = tokens(config)[0]
    with compute_context(precision):
        for layer in stage.layers.values():
            x = layer(x)
            assert x.dtype == boundary_dtype(precision)
            assert x.shape == boundary_shape(config, 2)


def test_two_blocks_learn_the_real_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path))
    config = small(num_blocks=2, hidden_size=64, intermediate_size=160, vocab_size=1024, sequence_length=64)
    data = prepare_data(DataConfig(max_bytes=1_000_000), config)
    model = build_stage(config, 0, config.num_layers, seed=1, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def held_out_loss():
        ids, targets = held_out_batch(data.held_out_tokens, first_sample=0, num_samples=16, sequence_length=64)
        with torch.no_grad():
            return microbatch_loss(model(torch.from_numpy(ids)), torch.from_numpy(targets)).item()

    before = held_out_loss()
    for step in range(30):
        ids, targets = batch_at(
            data.train_tokens,
            seed=1,
            step=step,
            global_batch=16,
            first_sample=0,
            num_samples=16,
            sequence_length=64,
        )
        optimizer.zero_grad()
        microbatch_loss(model(torch.from_numpy(ids)), torch.from_numpy(targets)).backward()
        optimizer.step()
    assert before == pytest.approx(math.log(1024), abs=0.2)
    assert held_out_loss() < before - 1.0
