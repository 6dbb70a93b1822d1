"""Our NKI kernels against the references in float64: on the interpreter at each generation's limits, and through the
vendor's own simulator where it can be imported.

Tolerances are relative to the largest magnitude of the exact result. `_FP32`: a few roundings of 2^-24 and float32 sums
of up to some hundred terms. `_BF16`: one rounding of the result to eight bits, 2^-9, doubled for what cancels.
"""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from hybrid.testing.nki import NkiRefused, interpreting, load_kernels

_FP32, _BF16 = 5e-6, 2.0**-8
_ROOT = Path(next(iter(find_spec("hybrid_kernels").submodule_search_locations)))


def _has_vendor_simulator():
    try:
        return find_spec("nki.isa") is not None and hasattr(import_module("nki"), "simulate")
    except (ImportError, ValueError):
        return False


_VENDOR = _has_vendor_simulator()


@pytest.fixture(params=["trn1", "trn2", "trn3", *(["vendor"] if _VENDOR else [])])
def variant(request, monkeypatch):
    """Return a function from an operation's name to its NKI module, ready to run."""
    torch.manual_seed(1234)
    if request.param == "vendor":
        monkeypatch.setenv("NKI_SIMULATOR", "1")
        monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", "trn2")
        yield lambda op: import_module(f"hybrid_kernels.{op}.nki")
        return
    with interpreting(request.param):
        yield lambda op: load_kernels(_ROOT / op / "nki.py")


def _reference(op):
    return import_module(f"hybrid_kernels.{op}.ref")


def _wide(*tensors):
    return tuple(t.double() if t.is_floating_point() else t for t in tensors)


def _check(got, exact, tolerance):
    assert got.shape == exact.shape
    assert torch.isfinite(got).all()
    error = (got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"relative error {float(error):.2e}"


def _tolerance(dtype):
    return _FP32 if dtype == torch.float32 else _BF16


_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.mark.skipif(not _VENDOR, reason="nki.simulate cannot be imported: every test here ran on our interpreter only")
def test_the_vendors_simulator_takes_part(variant):
    assert variant("rope")


# ---- rmsnorm, rope, swiglu -------------------------------------------------------------------------------------


@_DTYPES
@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (128, 64), (2, 65, 33), (130, 2050)], ids=str)
def test_rmsnorm_and_its_gradients(variant, shape, dtype):
    x, grad, weight = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    kernel, ref = variant("rmsnorm"), _reference("rmsnorm")
    _check(kernel.rmsnorm(x, weight, eps=1e-5), ref.rmsnorm(*_wide(x, weight), eps=1e-5), _tolerance(dtype))
    exact = ref.rmsnorm_backward(*_wide(grad, x, weight), eps=1e-5)
    for got, want in zip(kernel.rmsnorm_backward(grad, x, weight, eps=1e-5), exact, strict=True):
        assert got.dtype == dtype
        _check(got, want, _tolerance(dtype))


@pytest.mark.parametrize("scale", [1e-12, 1e12], ids=["tiny", "huge"])
def test_rmsnorm_of_tiny_and_of_large_rows(variant, scale):
    x, weight = torch.randn(5, 40) * scale, torch.ones(40)
    exact = _reference("rmsnorm").rmsnorm(*_wide(x, weight), eps=1e-5)
    _check(variant("rmsnorm").rmsnorm(x, weight, eps=1e-5), exact, _FP32)


def test_rmsnorm_keeps_a_nan_in_its_row(variant):
    x, weight = torch.randn(4, 16), torch.ones(16)
    x[2, 3] = float("nan")
    y = variant("rmsnorm").rmsnorm(x, weight, eps=1e-5)
    assert y.isnan().any(dim=1).tolist() == [False, False, True, False]


@_DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 3, 130, 16)], ids=str)
def test_rope_turns_as_the_reference_and_back(variant, shape, dtype):
    x = torch.randn(shape).to(dtype)
    kernel, ref = variant("rope"), _reference("rope")
    tables = ref.rope_tables(shape[-2], shape[-1], theta=10_000.0)
    _check(kernel.rope(x, *tables), ref.rope(*_wide(x, *tables)), _tolerance(dtype))
    _check(kernel.rope_backward(x, *tables), ref.rope_backward(*_wide(x, *tables)), _tolerance(dtype))
    if dtype == torch.float32:
        _check(kernel.rope_backward(kernel.rope(x, *tables), *tables), x.double(), _FP32)


@_DTYPES
@pytest.mark.parametrize("shape", [(1, 1), (131, 17), (2, 3, 2049)], ids=str)
def test_swiglu_and_its_gradients(variant, shape, dtype):
    grad, gate, up = (torch.randn(shape).to(dtype) for _ in range(3))
    kernel, ref = variant("swiglu"), _reference("swiglu")
    _check(kernel.swiglu(gate, up), ref.swiglu(*_wide(gate, up)), _tolerance(dtype))
    exact = ref.swiglu_backward(*_wide(grad, gate, up))
    for got, want in zip(kernel.swiglu_backward(grad, gate, up), exact, strict=True):
        _check(got, want, _tolerance(dtype))


def test_swiglu_of_a_large_negative_gate_is_zero(variant):
    y = variant("swiglu").swiglu(torch.full((2, 3), -200.0), torch.ones(2, 3))
    assert (y == 0).all()


# ---- cross-entropy ---------------------------------------------------------------------------------------------


@_DTYPES
@pytest.mark.parametrize(("tokens", "width", "words"), [(1, 2, 3), (5, 129, 513), (130, 96, 700)])
def test_cross_entropy_and_its_gradients(variant, tokens, width, words, dtype):
    hidden, weight = torch.randn(tokens, width).to(dtype), (torch.randn(words, width) / 8).to(dtype)
    labels = torch.randint(0, words, (tokens,))
    labels[1::4] = -100
    arguments = {"ignore_index": -100, "scale": 1 / tokens}
    exact = _reference("cross_entropy").cross_entropy_with_gradients(*_wide(hidden, weight), labels, **arguments)
    got = variant("cross_entropy").cross_entropy_with_gradients(hidden, weight, labels, **arguments)
    # The loss stays in float32; a gradient's logits carry the error of a float32 matmul into an exponential.
    for value, want, tolerance in zip(got, exact, (_FP32, *[max(4 * _FP32, _tolerance(dtype))] * 2), strict=True):
        _check(value, want, tolerance)


def test_cross_entropy_of_large_logits_does_not_overflow(variant):
    hidden, weight = torch.full((2, 4), 50.0), torch.eye(4)[[0, 1, 2, 3, 0]] * 10.0
    labels = torch.tensor([4, 1])
    got = variant("cross_entropy").token_losses(hidden, weight, labels, ignore_index=-100)
    _check(got, _reference("cross_entropy").token_losses(*_wide(hidden, weight), labels, ignore_index=-100), _FP32)


def test_cross_entropy_makes_only_the_gradients_that_are_needed(variant):
    hidden, weight, labels = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 1, 2])
    arguments = {"ignore_index": -100, "scale": 1.0}
    kernel = variant("cross_entropy").cross_entropy_with_gradients
    assert kernel(hidden, weight, labels, needs_weight=False, **arguments)[2] is None
    assert kernel(hidden, weight, labels, needs_hidden=False, **arguments)[1] is None


# ---- attention -------------------------------------------------------------------------------------------------


@_DTYPES
@pytest.mark.parametrize(
    ("batch", "query_heads", "kv_heads", "length", "size"),
    [(1, 1, 1, 1, 2), (2, 4, 2, 9, 8), (1, 2, 1, 130, 16), (1, 2, 2, 33, 160)],
)
def test_attention_and_its_gradients(variant, batch, query_heads, kv_heads, length, size, dtype):
    query, grad = (torch.randn(batch, query_heads, length, size).to(dtype) for _ in range(2))
    key, value = (torch.randn(batch, kv_heads, length, size).to(dtype) for _ in range(2))
    kernel, ref, scale = variant("attention"), _reference("attention"), size**-0.5
    out, logsumexp = kernel.attention_with_logsumexp(query, key, value, scale=scale)
    exact = ref.attention_with_logsumexp(*_wide(query, key, value), scale=scale)
    _check(out, exact[0], _tolerance(dtype))
    _check(logsumexp, exact[1], _FP32)
    got = kernel.attention_backward(grad, query, key, value, out, logsumexp, scale=scale)
    exact = ref.attention_backward(*_wide(grad, query, key, value), scale=scale)
    for gradient, want in zip(got, exact, strict=True):
        # A single position has zero gradients of query and key: nothing to be relative to. In bfloat16 the rounded
        # output enters the row sums, so its error of 2^-9 comes on top of the gradient's own.
        if want.abs().max() > 1e-12:
            _check(gradient, want, 2 * _tolerance(dtype))
        else:
            assert gradient.abs().max() < _BF16


def test_attention_does_not_look_ahead(variant):
    query, key, value = (torch.randn(1, 1, 140, 8) for _ in range(3))
    kernel = variant("attention")
    before = kernel.attention(query, key, value, scale=0.3)
    key[:, :, 135:], value[:, :, 135:] = 9.0, -9.0
    after = kernel.attention(query, key, value, scale=0.3)
    assert torch.equal(before[:, :, :135], after[:, :, :135])
    assert not torch.equal(before[:, :, 135:], after[:, :, 135:])


# ---- fp8_pack, reduce_add, adamw -------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [None, 0, 2**63 + 17], ids=str)
@pytest.mark.parametrize("feeds_back", [False, True], ids=["plain", "error feedback"])
@pytest.mark.parametrize(("count", "block_size"), [(1, 1), (300, 7), (40_000, 256)])
def test_fp8_pack_makes_the_references_bytes(variant, count, block_size, feeds_back, seed):
    x = torch.randn(count) * torch.exp2(torch.randint(-140, 120, (count,)).float())
    x[::17] = 0.0
    if count > 1000:
        x[5], x[700], x[3000] = float("nan"), float("-inf"), -0.0
        x[1024:1280] = 0.0
        x[2048:2304] *= 1e-30
    error = torch.randn(count) if feeds_back else None
    arguments = {"block_size": block_size, "error": error, "seed": seed}
    got = variant("fp8_pack").fp8_pack(x, **arguments)
    want = _reference("fp8_pack").fp8_pack(x, **arguments)
    assert torch.equal(got.payload, want.payload)
    assert torch.equal(got.scales.nan_to_num(-1.0), want.scales.nan_to_num(-1.0))
    if feeds_back:
        assert torch.equal(got.error, want.error)
    back = [
        m.fp8_unpack(got.payload, got.scales, block_size=block_size)
        for m in (variant("fp8_pack"), _reference("fp8_pack"))
    ]
    assert torch.equal(back[0].nan_to_num(-1.0), back[1].nan_to_num(-1.0))


def test_fp8_codes_are_those_of_the_ieee_e4m3(variant):
    # One block whose largest magnitude is 240: its scale is 1, and the codes are the values' own.
    values = np.linspace(-240.0, 240.0, 2047, dtype=np.float32)
    packed = variant("fp8_pack").fp8_pack(torch.from_numpy(values), block_size=2047)
    assert packed.scales.tolist() == [1.0]
    assert np.array_equal(packed.payload.numpy(), values.astype(ml_dtypes.float8_e4m3).view(np.uint8))


def test_fp8_unpack_reads_every_code_of_both_formats(variant):
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]
    back = variant("fp8_pack").fp8_unpack(codes, torch.ones(1), block_size=254)
    assert torch.equal(back, codes.view(torch.float8_e4m3fn).float())


def test_the_ocp_format_is_packed_without_the_chip_having_it(variant):
    # Blocks whose largest magnitude is between 240 and 448, where the formats differ, every float32 step of it.
    values = torch.cat(
        (torch.linspace(-448.0, 448.0, 4001), torch.tensor([240.0, 247.99998, 248.0, 272.0, 432.0, -0.0]))
    )
    arguments = {"block_size": 100, "fp8_format": "e4m3fn", "error": torch.zeros(values.shape)}
    got, want = (m.fp8_pack(values, **arguments) for m in (variant("fp8_pack"), _reference("fp8_pack")))
    assert torch.equal(got.payload, want.payload)
    assert torch.equal(got.scales, want.scales)
    assert torch.equal(got.error, want.error)
    assert (got.payload & 0x7F >= 0x78).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("count", [1, 2047, 128 * 2048 + 5], ids=str)
def test_reduce_add_gives_the_references_bits(variant, count, dtype):
    chunks = [torch.randn(count).to(dtype) for _ in range(3)]
    assert torch.equal(variant("reduce_add").reduce_add(chunks), _reference("reduce_add").reduce_add(chunks))


def test_adamw_follows_the_reference_over_three_steps(variant):
    kernel, ref = variant("adamw"), _reference("adamw")
    state = [torch.randn(5001), torch.zeros(5001), torch.zeros(5001)]
    exact = [t.double() for t in state]
    for step in (1, 2, 3):
        grad = torch.randn(5001)
        grad[0] = 0.0
        rates = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
        kernel.adamw_(state[0], grad, *state[1:], step=step, grad_scale=0.5, **rates)
        ref.adamw_(exact[0], grad.double(), *exact[1:], step=step, grad_scale=0.5, **rates)
    for got, want in zip(state, exact, strict=True):
        _check(got, want, _FP32)


# ---- borders ---------------------------------------------------------------------------------------------------


def test_nothing_to_do_is_done_without_a_kernel():
    with interpreting("trn2") as machine:
        load = {
            op: load_kernels(_ROOT / op / "nki.py") for op in ("rmsnorm", "rope", "swiglu", "attention", "fp8_pack")
        }
        none, weight = torch.zeros(0, 4), torch.ones(4)
        assert load["rmsnorm"].rmsnorm(none, weight, eps=1e-5).shape == (0, 4)
        assert load["rmsnorm"].rmsnorm_backward(none, none, weight, eps=1e-5)[1].tolist() == [0.0] * 4
        assert load["rope"].rope(torch.zeros(0, 3, 4), torch.ones(3, 2), torch.ones(3, 2)).shape == (0, 3, 4)
        assert load["swiglu"].swiglu(none, none).shape == (0, 4)
        empty = torch.zeros(0, 2, 3, 4)
        assert load["attention"].attention(empty, empty, empty, scale=1.0).shape == (0, 2, 3, 4)
        assert load["fp8_pack"].fp8_pack(torch.zeros(0), block_size=4).payload.shape == (0,)
        assert machine.usage().instructions == {}


def test_a_row_too_wide_for_trn1_is_refused_there_and_runs_on_trn3():
    x, weight = torch.randn(2, 18_000), torch.ones(18_000)
    with interpreting("trn1"), pytest.raises(NkiRefused) as refused:
        load_kernels(_ROOT / "rmsnorm" / "nki.py").rmsnorm_backward(x, x, weight, eps=1e-5)
    assert refused.value.rule == "sbuf-capacity"
    with interpreting("trn3") as machine:
        load_kernels(_ROOT / "rmsnorm" / "nki.py").rmsnorm(x, weight, eps=1e-5)
        assert machine.usage().peak_sbuf_bytes > 96 * 1024
