"""The inputs of the kernels' conformance kit, and how each operation is called with them.

A case makes its inputs on the CPU from its own seed, in the format under test. May import only torch and
this package's own modules.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from hybrid_kernels.reduce_add import ref as reduce_add_ref

Inputs = dict[str, Any]
Outputs = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One set of inputs for one operation."""

    op: str
    name: str
    build: Callable[[torch.Generator], Inputs]

    def make(self, dtype: torch.dtype) -> Inputs:
        """Return the inputs, those that the operation takes in any format in `dtype`; the same each time."""
        if self.op == "fp8_pack" and dtype == torch.float64:
            dtype = torch.float32  # packing is defined in float32
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.op} {self.name}".encode()))
        return {name: _rounded(name, value, dtype) for name, value in self.build(generator).items()}


# Kept in float32: tables, and the state of the optimizer.
_ALWAYS_WIDE = {"cos", "sin", "param", "exp_avg", "exp_avg_sq"}


def _rounded(name: str, value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list):
        return [_rounded(name, x, dtype) for x in value]
    if not isinstance(value, Tensor) or not value.is_floating_point() or name == "error":
        return value
    if name in _ALWAYS_WIDE:
        return value.to(torch.float64 if dtype == torch.float64 else torch.float32)
    return value.to(dtype)


def _normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


def _spoiled(x: Tensor) -> Tensor:
    """Return `x` with a NaN, an inf and a -inf, each in a row of its own where there are rows enough."""
    rows = x.view(-1, x.shape[-1])
    for row, value in enumerate((float("nan"), float("inf"), float("-inf"))):
        rows[row % len(rows), (3 * row + 1) % x.shape[-1]] = value
    return x


def _rmsnorm(shape: tuple[int, ...], scale: float = 1.0, spoil: bool = False) -> Callable[[torch.Generator], Inputs]:
    def build(g: torch.Generator) -> Inputs:
        x = _normal(g, *shape, scale=scale)
        return {"x": _spoiled(x) if spoil else x, "weight": _normal(g, shape[-1]), "grad": _normal(g, *shape)}

    return build


def _rope(shape: tuple[int, ...], scale: float = 1.0) -> Callable[[torch.Generator], Inputs]:
    def build(g: torch.Generator) -> Inputs:
        angles = 10.0 * _normal(g, shape[-2], shape[-1] // 2)
        x = _normal(g, *shape, scale=scale)
        return {"x": x, "cos": angles.cos().float(), "sin": angles.sin().float(), "grad": _normal(g, *shape)}

    return build


def _swiglu(shape: tuple[int, ...], scale: float = 1.0, spoil: bool = False) -> Callable[[torch.Generator], Inputs]:
    def build(g: torch.Generator) -> Inputs:
        gate = _normal(g, *shape, scale=scale)
        return {
            "gate": _spoiled(gate) if spoil else gate,
            "up": _normal(g, *shape),
            "grad": _normal(g, *shape),
        }

    return build


def _cross_entropy(
    tokens: int, hidden: int, vocab: int, scale: float = 1.0, ignored: str = "none"
) -> Callable[[torch.Generator], Inputs]:
    def build(g: torch.Generator) -> Inputs:
        labels = torch.randint(vocab, (tokens,), generator=g)
        if ignored == "some":
            labels[::3] = -100
        if ignored == "all":
            labels[:] = -100
        return {
            "hidden": _normal(g, tokens, hidden, scale=scale),
            "weight": _normal(g, vocab, hidden, scale=hidden**-0.5),
            "labels": labels,
        }

    return build


def _attention(
    batch: int, heads: int, kv_heads: int, length: int, size: int, scale: float = 1.0
) -> Callable[[torch.Generator], Inputs]:
    def build(g: torch.Generator) -> Inputs:
        return {
            "query": _normal(g, batch, heads, length, size, scale=scale),
            "key": _normal(g, batch, kv_heads, length, size),
            "value": _normal(g, batch, kv_heads, length, size),
            "grad": _normal(g, batch, heads, length, size),
        }

    return build


def _fp8_pack(
    size: int, block_size: int, spread: float = 2.0, spoil: bool = False
) -> Callable[[torch.Generator], Inputs]:
    def build(g: torch.Generator) -> Inputs:
        x = _normal(g, size) * torch.exp(spread * _normal(g, size))
        x[size // 3 : size // 2] = 0.0
        error = _normal(g, size).float()
        return {"x": _spoiled(x) if spoil else x, "error": error, "block_size": block_size}

    return build


def _reduce_add(ranks: int, size: int, scale: float = 1.0) -> Callable[[torch.Generator], Inputs]:
    return lambda g: {"chunks": [_normal(g, size, scale=scale) for _ in range(ranks)]}


def _adamw(
    size: int, step: int = 7, scale: float = 1.0, grad_scale: float = 1.0
) -> Callable[[torch.Generator], Inputs]:
    return lambda g: {
        "param": _normal(g, size).float(),
        "gradient": _normal(g, size, scale=scale),
        "exp_avg": _normal(g, size, scale=0.1 * scale).float(),
        "exp_avg_sq": (_normal(g, size, scale=0.1 * scale) ** 2).float(),
        "step": step,
        "grad_scale": grad_scale,
    }


def _call_rmsnorm(kernel: ModuleType, i: Inputs) -> Outputs:
    grad_x, grad_weight = kernel.rmsnorm_backward(i["grad"], i["x"], i["weight"], eps=1e-5)
    return {"y": kernel.rmsnorm(i["x"], i["weight"], eps=1e-5), "grad_x": grad_x, "grad_weight": grad_weight}


def _call_rope(kernel: ModuleType, i: Inputs) -> Outputs:
    return {
        "y": kernel.rope(i["x"], i["cos"], i["sin"]),
        "grad_x": kernel.rope_backward(i["grad"], i["cos"], i["sin"]),
    }


def _call_swiglu(kernel: ModuleType, i: Inputs) -> Outputs:
    grad_gate, grad_up = kernel.swiglu_backward(i["grad"], i["gate"], i["up"])
    return {"y": kernel.swiglu(i["gate"], i["up"]), "grad_gate": grad_gate, "grad_up": grad_up}


def _call_cross_entropy(kernel: ModuleType, i: Inputs) -> Outputs:
    loss, grad_hidden, grad_weight = kernel.cross_entropy_with_gradients(
        i["hidden"], i["weight"], i["labels"], ignore_index=-100, scale=1.0 / max(1, len(i["labels"]))
    )
    return {"loss": loss, "grad_hidden": grad_hidden, "grad_weight": grad_weight}


def _call_attention(kernel: ModuleType, i: Inputs) -> Outputs:
    scale = i["query"].shape[-1] ** -0.5
    out, logsumexp = kernel.attention_with_logsumexp(i["query"], i["key"], i["value"], scale=scale)
    grads = kernel.attention_backward(i["grad"], i["query"], i["key"], i["value"], out, logsumexp, scale=scale)
    return {"out": out, **dict(zip(("grad_query", "grad_key", "grad_value"), grads, strict=True))}


def _call_reduce_add(kernel: ModuleType, i: Inputs) -> Outputs:
    total = kernel.reduce_add(i["chunks"])
    # The order of summation is the contract: the bits of the reference run on the very same chunks.
    return {"total": total, "bits_agree": (total == reduce_add_ref.reduce_add(i["chunks"])).float()}


def _call_fp8_pack(kernel: ModuleType, i: Inputs) -> Outputs:
    outputs: Outputs = {}
    for fp8_format, error, seed in (
        ("e4m3", None, None),
        ("e4m3fn", i["error"], None),
        ("e4m3", i["error"], 2**40 - 9),
    ):
        packed = kernel.fp8_pack(i["x"], block_size=i["block_size"], fp8_format=fp8_format, error=error, seed=seed)
        values = kernel.fp8_unpack(packed.payload, packed.scales, block_size=i["block_size"])
        name = f"{fp8_format}{'' if error is None else ' feedback'}{'' if seed is None else ' stochastic'}"
        outputs[f"{name} payload"] = packed.payload.float()
        outputs[f"{name} scales"], outputs[f"{name} values"] = packed.scales, values
        if packed.error is not None:
            outputs[f"{name} error"] = packed.error
    return outputs


def _call_adamw(kernel: ModuleType, i: Inputs) -> Outputs:
    state = (i["param"], i["exp_avg"], i["exp_avg_sq"])
    kernel.adamw_(
        i["param"],
        i["gradient"],
        i["exp_avg"],
        i["exp_avg_sq"],
        step=i["step"],
        grad_scale=i["grad_scale"],
        learning_rate=1e-3,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.1,
    )
    return dict(zip(("param", "exp_avg", "exp_avg_sq"), state, strict=True))


CALLS: dict[str, Callable[[ModuleType, Inputs], Outputs]] = {
    "rmsnorm": _call_rmsnorm,
    "rope": _call_rope,
    "swiglu": _call_swiglu,
    "cross_entropy": _call_cross_entropy,
    "attention": _call_attention,
    "fp8_pack": _call_fp8_pack,
    "reduce_add": _call_reduce_add,
    "adamw": _call_adamw,
}
"""How each operation is called: all its outputs, gradients included, by name."""

_BUILDS: dict[str, dict[str, Callable[[torch.Generator], Inputs]]] = {
    "rmsnorm": {
        "one element": _rmsnorm((1, 1)),
        "no rows": _rmsnorm((0, 16)),
        "odd": _rmsnorm((3, 5, 37)),
        "a power of two": _rmsnorm((8, 128)),
        "a tail behind one": _rmsnorm((5, 1025)),
        "large": _rmsnorm((4, 96), scale=3e3),
        "tiny": _rmsnorm((4, 96), scale=1e-3),
        "not finite": _rmsnorm((5, 33), spoil=True),
    },
    "rope": {
        "one pair": _rope((1, 1, 1, 2)),
        "no samples": _rope((0, 2, 3, 8)),
        "no positions": _rope((2, 2, 0, 8)),
        "odd": _rope((2, 3, 7, 10)),
        "a power of two": _rope((2, 4, 16, 64)),
        "large": _rope((1, 2, 5, 16), scale=1e4),
    },
    "swiglu": {
        "one element": _swiglu((1,)),
        "empty": _swiglu((0, 8)),
        "odd": _swiglu((3, 7, 11)),
        "a tail": _swiglu((1, 1500)),
        "large": _swiglu((4, 50), scale=100.0),
        "not finite": _swiglu((5, 33), spoil=True),
    },
    "cross_entropy": {
        "one token": _cross_entropy(1, 4, 3),
        "no tokens": _cross_entropy(0, 4, 3),
        "one word": _cross_entropy(3, 4, 1),
        "odd": _cross_entropy(7, 19, 37),
        "a tail": _cross_entropy(33, 16, 1100),
        "large logits": _cross_entropy(9, 16, 50, scale=60.0),
        "some ignored": _cross_entropy(11, 16, 50, ignored="some"),
        "all ignored": _cross_entropy(5, 16, 50, ignored="all"),
    },
    "attention": {
        "one position": _attention(1, 1, 1, 1, 16),
        "no samples": _attention(0, 2, 1, 5, 16),
        "no positions": _attention(2, 2, 1, 0, 16),
        "odd": _attention(2, 3, 3, 13, 16),
        "grouped": _attention(1, 6, 2, 33, 24),
        "a power of two": _attention(1, 1, 1, 64, 32),
        "a tail": _attention(1, 2, 1, 70, 16),
        "large scores": _attention(1, 2, 2, 20, 16, scale=50.0),
    },
    "fp8_pack": {
        "one element": _fp8_pack(1, 128),
        "empty": _fp8_pack(0, 128),
        "odd": _fp8_pack(1021, 7),
        "a tail": _fp8_pack(2000, 128),
        "wide blocks": _fp8_pack(3000, 1500),
        "every magnitude": _fp8_pack(1500, 32, spread=30.0),
        "not finite": _fp8_pack(900, 100, spoil=True),
    },
    "reduce_add": {
        "one chunk": _reduce_add(1, 5),
        "empty": _reduce_add(3, 0),
        "odd": _reduce_add(3, 1021),
        "eight ranks": _reduce_add(8, 1500),
        "large": _reduce_add(4, 100, scale=1e4),
    },
    "adamw": {
        "one element": _adamw(1),
        "empty": _adamw(0),
        "odd": _adamw(1021),
        "first step": _adamw(50, step=1),
        "clipped": _adamw(300, grad_scale=0.37),
        "large gradients": _adamw(100, scale=1e4),
        "late step": _adamw(100, step=100_000),
    },
}

CASES = tuple(Case(op=op, name=name, build=build) for op, builds in _BUILDS.items() for name, build in builds.items())
"""Every case."""
