"""Sum of the chunks that several ranks sent, in float32 and rank order, on whatever device they are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hybrid_kernels.selection import implementation


def reduce_add(chunks: Sequence[Tensor], *, out: Tensor | None = None, variant: str | None = None) -> Tensor:
    """Return ``((chunks[0] + chunks[1]) + ...)`` in float32; every variant gives the same bits.

    Shapes:
        chunks: P times (N,), contiguous.  out: (N,) float32.  returns: (N,) float32

    Raises:
        ValueError: no chunks, chunks that differ in shape or format, or the named variant cannot run here.
    """
    if not chunks or any(c.shape != chunks[0].shape or c.dtype != chunks[0].dtype for c in chunks):
        kinds = ", ".join(f"{c.dtype} {tuple(c.shape)}" for c in chunks) or "none"
        raise ValueError(f"reduce_add takes one chunk or more, all of one shape and format (got {kinds})")
    total: Tensor = implementation("reduce_add", chunks[0], variant).reduce_add(chunks, out=out)
    return total
