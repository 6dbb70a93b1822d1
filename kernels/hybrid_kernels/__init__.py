"""Kernels for training, one folder an operation, one file a variant; imports nothing of `hybrid`.

Each operation has `ref.py`, the definition: slow, obvious, also in float64. Every other variant (`cpu`, `triton`,
`nki`) has functions of the same names and signatures, and is compared with it. The functions here pick
the variant by the device of their input (`selection`), and are differentiable where training needs it.

Importing this package imports neither Triton nor NKI.
"""

from hybrid_kernels.adamw import adamw_
from hybrid_kernels.attention import attention
from hybrid_kernels.cross_entropy import cross_entropy
from hybrid_kernels.fp8_pack import Packed, fp8_pack, fp8_unpack
from hybrid_kernels.reduce_add import reduce_add
from hybrid_kernels.rmsnorm import rmsnorm
from hybrid_kernels.rope import rope, rope_tables
from hybrid_kernels.selection import OPS, VARIANTS, Choice, choose
from hybrid_kernels.swiglu import swiglu

__all__ = [
    "OPS",
    "VARIANTS",
    "Choice",
    "Packed",
    "adamw_",
    "attention",
    "choose",
    "cross_entropy",
    "fp8_pack",
    "fp8_unpack",
    "reduce_add",
    "rmsnorm",
    "rope",
    "rope_tables",
    "swiglu",
]
