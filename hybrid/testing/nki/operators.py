"""The math operators of NKI: what each computes in float32, and where the documents allow it.

An operator is both a value (`op=nl.add`) and, with tiles, a function (`nl.add(x, y)`); the function is made of
instructions in `language.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import erf as _erf

Function = Callable[..., Any]
Values = Any
"""A float32 array; NumPy's functions are typed as returning Any on it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """The facts of one operator; absent roles are None or False."""

    name: str
    binary: Function | None = None
    unary: Function | None = None
    activation: Function | None = None
    bitwise: bool = False
    compares: bool = False
    reduces: bool = False


def _sigmoid(x: Values) -> Values:
    return 1.0 / (1.0 + np.exp(-x))


def _sigmoid_dx(x: Values) -> Values:
    return _sigmoid(x) * (1.0 - _sigmoid(x))


def _normal_density(x: Values) -> Values:
    return np.exp(-0.5 * x * x) / np.sqrt(2.0 * np.pi)


def _gelu(x: Values) -> Values:
    return 0.5 * x * (1.0 + _erf(x / np.sqrt(2.0)))


def _gelu_dx(x: Values) -> Values:
    return 0.5 * (1.0 + _erf(x / np.sqrt(2.0))) + x * _normal_density(x)


def _gelu_tanh(x: Values) -> Values:
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


def _mish(x: Values) -> Values:
    return x * np.tanh(np.logaddexp(0.0, x))


def _silu(x: Values) -> Values:
    return x * _sigmoid(x)


def _silu_dx(x: Values) -> Values:
    s = _sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


def _logical(function: Function) -> Function:
    return lambda a, b: function(a != 0, b != 0)


def _magnitude(function: Function) -> Function:
    return lambda a, b: function(np.abs(a), np.abs(b))


_REDUCING: dict[str, Function] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "logical_and": _logical(np.logical_and),
    "logical_or": _logical(np.logical_or),
    "logical_xor": _logical(np.logical_xor),
}
_COMPARING: dict[str, Function] = {
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater_equal": np.greater_equal,
    "greater": np.greater,
    "less_equal": np.less_equal,
    "less": np.less,
}
_BINARY: dict[str, Function] = {
    "power": np.power,
    "abs_max": _magnitude(np.maximum),
    "abs_min": _magnitude(np.minimum),
}
_BITWISE: dict[str, Function] = {
    "bitwise_and": np.bitwise_and,
    "bitwise_or": np.bitwise_or,
    "bitwise_xor": np.bitwise_xor,
    "left_shift": np.left_shift,
    "right_shift": np.right_shift,
}
# The vector engine's unary operators.
_UNARY: dict[str, Function] = {
    "abs": np.abs,
    "square": np.square,
    "relu": lambda x: np.maximum(x, 0.0),
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "reciprocal": lambda x: 1.0 / x,
}
# The Scalar Engine's functions. The engine approximates them by piecewise polynomials; here they are exact to float32.
_ACTIVATION: dict[str, Function] = {
    **_UNARY,
    "copy": lambda x: x,
    "sigmoid": _sigmoid,
    "gelu": _gelu,
    "gelu_dx": _gelu_dx,
    "gelu_apprx_tanh": _gelu_tanh,
    "gelu_apprx_sigmoid": lambda x: x * _sigmoid(1.702 * x),
    "gelu_apprx_sigmoid_dx": lambda x: _sigmoid(1.702 * x) + 1.702 * x * _sigmoid_dx(1.702 * x),
    "silu": _silu,
    "silu_dx": _silu_dx,
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(0.0, x),
    "mish": _mish,
    "erf": _erf,
    "erf_dx": lambda x: 2.0 / np.sqrt(np.pi) * np.exp(-x * x),
    "exp": np.exp,
    "log": np.log,
    "sin": np.sin,
    "arctan": np.arctan,
    "sqrt": np.sqrt,
    "sign": np.sign,
}


def _all() -> dict[str, Operation]:
    found = {name: Operation(name=name, binary=f, reduces=True) for name, f in _REDUCING.items()}
    found |= {name: Operation(name=name, binary=f, compares=True) for name, f in _COMPARING.items()}
    found |= {name: Operation(name=name, binary=f) for name, f in _BINARY.items()}
    reducing_bits = {"bitwise_and", "bitwise_or", "bitwise_xor"}
    for name, function in _BITWISE.items():
        found[name] = Operation(name=name, binary=function, bitwise=True, reduces=name in reducing_bits)
    found["invert"] = Operation(name="invert", unary=np.invert, bitwise=True)
    for name, function in _ACTIVATION.items():
        found[name] = Operation(name=name, activation=function, unary=_UNARY.get(name))
    return found


OPERATIONS: dict[str, Operation] = _all()
