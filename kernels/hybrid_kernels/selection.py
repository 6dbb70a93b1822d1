"""Which variant of a kernel runs: by the device, the format, and what is installed; the reference otherwise.

The rule, in order: a variant that the caller names; the device's own variant, if its file and its compiler are
here and the format is not float64; the reference. Reads no environment; may import only the standard library
and torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch

OPS = ("rmsnorm", "rope", "swiglu", "cross_entropy", "attention", "fp8_pack", "reduce_add", "adamw")
"""Every operation of the package, by the name of its folder."""

VARIANTS = ("ref", "cpu", "triton", "nki")
"""Every variant that an operation can have, by the name of its file."""

_VARIANT_OF_DEVICE = {"cpu": "cpu", "cuda": "triton", "neuron": "nki"}
# `nki.isa`, not `nki`: the public index holds an empty package of that name.
_COMPILER_OF_VARIANT = {"triton": "triton", "nki": "nki.isa"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The variant of an operation that runs on a device, and why."""

    op: str
    variant: str
    reason: str


def choose(op: str, device: str, *, dtype: torch.dtype = torch.float32, variant: str | None = None) -> Choice:
    """Return the variant of `op` that runs on a device of this type (`cpu`, `cuda`, `neuron`, …).

    Raises:
        ValueError: no such operation or variant, or a named variant that this machine cannot run.
    """
    if op not in OPS:
        raise ValueError(f"no such kernel (got {op!r}); valid: {', '.join(OPS)}")
    if variant is not None:
        missing = _missing(op, variant)
        if missing:
            raise ValueError(f"kernel {op} cannot run as {variant!r}: {missing}; valid: {', '.join(VARIANTS)}")
        return Choice(op=op, variant=variant, reason="named by the caller")
    own = _VARIANT_OF_DEVICE.get(device)
    if own is None:
        return Choice(op=op, variant="ref", reason=f"no variant is written for device {device}")
    if dtype == torch.float64 and own != "cpu":
        return Choice(op=op, variant="ref", reason=f"{own} kernels compute in float32, not float64")
    missing = _missing(op, own)
    if missing:
        return Choice(op=op, variant="ref", reason=missing)
    return Choice(op=op, variant=own, reason=f"written for device {device}")


def implementation(op: str, x: torch.Tensor, variant: str | None = None) -> ModuleType:
    """Return the module whose functions run `op` on tensors like `x`; see `choose`."""
    return _load(op, choose(op, x.device.type, dtype=x.dtype, variant=variant).variant)


@cache
def _missing(op: str, variant: str) -> str | None:
    """Return what this machine lacks to run a variant; None if nothing."""
    if variant not in VARIANTS or find_spec(f"hybrid_kernels.{op}.{variant}") is None:
        return f"{op} has no variant {variant}"
    compiler = _COMPILER_OF_VARIANT.get(variant)
    if compiler is None:
        return None
    try:
        found = find_spec(compiler) is not None
    except (ImportError, ValueError):  # the parent package is missing, or is no package
        found = False
    return None if found else f"{compiler} is not installed"


@cache
def _load(op: str, variant: str) -> ModuleType:
    return import_module(f"hybrid_kernels.{op}.{variant}")
