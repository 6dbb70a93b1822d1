"""The kernels' conformance kit: inputs of every awkward kind, and how far from the float64 reference one may be.

`python -m hybrid_kernels.kit --variant triton --device cuda` runs it on a device.
Run by the tests on every variant that executes here, and on a real device by whoever has one. Inputs are made
on the CPU from a seed and rounded to the format under test; the reference then gets the very same values in
float64, so that only the kernel's own arithmetic is judged. May import only torch and this package's own modules.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module

import torch
from torch import Tensor

from hybrid_kernels.kit_cases import CALLS, CASES, Case
from hybrid_kernels.selection import OPS, VARIANTS, choose

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Formats that every variant takes; the CPU's take float64 too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a result may be from the float64 reference, and why.

    Allowed for an element: ``(roundings * eps(format) + computing * eps(float32)) * |reference|`` plus
    ``(inner_roundings * eps(format) + cancelling * eps(float32)) * magnitude``, plus one denormal step; `magnitude`
    is the largest of the result and of the upstream gradient, which is what the terms that cancel are made of.
    """

    roundings: float
    """Roundings of the result itself, in eps of the format: 0.5 is one rounding to nearest."""
    computing: float
    """Relative error of the float32 arithmetic, in eps of float32."""
    cancelling: float
    """Error of sums whose terms are larger than their sum, in eps of float32, against `magnitude`."""
    inner_roundings: float
    """Values inside that are rounded to the format before a product or a sum; 0 where all is float32 inside."""
    reason: str


_ONE_ROUNDING = "float32 inside and one rounding of the result"
TOLERANCE_OF_OP = {
    "rmsnorm": Tolerance(
        roundings=0.51,
        computing=8,
        cancelling=8,
        inner_roundings=0,
        reason=_ONE_ROUNDING + "; sums over D and over rows",
    ),
    "rope": Tolerance(
        roundings=0.51,
        computing=1,
        cancelling=2,
        inner_roundings=0,
        reason=_ONE_ROUNDING + "; a difference of products",
    ),
    "swiglu": Tolerance(
        roundings=0.51,
        computing=8,
        cancelling=1,
        inner_roundings=0,
        reason=_ONE_ROUNDING + "; the slope of silu cancels near -1.28",
    ),
    "cross_entropy": Tolerance(
        roundings=0.51,
        computing=16,
        cancelling=64,
        inner_roundings=2,
        reason="a chunk's logits and their gradient are rounded to the format, as a plain projection's are",
    ),
    "attention": Tolerance(
        roundings=0.51,
        computing=16,
        cancelling=64,
        inner_roundings=3,
        reason="weights and their gradient are rounded to the format before they enter the matrix unit",
    ),
    "fp8_pack": Tolerance(
        roundings=0, computing=0, cancelling=0, inner_roundings=0, reason="bytes, scales and error are equal"
    ),
    "reduce_add": Tolerance(
        roundings=0,
        computing=4,
        cancelling=4,
        inner_roundings=0,
        reason="P - 1 float32 additions; the bits are those of the float32 reference",
    ),
    "adamw": Tolerance(
        roundings=0,
        computing=8,
        cancelling=4,
        inner_roundings=0,
        reason="a dozen float32 operations an element; p - update cancels",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One case on one variant: the worst output's share of what is allowed."""

    op: str
    case: str
    variant: str
    device: str
    dtype: str
    share: float
    """Largest error as a share of the allowed one; more than 1, or NaN, fails."""
    worst: str
    """Which output that was, with its error."""

    @property
    def passed(self) -> bool:
        """Whether every output is within its tolerance."""
        return self.share <= 1.0


def run_case(case: Case, *, variant: str, device: str, dtype: torch.dtype) -> Outcome:
    """Return how a variant's outputs, gradients included, compare with the float64 reference's.

    Raises:
        ValueError: the variant cannot run here.
    """
    choose(case.op, device, variant=variant)
    inputs = case.make(dtype)
    call = CALLS[case.op]
    want = call(import_module(f"hybrid_kernels.{case.op}.ref"), _mapped(inputs, torch.device("cpu"), torch.float64))
    got = call(import_module(f"hybrid_kernels.{case.op}.{variant}"), _mapped(inputs, torch.device(device), None))
    upstream = float(inputs["grad"].abs().max()) if "grad" in inputs and inputs["grad"].numel() else 0.0
    share, worst = 0.0, "none"
    for name, expected in want.items():
        found, text = _share_of_allowed(got[name], expected, dtype, TOLERANCE_OF_OP[case.op], upstream)
        if not found <= share:
            share, worst = found, f"{name}: {text}"
    name_of_dtype = str(dtype).removeprefix("torch.")
    return Outcome(
        op=case.op, case=case.name, variant=variant, device=device, dtype=name_of_dtype, share=share, worst=worst
    )


def run_kit(variant: str, device: str, *, ops: tuple[str, ...] | None = None) -> Iterator[Outcome]:
    """Yield the outcome of every case and format of a variant; see `run_case`."""
    for case in CASES:
        if ops is None or case.op in ops:
            for dtype in DTYPES:
                yield run_case(case, variant=variant, device=device, dtype=dtype)


def _mapped(inputs: dict[str, object], device: torch.device, widen: torch.dtype | None) -> dict[str, object]:
    """Return copies of the inputs on a device, the float tensors in another format if one is given."""

    def moved(name: str, value: object) -> object:
        if isinstance(value, list):
            return [moved(name, x) for x in value]
        if not isinstance(value, Tensor):
            return value
        # Packing is defined in float32: its carried error stays that.
        widened = widen is not None and value.is_floating_point() and name != "error"
        return value.to(device, widen if widened else value.dtype, copy=True)

    return {name: moved(name, value) for name, value in inputs.items()}


def _share_of_allowed(
    got: Tensor, want: Tensor, dtype: torch.dtype, allowed: Tolerance, upstream: float
) -> tuple[float, str]:
    """Return the largest error over what is allowed; infinite where finiteness or shape differs."""
    got = got.detach().cpu()
    if got.shape != want.shape:
        return float("inf"), f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if want.numel() == 0:
        return 0.0, "empty"
    # A reference beyond the format's range must come out infinite.
    fits = want.to(got.dtype).isfinite()
    if not torch.equal(got.isfinite(), fits):
        return float("inf"), f"{int((got.isfinite() != fits).sum())} elements differ in finiteness"
    got_wide, want = got.double()[fits], want[fits]
    if want.numel() == 0:
        return 0.0, "nothing finite"
    eps, eps_single = torch.finfo(dtype).eps, torch.finfo(torch.float32).eps
    if dtype == torch.float64:
        eps_single = eps
    info = torch.finfo(got.dtype)
    limit = (allowed.roundings * eps + allowed.computing * eps_single) * want.abs()
    limit = limit + (allowed.inner_roundings * eps + allowed.cancelling * eps_single) * max(
        upstream, float(want.abs().max())
    )
    shares = (got_wide - want).abs() / (limit + info.smallest_normal * info.eps)
    return float(shares.max()), f"error {float((got_wide - want).abs().max()):.3g}"


def main(arguments: list[str]) -> int:
    """Run the kit, print an outcome a line, and return 1 if any failed."""
    parser = argparse.ArgumentParser(prog="python -m hybrid_kernels.kit", description="Check kernels on this machine.")
    parser.add_argument("--variant", choices=VARIANTS, required=True)
    parser.add_argument("--device", default="cpu", help="device that the inputs are put on")
    parser.add_argument("--op", action="append", choices=OPS, help="only this operation")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")
    options = parser.parse_args(arguments)
    failed = 0
    for outcome in run_kit(options.variant, options.device, ops=tuple(options.op or OPS)):
        failed += not outcome.passed
        if options.json:
            print(json.dumps(asdict(outcome)), flush=True)
        else:
            verdict = "PASS" if outcome.passed else "FAIL"
            print(f"{verdict} {outcome.op}, {outcome.case}, {outcome.dtype}: {outcome.share:.2f} ({outcome.worst})")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
