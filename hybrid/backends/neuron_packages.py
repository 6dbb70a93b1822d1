"""Which of the vendor's packages are installed, and what it means that TorchNeuron is not loaded.

The public index holds placeholders of these names, of about a kilobyte, which install nothing that works. Reads the
environment's package metadata; imports none of the packages, and no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata

PACKAGES = ("torch-neuronx", "neuronx-cc", "libneuronxla", "nki", "nkipy")
"""Names of which the public index holds placeholders."""
LEAST_VERSION = (2, 13, 3)
"""The first native TorchNeuron; what is older is the retired PyTorch/XLA line."""
_PLACEHOLDER_BYTES = 64 * 1024
_INDEX = "install torch-neuronx 2.13.3 or later from the vendor's own package index, as its guide says"


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One installed distribution."""

    name: str
    version: str
    size_bytes: int | None
    """Of all its files; None where the installer did not record them."""

    @property
    def is_placeholder(self) -> bool:
        """Whether it is too small to be the vendor's."""
        return self.size_bytes is not None and self.size_bytes < _PLACEHOLDER_BYTES

    @property
    def release(self) -> tuple[int, ...]:
        """The numbers at the front of the version."""
        found = re.match(r"\d+(\.\d+)*", self.version)
        return tuple(map(int, found.group().split("."))) if found else ()


def found_packages() -> tuple[Package, ...]:
    """Return those of PACKAGES that are installed in this environment."""
    found = []
    for name in PACKAGES:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        sizes = [entry.size or 0 for entry in distribution.files or ()]
        size_bytes = sum(sizes) if distribution.files is not None else None
        found.append(Package(name=name, version=distribution.version, size_bytes=size_bytes))
    return tuple(found)


def why_not_loaded(packages: Sequence[Package]) -> tuple[str, str]:
    """Return the fact and the fix, where torch has no `neuron` device."""
    empty = [f"{package.name} {package.version}" for package in packages if package.is_placeholder]
    if empty:
        return (
            f"{', '.join(empty)}: a placeholder of the public index, not the vendor's package",
            f"uninstall it, then {_INDEX}",
        )
    torch_neuronx = next((package for package in packages if package.name == "torch-neuronx"), None)
    if torch_neuronx is None:
        return (
            "torch-neuronx is not installed, so torch has no `neuron` device",
            f"{_INDEX}, or use `backend: emulated`",
        )
    if torch_neuronx.release < LEAST_VERSION:
        return (
            f"torch-neuronx {torch_neuronx.version} is of the retired PyTorch/XLA line, which has no `neuron` device",
            _INDEX,
        )
    return (
        f"torch-neuronx {torch_neuronx.version} is installed, but torch did not load it",
        "let torch load it (TORCH_DEVICE_BACKEND_AUTOLOAD must not be 0) and match its torch: 2.13.x for torch 2.13",
    )
