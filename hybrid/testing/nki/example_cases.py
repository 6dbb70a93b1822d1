"""What the vendor's published example kernels must compute, in NumPy float64.

Names of files and kernels of aws-neuron/aws-neuron-sdk (`nki/`), inputs, and expectations written from the kernels'
descriptions. None of their code is here: the kernels are read from a folder outside this repository.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from hybrid.testing.nki.dtypes import Array

Inputs = tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExampleCase:
    """One published kernel with inputs and what must come out."""

    file: str
    """The file's path from the `nki` folder of the published repository."""
    kernel: str
    inputs: Callable[[np.random.Generator], Inputs]
    expected: Callable[..., tuple[Array, ...]]
    tolerance: float = 0.0
    """Largest difference allowed, relative to the expectation's largest magnitude; 0 asks for equality."""
    reason: str = "moves data or rounds as NumPy does"
    """Why that tolerance."""
    options: dict[str, Any] = field(default_factory=dict)
    generations: tuple[str, ...] = ("trn1", "trn2", "trn3")
    refused_by: str | None = None
    """The rule that must refuse the kernel; None where it must run."""


_FP32_SUM = "float32 sums of up to 512 products in another order: a few units of 2^-24 times sqrt(512)"
_SCAN = "float32 recurrence of 1024 steps"
_BF16_OUT = "the result is rounded to bfloat16 (2^-9) twice, in PSUM and on the way out"


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape).astype(np.float32)


def _pair(*shape: int) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: (_normal(rng, *shape), _normal(rng, *shape))


def _one(*shape: int) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: (_normal(rng, *shape),)


def _add(a: Array, b: Array) -> tuple[Array, ...]:
    return (a + b,)


def _product(left_t: Array, right: Array) -> tuple[Array, ...]:
    return (left_t.astype(np.float64).T @ right.astype(np.float64),)


def _matmul(kernel: str, k: int, m: int, n: int, **options: Any) -> ExampleCase:
    return ExampleCase(
        file="examples/matrix_multiplication/matrix_multiplication_nki_kernels.py",
        kernel=kernel,
        inputs=lambda rng: (_normal(rng, k, m), _normal(rng, k, n)),
        expected=_product,
        tolerance=2e-6,
        reason=_FP32_SUM,
        options=options,
    )


def _transposed(x: Array, shape: tuple[int, int]) -> tuple[Array, ...]:
    return (x.reshape(-1, *shape).transpose(0, 2, 1).reshape(x.shape),)


def _pooled(reduce: Callable[..., Array]) -> Callable[..., tuple[Array, ...]]:
    def expected(x: Array, size: int) -> tuple[Array, ...]:
        channels, height, width = x.shape
        windows = x.astype(np.float64).reshape(channels, height // size, size, width // size, size)
        return (reduce(windows, axis=(2, 4)),)

    return expected


def _mamba_inputs(rng: np.random.Generator) -> Inputs:
    batch, channels, length, states = 1, 256, 1024, 3
    delta = np.abs(_normal(rng, batch, channels, length)) * np.float32(0.1)
    u, b, c = _normal(rng, batch, channels, length), _normal(rng, 1, states, length), _normal(rng, 1, states, length)
    return delta, u, -np.abs(_normal(rng, channels, states)), b, c


def _mamba(*arrays: Array) -> tuple[Array, ...]:
    delta, u, a, b, c = (array.astype(np.float64) for array in arrays)
    out = np.zeros_like(delta)
    for state in range(a.shape[1]):
        h = np.zeros(delta.shape[:2])
        for t in range(delta.shape[2]):
            h = np.exp(delta[:, :, t] * a[None, :, state]) * h + delta[:, :, t] * u[:, :, t] * b[:, state, t][:, None]
            out[:, :, t] += h * c[:, state, t][:, None]
    return (out,)


def _mamba_case(version: int) -> ExampleCase:
    return ExampleCase(
        file="examples/fused_mamba/mamba_nki_kernels.py",
        kernel=f"mamba_v{version}",
        inputs=_mamba_inputs,
        expected=_mamba,
        tolerance=1e-5,
        reason=_SCAN,
    )


def _mx_inputs(rng: np.random.Generator, free: int) -> tuple[Array, Array]:
    """Return packed float8_e5m2 data [128, free] as words, and the scales [16, free]."""
    values = rng.standard_normal((128, free * 4)).astype(ml_dtypes.float8_e5m2)
    return values.view(np.uint32), rng.integers(120, 131, (16, free), dtype=np.uint8)


def _mx_values(packed: Array, scales: Array) -> Array:
    """Return packed data with its scales as float64 [512, free]."""
    elements = packed.view(ml_dtypes.float8_e5m2).astype(np.float64).reshape(128, -1, 4)
    spread = np.repeat(np.exp2(scales.astype(np.float64) - 127), 8, axis=0)[:, :, None]
    scaled: Array = (elements * spread).transpose(0, 2, 1).reshape(512, -1)
    return scaled


def _quantised(x: Array, group_axes: tuple[int, ...]) -> Array:
    """Return values rounded to float8_e5m2 under a power-of-two scale for each group, in float64."""
    wide = x.astype(np.float64)
    largest = np.abs(wide).max(axis=group_axes, keepdims=True)
    scale = np.exp2(np.floor(np.log2(largest)) - 14)
    rounded: Array = (wide / scale).astype(np.float32).astype(ml_dtypes.float8_e5m2).astype(np.float64) * scale
    return rounded


def _offline(st: Array, st_scale: Array, mv: Array, mv_scale: Array, *_: Any) -> tuple[Array, ...]:
    return (_mx_values(st, st_scale).T @ _mx_values(mv, mv_scale),)


def _half_offline(st: Array, st_scale: Array, mv: Array, *_: Any) -> tuple[Array, ...]:
    grouped = _quantised(mv.astype(np.float32).reshape(16, 8, -1, 4), (1, 3))
    moving = grouped.reshape(128, -1, 4).transpose(0, 2, 1).reshape(512, -1)
    return (_mx_values(st, st_scale).T @ moving,)


def _interleaved(st: Array, mv: Array, *_: Any) -> tuple[Array, ...]:
    left, right = (_quantised(x.astype(np.float32).reshape(4, 16, 8, -1), (0, 2)).reshape(512, -1) for x in (st, mv))
    return (left.T @ right,)


def _bf16(rng: np.random.Generator, *shape: int) -> Array:
    return _normal(rng, *shape).astype(ml_dtypes.bfloat16)


def _mx(kernel: str, inputs: Callable[[np.random.Generator], Inputs], expected: Any) -> ExampleCase:
    return ExampleCase(
        file="deep-dives/src/mxfp-matmul/mx_kernels.py",
        kernel=kernel,
        inputs=inputs,
        expected=expected,
        tolerance=2.0**-8,
        reason=_BF16_OUT,
        generations=("trn3",),
    )


_E5M2 = "float8_e5m2_x4"


def _strided(use_tensor_copy: bool) -> Callable[[np.random.Generator], Inputs]:
    return lambda rng: (_bf16(rng, 512, 128), _bf16(rng, 512, 512), _E5M2, use_tensor_copy)


CASES: tuple[ExampleCase, ...] = (
    ExampleCase(
        file="examples/tensor_addition/tensor_addition_nki_kernels.py",
        kernel="nki_tensor_add",
        inputs=_pair(256, 1024),
        expected=_add,
    ),
    ExampleCase(
        file="examples/getting_started_baremetal.py",
        kernel="nki_tensor_add_kernel",
        inputs=_pair(100, 60),
        expected=_add,
    ),
    ExampleCase(
        file="examples/simulate/nki_simulate_example.py",
        kernel="add_kernel",
        inputs=_pair(128, 512),
        expected=_add,
    ),
    _matmul("nki_matmul_basic_", 128, 64, 512),
    _matmul("nki_matmul_tiled_", 256, 256, 1024),
    _matmul("nki_matmul_hoist_load_", 256, 256, 1024),
    _matmul("nki_matmul_block_free_dimension_", 256, 256, 1024),
    _matmul("nki_matmul_fully_optimized_", 512, 512, 1024, TILES_IN_BLOCK_M=2, TILES_IN_BLOCK_N=1, TILES_IN_BLOCK_K=2),
    ExampleCase(
        file="examples/transpose2d/transpose2d_nki_kernels.py",
        kernel="tensor_transpose2D_kernel_",
        inputs=lambda rng: (_normal(rng, 65, 9 * 11), (9, 11)),
        expected=_transposed,
    ),
    ExampleCase(
        file="examples/average_pool2d/average_pool2d_nki_kernels.py",
        kernel="tensor_avgpool_kernel",
        inputs=lambda rng: (_normal(rng, 33, 9, 12), 3),
        expected=_pooled(np.mean),
        tolerance=1e-6,
        reason="nine float32 additions",
    ),
    ExampleCase(
        file="examples/index-case-1.py",
        kernel="tensor_split_kernel_",
        inputs=_one(100, 33),
        expected=lambda x: (x[:, 0::2], x[:, 1::2]),
    ),
    ExampleCase(
        file="examples/index-case-3.py",
        kernel="tensor_maxpool_kernel_",
        inputs=lambda rng: (_normal(rng, 33, 6, 8), 2),
        expected=_pooled(np.max),
    ),
    ExampleCase(
        file="examples/layout-pass.py",
        kernel="tensor_exp_kernel_",
        inputs=_one(128, 512),
        expected=lambda x: (np.exp(x.astype(np.float64)),),
        tolerance=1e-6,
        reason="one float32 exponential",
    ),
    ExampleCase(
        file="examples/layout-violation.py",
        kernel="tensor_exp_kernel_",
        inputs=_one(256, 512),
        expected=lambda x: (x,),
        refused_by="partitions-128",
        reason="the example shows what is refused",
    ),
    _mamba_case(1),
    _mamba_case(2),
    _mamba_case(3),
    _mx(
        "kernel_offline_quantized_mx_matmul",
        lambda rng: (*_mx_inputs(rng, 128), *_mx_inputs(rng, 512), _E5M2),
        _offline,
    ),
    _mx(
        "kernel_on_device_quantize_matmul_mx",
        lambda rng: (*_mx_inputs(rng, 128), _bf16(rng, 128, 2048), _E5M2, _E5M2),
        _half_offline,
    ),
    _mx("kernel_copy_strided_quantize_matmul_mx", _strided(True), _interleaved),
    _mx("kernel_copy_strided_quantize_matmul_mx_packed_scale", _strided(False), _interleaved),
)
"""Every case, in the order of the report."""
