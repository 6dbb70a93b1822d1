"""The likely cause of a linear layer's error: each known cause is replayed on the same inputs, the closest is named.

A cause's signature is its error vector, in the output and in the weight's gradient. Two chips that round alike make
nearly the same vector whatever their order of summation; rounding by chance is told by its size, since its vector is
unrelated to any other. May import all but the launcher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid.backends.number_emulation import MatmulNumerics, linear
from hybrid.config import Precision
from hybrid.models.stage import compute_context
from hybrid.runtime.parity_report import Cause

_UNRELATED = 0.8
"""A distance from which on only sizes speak: in a small product chance alone brings two errors this near."""
_CLIPPING = tuple(2.0**-k for k in range(8, 0, -1))
_LOSING = tuple(2.0**k for k in range(2, 25, 2))
_FP8_FORMATS = ("e4m3", "e4m3fn", "e5m2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """One linear layer's inputs and results, as the reference has them or as a chip computed them from its inputs."""

    x: Tensor
    """(..., I)."""
    weight: Tensor
    """(O, I)."""
    grad: Tensor
    """(..., O), of the output."""
    y: Tensor
    """(..., O), float32."""
    grad_weight: Tensor
    """(O, I), float32."""


def replay(product: Product, numerics: MatmulNumerics | None, precision: Precision, *, seed: int) -> Product:
    """Return the product computed again from the reference's inputs, under a chip's numerics or, with None, torch's."""
    x = product.x.detach().requires_grad_()
    weight = product.weight.detach().requires_grad_()
    with compute_context(precision):
        if numerics is None:
            y = F.linear(x, weight)
        else:
            y = linear(x, weight, numerics, torch.Generator().manual_seed(seed))
    (grad_weight,) = torch.autograd.grad(y, weight, product.grad.to(y.dtype))
    return replace(product, y=y.detach().float(), grad_weight=grad_weight.float())


def likely_cause(reference: Product, found: Product, precision: Precision, *, seed: int) -> Cause:
    """Return what explains the distance of `found` from `reference` best."""
    seen = _error(found, reference)
    if not all(part.isfinite().all() for part in seen):
        return Cause(kind="scale", detail="the result is not finite: an overflow, or a scale of zero", distance=0.0)
    best = Cause(kind="unknown", detail="no known cause makes such an error", distance=math.inf)
    best_score = math.inf
    for kind, detail, numerics in _candidates(reference, found, precision):
        replayed = _error(replay(reference, numerics, precision, seed=seed), reference)
        # A cause that explains one and not the other is no cause: the mean of the two.
        pairs = [_distance(a, b) for a, b in zip(seen, replayed, strict=True)]
        distance, size = (sum(part) / len(pairs) for part in zip(*pairs, strict=True))
        if distance > _UNRELATED:
            if kind == "scale":
                continue  # some factor always has the size of an error that chance made
            distance = 1.0
        score = distance + 0.25 * size
        # Earlier candidates are simpler: a later one must be clearly closer.
        if score < best_score - 1e-3:
            best_score, best = score, Cause(kind=kind, detail=detail, distance=distance)
    if best.distance > _UNRELATED and best.kind != "rounding":
        return replace(best, detail=f"{best.detail} (by the error's size alone)")
    return best


def _candidates(reference: Product, found: Product, precision: Precision) -> Iterator[tuple[str, str, MatmulNumerics]]:
    asked = MatmulNumerics(matmul="bf16" if precision == "bf16" else "fp32")
    yield "tf32", "products in TF32", MatmulNumerics(matmul="tf32")
    yield "tf32", "products in TF32, inputs cut instead of rounded", MatmulNumerics(matmul="tf32", rounding="truncate")
    kind = "format" if precision == "bf16" else "auto-cast"
    yield kind, "inputs cast to bf16", MatmulNumerics(matmul="bf16")
    yield "rounding", "bf16 cut instead of rounded", MatmulNumerics(matmul="bf16", rounding="truncate")
    yield "rounding", "bf16 rounded by chance", MatmulNumerics(matmul="bf16", rounding="stochastic")
    fp8 = [MatmulNumerics(matmul="fp8", fp8_format=name) for name in _FP8_FORMATS]
    for numerics in fp8:
        yield "format", f"inputs in FP8 {numerics.fp8_format}", numerics
    # By size alone, which is all that chance leaves, the two e4m3s are one.
    for name, words in (("e4m3", "e4m3 or e4m3fn"), ("e5m2", "e5m2")):
        by_chance = MatmulNumerics(matmul="fp8", fp8_format=name, rounding="stochastic")
        yield "rounding", f"FP8 {words} rounded by chance", by_chance
    gain = float((found.y * reference.y).sum() / reference.y.square().sum().clamp(min=1e-30))
    if abs(gain - 1.0) > 0.02:
        for base in (asked, *fp8):
            words = "" if base.matmul != "fp8" else f" (FP8 {base.fp8_format})"
            yield (
                "scale",
                f"results {gain:.3g} times what they should be{words}",
                replace(base, output_factor=gain),
            )
    for numerics in fp8:
        for factor in (*_CLIPPING, *_LOSING):
            words = "clipped" if factor < 1 else "lost at the small end"
            detail = f"FP8 {numerics.fp8_format} scaled for {factor:g} times the largest value: {words}"
            yield "scale", detail, replace(numerics, amax_factor=factor)


def _error(found: Product, reference: Product) -> tuple[Tensor, Tensor]:
    return found.y - reference.y, found.grad_weight - reference.grad_weight


def _distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return how unlike two error vectors are, 0 the same and 1 unrelated, and how unlike in size, in doublings."""
    norm_a, norm_b = float(a.norm()), float(b.norm())
    if norm_a == 0.0 or norm_b == 0.0 or not math.isfinite(norm_b):
        return (0.0, 0.0) if norm_a == norm_b else (1.0, 24.0)
    apart = float((a - b).norm()) / math.hypot(norm_a, norm_b)
    return apart, abs(math.log2(norm_a / norm_b))
