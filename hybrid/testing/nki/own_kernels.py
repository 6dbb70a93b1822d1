"""Runs our own NKI kernels at sizes of a training step, against the references in float64, and tells what they take.

Imports torch and `hybrid_kernels`. The results are those of an interpreter: right values and peaks of memory, no times.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid.testing.nki.generations import generations
from hybrid.testing.nki.machine import Usage
from hybrid.testing.nki.standin import interpreting, load_kernels


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnCase:
    """A call of one kernel's module, made of tensors that the reference gets in float64."""

    op: str
    what: str
    size: str
    call: Callable[[Any, tuple[Tensor, ...]], Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    exact: bool = False
    """True where every bit must be the float32 reference's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnResult:
    """What one case took on one generation, and its largest error relative to the largest exact value."""

    case: OwnCase
    generation: str
    launches: tuple[Usage, ...]
    error: float

    @property
    def peak_sbuf_bytes(self) -> int:
        """The most that any of the case's kernels took of a partition of SBUF."""
        return max(usage.peak_sbuf_bytes for usage in self.launches)

    @property
    def peak_psum_bytes(self) -> int:
        """The most that any of the case's kernels took of a partition of PSUM."""
        return max(usage.peak_psum_bytes for usage in self.launches)


def _randn(*shapes: tuple[int, ...]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: tuple(torch.randn(shape) for shape in shapes)


def _tables(x: Tensor) -> tuple[Tensor, Tensor]:
    tables: tuple[Tensor, Tensor] = import_module("hybrid_kernels.rope.ref").rope_tables(
        x.shape[-2], x.shape[-1], theta=10_000.0
    )
    return tables


def _tokens() -> tuple[Tensor, ...]:
    return torch.randn(128, 512), torch.randn(2048, 512) / 16, torch.randint(0, 2048, (128,))


def _updated(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    state = [x.clone() for x in inputs]
    state[3].square_()
    rates = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    module.adamw_(*state, step=7, **rates)
    return state[0], state[2], state[3]


_HEADS: tuple[tuple[int, ...], ...] = ((1, 4, 256, 64), (1, 2, 256, 64), (1, 2, 256, 64))
_TRAIN = {"ignore_index": -100, "scale": 1 / 128}

OWN_CASES: tuple[OwnCase, ...] = (
    OwnCase(
        op="rmsnorm",
        what="forward",
        size="256 × 4096",
        call=lambda k, t: k.rmsnorm(t[1], t[2], eps=1e-5),
        inputs=_randn((256, 4096), (256, 4096), (4096,)),
    ),
    OwnCase(
        op="rmsnorm",
        what="backward",
        size="256 × 4096",
        call=lambda k, t: k.rmsnorm_backward(*t, eps=1e-5),
        inputs=_randn((256, 4096), (256, 4096), (4096,)),
    ),
    OwnCase(
        op="rope",
        what="forward",
        size="8 heads, 256 × 128",
        call=lambda k, t: k.rope(t[0], *(table.to(t[0].dtype) for table in _tables(t[0]))),
        inputs=_randn((8, 256, 128)),
    ),
    OwnCase(
        op="swiglu",
        what="forward",
        size="256 × 4096",
        call=lambda k, t: k.swiglu(*t),
        inputs=_randn((256, 4096), (256, 4096)),
    ),
    OwnCase(
        op="swiglu",
        what="backward",
        size="256 × 4096",
        call=lambda k, t: k.swiglu_backward(*t),
        inputs=_randn((256, 4096), (256, 4096), (256, 4096)),
    ),
    OwnCase(
        op="cross_entropy",
        what="losses",
        size="128 tokens, 512 wide, 2048 words",
        call=lambda k, t: k.token_losses(*t, ignore_index=-100),
        inputs=_tokens,
    ),
    OwnCase(
        op="cross_entropy",
        what="gradient of hidden",
        size="128 tokens, 512 wide, 2048 words",
        call=lambda k, t: k.cross_entropy_with_gradients(*t, **_TRAIN, needs_weight=False)[1],
        inputs=_tokens,
    ),
    OwnCase(
        op="cross_entropy",
        what="gradient of weight",
        size="128 tokens, 512 wide, 2048 words",
        call=lambda k, t: k.cross_entropy_with_gradients(*t, **_TRAIN, needs_hidden=False)[2],
        inputs=_tokens,
    ),
    OwnCase(
        op="attention",
        what="forward",
        size="4 heads on 2, 256 × 64",
        call=lambda k, t: k.attention_with_logsumexp(*t, scale=0.125),
        inputs=_randn(*_HEADS),
    ),
    OwnCase(
        op="attention",
        what="backward",
        size="4 heads on 2, 256 × 64",
        call=lambda k, t: k.attention_backward(t[0], *t[1:], scale=0.125),
        inputs=_randn(_HEADS[0], *_HEADS),
    ),
    OwnCase(
        op="fp8_pack",
        what="to nearest",
        size="65536 in blocks of 256",
        call=lambda k, t: _packed(k.fp8_pack(t[0].float(), block_size=256)),
        inputs=_randn((65536,)),
        exact=True,
    ),
    OwnCase(
        op="fp8_pack",
        what="stochastic, error feedback",
        size="65536 in blocks of 256",
        call=lambda k, t: _packed(k.fp8_pack(t[0].float(), block_size=256, error=t[1].float(), seed=5)),
        inputs=_randn((65536,), (65536,)),
        exact=True,
    ),
    OwnCase(
        op="reduce_add",
        what="4 ranks",
        size="4 × 262144",
        call=lambda k, t: k.reduce_add([x.float() for x in t]),
        inputs=_randn((262144,), (262144,), (262144,), (262144,)),
        exact=True,
    ),
    OwnCase(
        op="adamw",
        what="one step",
        size="262144",
        call=_updated,
        inputs=_randn((262144,), (262144,), (262144,), (262144,)),
    ),
)
"""Every case, in the order of the report."""


def _packed(packed: Any) -> tuple[Tensor, ...]:
    parts = (packed.payload.float(), packed.scales, packed.error)
    return tuple(part for part in parts if part is not None)


def check_own_kernels() -> tuple[OwnResult, ...]:
    """Run every case on every generation.

    Raises:
        NkiRefused: a kernel breaks a rule of a generation.
    """
    (root,) = find_spec("hybrid_kernels").submodule_search_locations  # type: ignore[union-attr, misc]
    return tuple(_run(case, name, Path(root)) for case in OWN_CASES for name in generations())


def _run(case: OwnCase, generation: str, root: Path) -> OwnResult:
    state = torch.get_rng_state()
    torch.manual_seed(7)
    inputs = case.inputs()
    torch.set_rng_state(state)
    exact = case.call(
        import_module(f"hybrid_kernels.{case.op}.ref"),
        tuple(x.double() if x.is_floating_point() else x for x in inputs),
    )
    with interpreting(generation) as machine:
        got = case.call(load_kernels(root / case.op / "nki.py"), inputs)
    errors = [
        float((g.double() - e.double()).abs().max() / e.double().abs().max())
        for g, e in zip(_tuple(got), _tuple(exact), strict=True)
    ]
    return OwnResult(case=case, generation=generation, launches=tuple(machine.launches), error=max(errors))


def _tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def format_own_results(results: tuple[OwnResult, ...]) -> str:
    """Return the results as a Markdown table, a case a row; the peaks are the same on every generation."""
    rows = ["| kernel | | size | peak SBUF | peak PSUM | largest error | runs on |", "|---|---|---|---|---|---|---|"]
    for case in dict.fromkeys(result.case for result in results):
        own = [result for result in results if result.case is case]
        sbuf, psum = max(r.peak_sbuf_bytes for r in own) / 1024, max(r.peak_psum_bytes for r in own) / 1024
        error = "equal bits" if case.exact and not any(r.error for r in own) else f"{max(r.error for r in own):.0e}"
        names = ", ".join(r.generation for r in own)
        rows.append(
            f"| `{case.op}` | {case.what} | {case.size} | {sbuf:.1f} KiB | {psum:.1f} KiB | {error} | {names} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.stdout.write(format_own_results(check_own_kernels()) + "\n")
