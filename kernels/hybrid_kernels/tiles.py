"""Cutting a tensor into tiles that stay in a core's cache while several operations pass over them.

A chain of whole-tensor operations reads and writes main memory once each, and first-touches fresh memory for
every result; a chain on a tile does so once in all. May import only torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

TILE_ELEMENTS = 1 << 17
"""Elements of a tile for each thread: 512 KiB in float32, a part of a recent core's second-level cache."""


def tiles(num_rows: int, row_elements: int = 1) -> Iterator[slice]:
    """Yield slices that cover `num_rows` rows in order, each about `TILE_ELEMENTS` a thread and one row at least."""
    step = rows_of_tile(row_elements)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def rows_of_tile(row_elements: int) -> int:
    """Return how many rows of this many elements make one tile."""
    return max(1, TILE_ELEMENTS * torch.get_num_threads() // max(1, row_elements))
