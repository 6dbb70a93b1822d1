"""Why torch has no `neuron` device: a package that is missing, a placeholder, a retired line, or not loaded."""

import pytest

from hybrid.backends.neuron_packages import Package, why_not_loaded


def package(version: str, size_bytes: int | None = 10**8, name: str = "torch-neuronx") -> Package:
    return Package(name=name, version=version, size_bytes=size_bytes)


@pytest.mark.parametrize(
    ("packages", "fact", "fix"),
    [
        ([], "is not installed", "from the vendor's own package index"),
        ([package("1.0.0", 1100)], "torch-neuronx 1.0.0: a placeholder", "uninstall it"),
        ([package("2.13.3"), package("0.0.1", 900, "neuronx-cc")], "neuronx-cc 0.0.1: a placeholder", "uninstall it"),
        ([package("2.8.0.2.10.16998")], "retired PyTorch/XLA line", "2.13.3 or later"),
        ([package("unknown")], "retired PyTorch/XLA line", "2.13.3 or later"),
        ([package("2.13.3", None)], "torch did not load it", "TORCH_DEVICE_BACKEND_AUTOLOAD"),
        ([package("2.14.3+cpu")], "torch did not load it", "TORCH_DEVICE_BACKEND_AUTOLOAD"),
    ],
)
def test_each_reason_has_its_own_words_and_instruction(packages: list[Package], fact: str, fix: str) -> None:
    told = why_not_loaded(packages)
    assert fact in told[0]
    assert fix in told[1]
