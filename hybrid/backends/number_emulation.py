"""A chip's arithmetic in a stage's linear layers, emulated on the CPU: TF32, bf16 and FP8 inputs, fp32 accumulation.

`emulate_matmuls(stage, numerics)` puts every product with a weight of the stage (forward, input's gradient, weight's
gradient) under the chosen format and can be taken back; no parameter is renamed. Attention's own products, norms and
softmax stay as they are. An emulation of formats and rounding, not of any chip's order of summation. May import only
torch, `errors` and `weight_gradients`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from hybrid.backends.weight_gradients import active_deferral

Matmul = Literal["fp32", "tf32", "bf16", "fp8"]
Rounding = Literal["nearest", "stochastic", "truncate"]

GRID_OF_FORMAT: Mapping[str, tuple[int, int, float | None]] = {
    "tf32": (10, -126, None),
    "bf16": (7, -126, None),
    "e4m3": (3, -6, 240.0),
    "e4m3fn": (3, -6, 448.0),
    "e5m2": (2, -14, 57344.0),
}
"""Stored mantissa bits, exponent of the smallest normal, largest finite; the rows of hardware/numerics.yaml."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulNumerics:
    """How a chip multiplies matrices. Accumulation is fp32."""

    matmul: Matmul = "fp32"
    """Format of both inputs."""
    rounding: Rounding = "nearest"
    """Of the inputs, and of results that leave in bf16."""
    fp8_format: str = "e4m3fn"
    """Encoding of activations and weights under `fp8`."""
    fp8_gradient_format: str = "e5m2"
    """Encoding of the output's gradient under `fp8`; it needs range more than precision."""
    amax_factor: float = 1.0
    """FP8 scales are made for this multiple of the tensor's largest magnitude; below 1, as with an amax that is out
    of date, the largest values are clipped, far above 1 the smallest are lost."""
    output_factor: float = 1.0
    """What results come out multiplied by; not 1 where a scale is read in another convention (MX: a factor of 2)."""


def round_to_format(x: Tensor, fmt: str, *, rounding: Rounding, generator: torch.Generator | None = None) -> Tensor:
    """Return float32 values moved to the grid of a narrower format, unscaled; beyond its maximum they are clipped.

    Args:
        fmt: a key of GRID_OF_FORMAT.
        rounding: `nearest` (ties to even), `stochastic` (unbiased; needs `generator`) or `truncate` (towards zero).

    Shapes:
        x: any, float32.  returns: the same

    Numerics:
        NaN stays; infinities stay where the format has no maximum of its own, and are clipped where it has.
    """
    if fmt == "bf16" and rounding == "nearest":
        return x.bfloat16().float()
    mantissa_bits, min_exponent, maximum = GRID_OF_FORMAT[fmt]
    magnitude = x.abs()
    _, exponent = torch.frexp(magnitude)
    spacing = torch.ldexp(torch.ones_like(x), (exponent - 1).clamp(min=min_exponent) - mantissa_bits)
    steps = magnitude / spacing
    if rounding == "nearest":
        steps = steps.round()
    elif rounding == "stochastic":
        steps = (steps + torch.rand(x.shape, generator=generator)).floor()
    else:
        steps = steps.floor()
    rounded = torch.copysign(steps * spacing, x).where(x.isfinite(), x)
    return rounded if maximum is None else rounded.clamp(-maximum, maximum)


def quantize(
    x: Tensor, numerics: MatmulNumerics, *, is_gradient: bool = False, generator: torch.Generator | None = None
) -> Tensor:
    """Return a product's input as the chip sees it, in float32; FP8 with one scale a tensor.

    Shapes:
        x: any.  returns: the same, float32

    Numerics:
        Under FP8 a tensor that holds NaN or inf becomes NaN: a cast that saturates would hide it.
    """
    wide = x.float()
    if numerics.matmul == "fp32":
        return wide
    if numerics.matmul != "fp8":
        return round_to_format(wide, numerics.matmul, rounding=numerics.rounding, generator=generator)
    fmt = numerics.fp8_gradient_format if is_gradient else numerics.fp8_format
    amax = wide.abs().amax()
    if not amax.isfinite():
        return torch.full_like(wide, float("nan"))
    maximum = GRID_OF_FORMAT[fmt][2]
    assert maximum is not None, f"{fmt} is no FP8 format"
    scale = (amax * numerics.amax_factor / maximum).clamp(min=2.0**-126)
    return round_to_format(wide / scale, fmt, rounding=numerics.rounding, generator=generator) * scale


def linear(x: Tensor, weight: Tensor, numerics: MatmulNumerics, generator: torch.Generator | None = None) -> Tensor:
    """Return x @ weightᵀ as the chip computes it, differentiable.

    Shapes:
        x: (..., I).  weight: (O, I).  returns: (..., O), in autocast's format where autocast is on, else x's.
    """
    narrow = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    y: Tensor = _Linear.apply(x, weight, numerics, generator, narrow)  # type: ignore[no-untyped-call]
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        numerics: MatmulNumerics,
        generator: torch.Generator | None,
        out: torch.dtype,
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            seen_x = quantize(x, numerics, generator=generator)
            seen_weight = quantize(weight, numerics, generator=generator)
            ctx.save_for_backward(seen_x, seen_weight)
            ctx.how = (numerics, generator, x.dtype, weight.dtype, out)
            # Stochastic rounding draws in the order of the products: nothing of those is put off.
            ctx.weight, ctx.deferral = weight, None if numerics.rounding == "stochastic" else active_deferral()
            return _leave(F.linear(seen_x, seen_weight), out, numerics, generator)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        seen_x, seen_weight = ctx.saved_tensors
        numerics, generator, x_dtype, weight_dtype, out = ctx.how
        with torch.autocast("cpu", enabled=False):
            seen_grad = quantize(grad, numerics, is_gradient=True, generator=generator)
            grad_x = _leave(seen_grad @ seen_weight, out, numerics, generator).to(x_dtype)

        def grad_weight() -> Tensor:
            with torch.autocast("cpu", enabled=False):
                product = seen_grad.flatten(0, -2).T @ seen_x.flatten(0, -2)
                # Autocast's products leave in its format, the weight's gradient too.
                return _leave(product, out, numerics, generator).to(weight_dtype)

        if ctx.deferral is None or not ctx.deferral.puts_off:
            return grad_x, grad_weight(), None, None, None
        ctx.deferral.add(ctx.weight, grad_weight, (seen_grad, seen_x))
        return grad_x, None, None, None, None


def _leave(y: Tensor, dtype: torch.dtype, numerics: MatmulNumerics, generator: torch.Generator | None) -> Tensor:
    """Return a product's fp32 result in the format in which it leaves the chip's accumulator."""
    if numerics.output_factor != 1.0:
        y = y * numerics.output_factor
    if dtype == torch.bfloat16:
        y = round_to_format(y, "bf16", rounding=numerics.rounding, generator=generator)
    return y.to(dtype)


NumericsOf = Callable[[str], MatmulNumerics | None]
"""From a weight's name in its module (`attention.query.weight`) to its numerics; None leaves the product alone."""


class _Emulation(TorchFunctionMode):
    """Catches every product with one of the module's weights."""

    def __init__(self, module: nn.Module, numerics_of: NumericsOf, generator: torch.Generator) -> None:
        super().__init__()
        chosen = {name: numerics_of(name) for name, _ in module.named_parameters()}
        self._numerics_of_id = {id(p): chosen[name] for name, p in module.named_parameters()}
        self._generator = generator

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            numerics = self._numerics_of_id.get(id(args[1]))
            if numerics is not None:
                y = linear(args[0], args[1], numerics, self._generator)
                bias = args[2] if len(args) > 2 else None
                return y if bias is None else y + bias.to(y.dtype)
        return func(*args, **(kwargs or {}))


def emulate_matmuls(module: nn.Module, numerics: MatmulNumerics | NumericsOf, *, seed: int) -> Callable[[], None]:
    """Put the products of a module (a stage or a layer) under a chip's numerics; return what takes it back.

    Args:
        numerics: of all its weights, or by a weight's name in the module.
        seed: of stochastic rounding. One stream of chance for the module, in the order of its products.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"matmuls {seed}".encode()))
    numerics_of = numerics if callable(numerics) else lambda _: numerics
    forward = module.forward

    def emulated(*args: Any, **kwargs: Any) -> Any:
        with _Emulation(module, numerics_of, generator):
            return forward(*args, **kwargs)

    module.forward = emulated  # the instance's own shadows the class's

    def restore() -> None:
        module.__dict__.pop("forward", None)

    return restore


@contextmanager
def emulated_matmuls(module: nn.Module, numerics: MatmulNumerics | NumericsOf, *, seed: int) -> Iterator[None]:
    """Put a module's products under a chip's numerics for the block's duration; see `emulate_matmuls`."""
    restore = emulate_matmuls(module, numerics, seed=seed)
    try:
        yield
    finally:
        restore()
