"""Packing chunks into FP8 blocks and back, on whatever device they are: the device's side of the wire codec."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_kernels.fp8_pack.ref import MAXIMUM_OF_FORMAT, Packed
from hybrid_kernels.selection import implementation

__all__ = ["Packed", "fp8_pack", "fp8_unpack"]


def fp8_pack(
    x: Tensor,
    *,
    block_size: int,
    fp8_format: str = "e4m3",
    error: Tensor | None = None,
    seed: int | None = None,
    check: bool = True,
    variant: str | None = None,
) -> Packed:
    """Return `x` (plus `error`, if given) packed block by block; every variant makes the same bytes.

    Args:
        x: float32, bfloat16 or float16, contiguous.
        block_size: elements that share a scale.
        fp8_format: `e4m3` (largest 240: Trainium 1 and 2, and every reader of e4m3fn) or `e4m3fn` (448).
        error: the `error` of the pack before (error feedback).
        seed: rounds stochastically with this seed; None rounds to nearest even.
        check: raise if the sum holds NaN or inf; waits for the device. Without it such a block decodes to NaN.
        variant: the variant to run, instead of the device's own.

    Shapes:
        x: (N,).  error: (N,) float32.  returns: see `Packed`

    Raises:
        FloatingPointError: `check`, and a block is not finite; says which first.
        ValueError: unknown format, wrong shape, or the named variant cannot run here.
    """
    if fp8_format not in MAXIMUM_OF_FORMAT:
        raise ValueError(f"no such FP8 format (got {fp8_format!r}); valid: {', '.join(MAXIMUM_OF_FORMAT)}")
    if x.dim() != 1 or block_size < 1 or not x.dtype.is_floating_point or x.dtype == torch.float64:
        raise ValueError(
            f"fp8_pack takes (N,) float32, bfloat16 or float16 in blocks of 1 or more (got "
            f"{tuple(x.shape)} {x.dtype} in blocks of {block_size})"
        )
    if error is not None and (error.shape != x.shape or error.dtype != torch.float32):
        raise ValueError(f"error must be float32 {tuple(x.shape)} (got {error.dtype} {tuple(error.shape)})")
    packed: Packed = implementation("fp8_pack", x, variant).fp8_pack(
        x, block_size=block_size, fp8_format=fp8_format, error=error, seed=seed
    )
    if check:
        _check_finite(packed.scales, block_size)
    return packed


def fp8_unpack(
    payload: Tensor,
    scales: Tensor,
    *,
    block_size: int,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
) -> Tensor:
    """Return the values that `fp8_pack` packed, of either format; see `ref.fp8_unpack`.

    Shapes:
        payload: (N,), uint8.  scales: (ceil(N / block_size),), float32.  returns: (N,)
    """
    out: Tensor = implementation("fp8_pack", scales, variant).fp8_unpack(
        payload, scales, block_size=block_size, dtype=dtype
    )
    return out


def _check_finite(scales: Tensor, block_size: int) -> None:
    bad = scales.isnan().nonzero()
    if len(bad):
        block = int(bad[0])
        raise FloatingPointError(
            f"{len(bad)} of {len(scales)} blocks hold NaN or inf, the first one the elements from "
            f"{block * block_size}; they cannot be packed into FP8"
        )
