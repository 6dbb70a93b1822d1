"""Which variant runs where, and that nobody pays for a compiler that is not used."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import hybrid_kernels as hk
from hybrid_kernels import selection

KERNELS = Path(__file__).parents[2] / "kernels"


@pytest.fixture(autouse=True)
def fresh_cache() -> None:
    selection._missing.cache_clear()


def pretend_installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    def fake(name: str) -> object | None:
        return find_spec(name) if name.startswith("hybrid_kernels") else (object() if name in names else None)

    selection._missing.cache_clear()
    monkeypatch.setattr(selection, "find_spec", fake)


@pytest.mark.parametrize("op", hk.OPS)
def test_the_cpu_runs_its_own_variant_in_every_format(op: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert hk.choose(op, "cpu", dtype=dtype).variant == "cpu"


@pytest.mark.parametrize("op", hk.OPS)
def test_cuda_runs_triton_where_it_is_installed_and_the_reference_where_not(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_installed(monkeypatch, "triton")
    assert hk.choose(op, "cuda").variant == "triton"
    pretend_installed(monkeypatch)
    choice = hk.choose(op, "cuda")
    assert (choice.variant, choice.reason) == ("ref", "triton is not installed")


def test_float64_runs_the_reference_where_kernels_compute_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "triton")
    assert hk.choose("rmsnorm", "cuda", dtype=torch.float64).variant == "ref"


def test_the_placeholder_package_of_nki_does_not_count_as_nki(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, "nki")
    assert hk.choose("rmsnorm", "neuron").variant == "ref"


def test_an_unknown_device_runs_the_reference_and_says_why() -> None:
    choice = hk.choose("swiglu", "xpu")
    assert (choice.variant, choice.reason) == ("ref", "no variant is written for device xpu")


def test_an_unknown_operation_or_variant_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="valid: rmsnorm, rope"):
        hk.choose("softmax", "cpu")
    with pytest.raises(ValueError, match="valid: ref, cpu, triton, nki"):
        hk.choose("rmsnorm", "cpu", variant="cuda")


def test_importing_and_using_the_kernels_on_a_cpu_imports_neither_triton_nor_nki_nor_the_runtime() -> None:
    program = (
        "import sys, torch, hybrid_kernels as hk\n"
        "hk.rmsnorm(torch.ones(2, 4), torch.ones(4), eps=1e-5)\n"
        "hk.fp8_pack(torch.ones(8), block_size=4)\n"
        "names = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(names & {'triton', 'nki', 'hybrid', 'ml_dtypes'}))\n"
    )
    # Where the whole package is installed, torch loads its backend's entry point: here only the kernels count.
    environment = {"PYTHONPATH": str(KERNELS), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=100)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
