"""The fused cross-entropy as training uses it: chunks, gradients handed over once, memory that stays small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hybrid_kernels as hk
from hybrid_kernels.cross_entropy import chunked, cpu


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def leaves(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden = torch.randn(37, 16).to(dtype).requires_grad_()
    weight = torch.randn(50, 16).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(50, (37,))


@pytest.mark.parametrize("num_chunks", [1, 2, 5, 37])
def test_the_number_of_chunks_does_not_change_the_result(num_chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = leaves()
    labels[::4] = -100
    whole = hk.cross_entropy(hidden, weight, labels)
    expected = torch.autograd.grad(whole, (hidden, weight))
    kept = int((labels >= 0).sum())
    monkeypatch.setattr(chunked, "CHUNK_BYTES", -(-kept // num_chunks) * 50 * 4)
    cut = hk.cross_entropy(hidden, weight, labels)
    assert torch.allclose(cut, whole, rtol=1e-6)
    for got, want in zip(torch.autograd.grad(cut, (hidden, weight)), expected, strict=True):
        assert torch.allclose(got, want, atol=1e-7)


@pytest.mark.parametrize("num_tokens", [0, 1, 7, 1000])
def test_chunks_cover_every_token_once_and_are_even(num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked, "CHUNK_BYTES", 300 * 8)
    cuts = list(chunked.chunks(num_tokens, 8))
    assert [i for cut in cuts for i in range(cut.start, cut.stop)] == list(range(num_tokens))
    assert all(cut.stop - cut.start <= 300 for cut in cuts)
    assert len({cut.stop - cut.start for cut in cuts[:-1]}) <= 1


def test_the_upstream_gradient_scales_both_gradients() -> None:
    hidden, weight, labels = leaves()
    once = torch.autograd.grad(hk.cross_entropy(hidden, weight, labels), (hidden, weight))
    thrice = torch.autograd.grad(hk.cross_entropy(hidden, weight, labels) * 3.0, (hidden, weight))
    for one, three in zip(once, thrice, strict=True):
        assert torch.allclose(3.0 * one, three)


def test_the_two_gradients_can_be_asked_for_apart() -> None:
    hidden, weight, labels = leaves()
    together = torch.autograd.grad(hk.cross_entropy(hidden, weight, labels), (hidden, weight))
    loss = hk.cross_entropy(hidden, weight, labels)
    (of_hidden,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (of_weight,) = torch.autograd.grad(loss, weight)
    assert torch.equal(of_hidden, together[0])
    assert torch.equal(of_weight, together[1])


def test_a_second_backward_through_a_retained_graph_gives_the_same_gradients() -> None:
    hidden, weight, labels = leaves()
    loss = hk.cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0))
    for one, two in zip(first, second, strict=True):
        assert torch.equal(2.0 * one, two)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_no_gradient_is_made_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []
    original = cpu.cross_entropy_with_gradients

    def spy(*args: object, needs_hidden: bool, needs_weight: bool, **kwargs: object) -> object:
        asked.append((needs_hidden, needs_weight))
        return original(*args, needs_hidden=needs_hidden, needs_weight=needs_weight, **kwargs)

    monkeypatch.setattr(cpu, "cross_entropy_with_gradients", spy)
    hidden, weight, labels = leaves()
    with torch.no_grad():
        quiet = hk.cross_entropy(hidden, weight, labels)
    assert not quiet.requires_grad
    hk.cross_entropy(hidden.detach(), weight, labels)
    hk.cross_entropy(hidden, weight, labels)
    assert asked == [(False, False), (False, True), (True, True)]


def test_a_microbatch_in_which_every_label_is_ignored_adds_nothing() -> None:
    hidden, weight, _ = leaves()
    loss = hk.cross_entropy(hidden, weight, torch.full((37,), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert weight.grad is not None
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_operands_of_two_formats_are_refused() -> None:
    hidden, weight, labels = leaves()
    with pytest.raises(ValueError, match="bfloat16"):
        hk.cross_entropy(hidden.bfloat16(), weight, labels)


def test_bf16_gradients_are_as_close_to_float64_as_plain_torchs() -> None:
    # The error ratio of the project's parity check: at most that of plain bf16 on the CPU, with a margin for luck.
    hidden, weight, labels = leaves(torch.bfloat16)
    reference = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    torch.nn.functional.cross_entropy(reference[0] @ reference[1].T, labels).backward()
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    of_plain = torch.autograd.grad(plain, (hidden, weight))
    of_ours = torch.autograd.grad(hk.cross_entropy(hidden, weight, labels), (hidden, weight))
    for leaf, theirs, ours in zip(reference, of_plain, of_ours, strict=True):
        assert leaf.grad is not None
        error_of_theirs = (theirs.double() - leaf.grad).norm()
        assert (ours.double() - leaf.grad).norm() <= 1.25 * error_of_theirs


MEMORY_PROBE = """
import torch, hybrid_kernels as hk
torch.set_num_threads(1)
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM")) * 1024
def step(tokens, vocab):
    hidden, weight = torch.randn(tokens, 64, requires_grad=True), torch.randn(vocab, 64, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    open("/proc/self/clear_refs", "w").write("5")
    before = peak()
    hk.cross_entropy(hidden, weight, labels).backward()
    return peak() - before
step(8, 100)
print(step(4096, 32000))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_the_logits_never_exist_whole() -> None:
    command = [sys.executable, "-c", MEMORY_PROBE]
    kernels = str(Path(__file__).parents[2] / "kernels")
    environment = {"PYTHONPATH": kernels, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=110, check=True)
    logits_bytes = 4096 * 32000 * 4
    assert int(done.stdout) < 0.3 * logits_bytes
