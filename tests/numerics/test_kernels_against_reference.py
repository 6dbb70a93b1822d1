"""Every kernel that executes on a CPU against its float64 reference, and the references against gradcheck."""

from __future__ import annotations

import pytest
import torch

import hybrid_kernels as hk
from hybrid_kernels import kit
from hybrid_kernels.kit_cases import CASES
from hybrid_kernels.reduce_add import ref as reduce_add_ref

CPU_DTYPES = (*kit.DTYPES, torch.float64)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("dtype", CPU_DTYPES, ids=str)
@pytest.mark.parametrize("variant", ["ref", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}-{case.name}".replace(" ", "_"))
def test_a_kernel_stays_within_its_tolerance_of_the_float64_reference(
    case: kit.Case, variant: str, dtype: torch.dtype
) -> None:
    outcome = kit.run_case(case, variant=variant, device="cpu", dtype=dtype)
    assert outcome.passed, outcome


@pytest.mark.parametrize("variant", ["ref", "cpu"])
class TestGradcheck:
    def test_rmsnorm_has_the_gradient_of_its_forward(self, variant: str) -> None:
        assert torch.autograd.gradcheck(
            lambda x, w: hk.rmsnorm(x, w, eps=1e-5, variant=variant), (double(3, 2, 7), double(7))
        )

    def test_rope_has_the_gradient_of_its_forward(self, variant: str) -> None:
        cos, sin = hk.rope_tables(5, 6, theta=1e4, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda x: hk.rope(x, cos, sin, variant=variant), (double(2, 3, 5, 6),))

    def test_swiglu_has_the_gradient_of_its_forward(self, variant: str) -> None:
        assert torch.autograd.gradcheck(lambda g, u: hk.swiglu(g, u, variant=variant), (double(3, 5), double(3, 5)))

    @pytest.mark.parametrize("scale", [None, 0.3])
    def test_cross_entropy_has_the_gradient_of_its_forward(self, variant: str, scale: float | None) -> None:
        labels = torch.tensor([1, -100, 4, 0])
        assert torch.autograd.gradcheck(
            lambda h, w: hk.cross_entropy(h, w, labels, scale=scale, variant=variant), (double(4, 3), double(5, 3))
        )

    def test_attention_has_the_gradient_of_its_forward(self, variant: str) -> None:
        assert torch.autograd.gradcheck(
            lambda q, k, v: hk.attention(q, k, v, variant=variant),
            (double(2, 4, 5, 6), double(2, 2, 5, 6), double(2, 2, 5, 6)),
        )


def test_the_references_equal_the_operations_of_torch() -> None:
    x, weight = double(3, 16), double(16)
    assert torch.allclose(hk.rmsnorm(x, weight, eps=1e-5, variant="ref"), torch.rms_norm(x, (16,), weight, 1e-5))
    q, k, v = double(1, 4, 9, 8), double(1, 2, 9, 8), double(1, 2, 9, 8)
    sdpa = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(hk.attention(q, k, v, variant="ref"), sdpa)
    labels = torch.tensor([1, -100, 4, 0])
    hidden, vocabulary = double(4, 3), double(5, 3)
    plain = torch.nn.functional.cross_entropy(hidden @ vocabulary.T, labels)
    assert torch.allclose(hk.cross_entropy(hidden, vocabulary, labels, variant="ref"), plain)


def test_adamw_follows_torchs_optimizer_over_steps() -> None:
    start = torch.randn(50, dtype=torch.float64)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    ours = {variant: (start.clone(), torch.zeros(50).double(), torch.zeros(50).double()) for variant in ("ref", "cpu")}
    for step in range(1, 6):
        grad = torch.randn(50, dtype=torch.float64)
        theirs.grad = grad * 0.5
        optimizer.step()
        for variant, (param, first, second) in ours.items():
            hk.adamw_(
                param, grad, first, second, step=step, learning_rate=1e-2, beta1=0.9, beta2=0.95, eps=1e-8,
                weight_decay=0.1, grad_scale=0.5, variant=variant,
            )  # fmt: skip
    for param, _, _ in ours.values():
        assert torch.allclose(param, theirs.detach(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [0, 1, 300_001])
def test_reduce_add_on_the_cpu_gives_the_bits_of_the_reference_in_rank_order(size: int, dtype: torch.dtype) -> None:
    chunks = [torch.randn(size).mul(10.0**rank).to(dtype) for rank in range(4)]
    expected = reduce_add_ref.reduce_add(chunks)
    assert torch.equal(hk.reduce_add(chunks), expected)
    out = torch.full((size,), float("nan"))
    assert hk.reduce_add(chunks, out=out) is out
    assert torch.equal(out, expected)


def test_reduce_add_refuses_no_chunks_and_chunks_that_differ() -> None:
    with pytest.raises(ValueError, match="none"):
        hk.reduce_add([])
    with pytest.raises(ValueError, match=r"torch.bfloat16 \(3,\)"):
        hk.reduce_add([torch.zeros(3), torch.zeros(3, dtype=torch.bfloat16)])


@pytest.mark.parametrize("variant", ["ref", "cpu"])
def test_a_nan_in_a_query_stays_in_its_row_and_one_in_a_key_reaches_the_rows_from_it_on(variant: str) -> None:
    q, k, v = (torch.randn(1, 2, 40, 16) for _ in range(3))
    q[0, 0, 11] = k[0, 1, 20] = float("nan")
    nan_rows = hk.attention(q, k, v, variant=variant).isnan().all(dim=-1)
    assert nan_rows[0, 0].nonzero().flatten().tolist() == [11]
    assert nan_rows[0, 1].nonzero().flatten().tolist() == list(range(20, 40))


@pytest.mark.parametrize("variant", ["ref", "cpu"])
def test_a_nan_in_a_value_is_never_lost(variant: str) -> None:
    q, k, v = (torch.randn(1, 1, 40, 16) for _ in range(3))
    v[0, 0, 20] = float("nan")
    assert hk.attention(q, k, v, variant=variant)[0, 0, 20:].isnan().all()


def test_a_nan_token_of_cross_entropy_is_seen_in_the_loss_unless_it_is_ignored() -> None:
    hidden, weight, labels = torch.randn(6, 8), torch.randn(20, 8), torch.arange(6)
    hidden[2] = float("nan")
    for variant in ("ref", "cpu"):
        assert not hk.cross_entropy(hidden, weight, labels, variant=variant).isfinite()
        ignored = labels.clone()
        ignored[2] = -100
        assert hk.cross_entropy(hidden, weight, ignored, variant=variant).isfinite()


def test_strided_inputs_give_what_contiguous_ones_give() -> None:
    for op, inputs in {
        "attention": [torch.randn(2, 9, 4, 16).transpose(1, 2) for _ in range(3)],
        "swiglu": [torch.randn(7, 5).T for _ in range(2)],
    }.items():
        kernel = getattr(hk, op)
        leaves = [x.clone(memory_format=torch.contiguous_format).requires_grad_() for x in inputs]
        views = [x.detach().requires_grad_() for x in inputs]
        for arguments in (leaves, views):
            kernel(*arguments).square().sum().backward()
        for leaf, view in zip(leaves, views, strict=True):
            assert leaf.grad is not None
            assert view.grad is not None
            assert torch.allclose(leaf.grad, view.grad, atol=1e-6)
    x = torch.randn(5, 3, 8).transpose(0, 1)
    weight = torch.randn(8)
    assert torch.allclose(hk.rmsnorm(x, weight, eps=1e-5), hk.rmsnorm(x.contiguous(), weight, eps=1e-5))
    cos, sin = hk.rope_tables(5, 8, theta=1e4)
    assert torch.equal(hk.rope(x, cos, sin), hk.rope(x.contiguous(), cos, sin))
