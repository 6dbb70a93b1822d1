"""Tile: a strided view of storage, with the view methods of the documents.

Views share storage and move nothing. What a view may not do (touch the partition dimension of an on-chip tile, leave
its storage, be addressed at run time) is refused here; instructions check the rest.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn, final

import numpy as np

from hybrid.testing.nki.dtypes import PACKED, Array, storage_of
from hybrid.testing.nki.memory import WRITTEN, MemoryRegion, Storage
from hybrid.testing.nki.refusal import refuse


@dataclass(frozen=True, slots=True)
class DynamicSlice:
    """`nl.ds(start, size)`."""

    start: int
    size: int


@final
class Tile:
    """A view: element `(i0, i1, …)` is element `offset + Σ strides[k]·ik` of the storage, in units of `dtype`."""

    __slots__ = ("dtype", "name", "offset", "shape", "storage", "strides")

    def __init__(
        self,
        storage: Storage,
        dtype: str,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        offset: int = 0,
        name: str = "",
    ) -> None:
        self.storage, self.dtype, self.name = storage, dtype, name
        self.shape, self.strides, self.offset = shape, strides, offset

    # ---- attributes -------------------------------------------------------------------------------------------

    @property
    def buffer(self) -> MemoryRegion:
        """The region that the tile lives in."""
        return self.storage.region

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return storage_of(self.dtype).itemsize

    @property
    def start_partition(self) -> int:
        """The first partition that the tile touches (on chip)."""
        return self.offset * self.itemsize // self.storage.partition_bytes

    @property
    def free_size(self) -> int:
        """Elements a partition (on chip)."""
        return math.prod(self.shape[1:])

    def array(self) -> Array:
        """Return the elements as a writable NumPy view."""
        size = self.itemsize
        return np.ndarray(
            self.shape,
            storage_of(self.dtype),
            buffer=self.storage.data.data,
            offset=self.offset * size,
            strides=tuple(s * size for s in self.strides),
        )

    def state(self) -> Array:
        """Return the state of every byte of the elements, shape `(*shape, itemsize)`."""
        size = self.itemsize
        return np.ndarray(
            (*self.shape, size),
            np.uint8,
            buffer=self.storage.state.data,
            offset=self.offset * size,
            strides=(*(s * size for s in self.strides), 1),
        )

    def free_span_bytes(self) -> tuple[int, int]:
        """Return the first byte and the one after the last that the tile touches inside a partition."""
        first = self.offset * self.itemsize % self.storage.partition_bytes
        reach = sum((n - 1) * s for n, s in zip(self.shape[1:], self.strides[1:], strict=True))
        return first, first + (reach + 1) * self.itemsize

    def is_written(self) -> bool:
        """Return True where every byte was written."""
        return bool(np.all(self.state() & WRITTEN))

    def is_contiguous(self) -> bool:
        """Return True where the view is dense and row-major (on chip: within each partition)."""
        expected = 1
        for dim in range(self.ndim - 1, 0 if self.buffer.on_chip else -1, -1):
            if self.shape[dim] != 1 and self.strides[dim] != expected:
                return False
            expected *= self.shape[dim]
        return True

    def is_indirect(self) -> bool:
        """Return False: runtime addressing is outside the subset."""
        return False

    def get_pattern(self) -> list[list[int]]:
        """Return `[[stride, count], …]`, as `ap` takes it."""
        return [[s, n] for s, n in zip(self.strides, self.shape, strict=True)]

    # ---- views ------------------------------------------------------------------------------------------------

    def _view(self, shape: Sequence[int], strides: Sequence[int], offset: int | None = None) -> Tile:
        at = self.offset if offset is None else offset
        return Tile(self.storage, self.dtype, tuple(shape), tuple(strides), at, self.name)

    def __getitem__(self, key: object) -> Tile:
        shape: list[int] = []
        strides: list[int] = []
        offset = self.offset
        for dim, item in enumerate(self._full_key(key)):
            start, count, step, keeps = self._parse(dim, item)
            offset += start * self.strides[dim]
            if keeps or (self.buffer.on_chip and dim == 0):
                shape.append(count)
                strides.append(self.strides[dim] * step)
        least = 2 if self.buffer.on_chip else 1
        while len(shape) < least:
            shape.append(1)
            strides.append(1)
        return self._view(shape, strides, offset)

    def _full_key(self, key: object) -> list[object]:
        items = list(key) if isinstance(key, tuple) else [key]
        if sum(item is Ellipsis for item in items) == 1:
            at = next(i for i, item in enumerate(items) if item is Ellipsis)
            items[at : at + 1] = [slice(None)] * (self.ndim - len(items) + 1)
        if len(items) > self.ndim:
            refuse("index-out-of-range", f"{len(items)} indices for {self.ndim} dimensions", value=self.shape)
        return items + [slice(None)] * (self.ndim - len(items))

    def _parse(self, dim: int, item: object) -> tuple[int, int, int, bool]:
        """Return start, count, step and whether the dimension stays."""
        size = self.shape[dim]
        if isinstance(item, Tile):
            refuse("dynamic-index", "a tile was used as an index")
        if isinstance(item, DynamicSlice):
            item = slice(item.start, item.start + item.size)
        if isinstance(item, slice):
            step = 1 if item.step is None else item.step
            start = 0 if item.start is None else item.start
            stop = size if item.stop is None else item.stop
            start, stop = (start + size if start < 0 else start), (stop + size if stop < 0 else stop)
            if not (0 <= start < stop <= size and step >= 1):
                refuse("index-out-of-range", f"slice {start}:{stop}:{step} of dimension {dim}", value=self.shape)
            return start, -(-(stop - start) // step), step, True
        if not isinstance(item, int | np.integer) or isinstance(item, bool):
            refuse("index-out-of-range", "an index is an integer, a slice, `...` or nl.ds", value=repr(item))
        index = int(item) + size if item < 0 else int(item)
        if not 0 <= index < size:
            refuse("index-out-of-range", f"index {item} of dimension {dim}", value=self.shape)
        return index, 1, 1, False

    def slice(self, dim: int, start: int, end: int, step: int = 1) -> Tile:
        """Return the elements `start:end:step` of one dimension."""
        key = [slice(None)] * self.ndim
        key[dim] = slice(start, end, step)
        return self[tuple(key)]

    def select(self, dim: int, index: int) -> Tile:
        """Return one index of a dimension, which goes."""
        if not isinstance(index, int):
            refuse("dynamic-index", "select takes an integer here")
        key: list[object] = [slice(None)] * self.ndim
        key[dim] = index
        return self[tuple(key)]

    def permute(self, dims: tuple[int, ...]) -> Tile:
        """Return the dimensions in another order."""
        if sorted(dims) != list(range(self.ndim)):
            refuse("permutation", "not a permutation of the dimensions", value=dims)
        if self.buffer.on_chip and dims[0] != 0:
            refuse("partition-dim-fixed", "permute moves the partition dimension", value=dims)
        return self._view([self.shape[d] for d in dims], [self.strides[d] for d in dims])

    def broadcast(self, dim: int, size: int) -> Tile:
        """Repeat a dimension of size one."""
        self._not_partition(dim, "broadcast")
        if self.shape[dim] != 1:
            refuse("broadcast-size-1", f"dimension {dim} has size {self.shape[dim]}", value=self.shape)
        shape, strides = list(self.shape), list(self.strides)
        shape[dim], strides[dim] = size, 0
        return self._view(shape, strides)

    def expand_dim(self, dim: int) -> Tile:
        """Insert a dimension of size one."""
        self._not_partition(dim, "expand_dim")
        shape, strides = list(self.shape), list(self.strides)
        shape.insert(dim, 1)
        strides.insert(dim, 1)
        return self._view(shape, strides)

    def squeeze_dim(self, dim: int) -> Tile:
        """Remove a dimension of size one."""
        self._not_partition(dim, "squeeze_dim")
        if self.shape[dim] != 1:
            refuse("reshape-size", f"dimension {dim} has size {self.shape[dim]}", value=self.shape)
        return self._view(self.shape[:dim] + self.shape[dim + 1 :], self.strides[:dim] + self.strides[dim + 1 :])

    def reshape_dim(self, dim: int, shape: tuple[int, ...]) -> Tile:
        """Split one dimension; one of its parts may be -1."""
        if shape != (self.shape[dim],):
            self._not_partition(dim, "reshape_dim")
        known = -math.prod(shape) if -1 in shape else 0
        parts = [self.shape[dim] // known if n == -1 and known else n for n in shape]
        return self.reshape((*self.shape[:dim], *parts, *self.shape[dim + 1 :]))

    def flatten_dims(self, start_dim: int, end_dim: int) -> Tile:
        """Merge the dimensions `start_dim` to `end_dim`."""
        self._not_partition(start_dim, "flatten_dims")
        merged = math.prod(self.shape[start_dim : end_dim + 1])
        return self.reshape((*self.shape[:start_dim], merged, *self.shape[end_dim + 1 :]))

    def reshape(self, shape: tuple[int, ...]) -> Tile:
        """Return another shape of the same elements, without a copy."""
        shape = tuple(shape)
        if math.prod(shape) != self.size:
            refuse("reshape-size", f"{self.shape} has {self.size} elements", value=shape)
        if self.buffer.on_chip and shape[0] != self.shape[0]:
            refuse("partition-dim-fixed", "reshape changes the partition dimension", value=(self.shape, shape))
        array = self.array()
        try:
            reshaped = array.reshape(shape, copy=False)
        except ValueError:
            refuse("reshape-layout", f"{self.shape} with strides {self.strides} has no such view", value=shape)
        return self._view(shape, [s // self.itemsize for s in reshaped.strides])

    def view(self, dtype: str) -> Tile:
        """Return the same bytes as another data type; the last dimension scales."""
        old, new = self.itemsize, storage_of(dtype).itemsize
        last = self.shape[-1] * old
        whole = last % new == 0 and self.offset * old % new == 0 and all(s * old % new == 0 for s in self.strides[:-1])
        if self.strides[-1] != 1 or not whole:
            refuse("view-dtype", f"{self.dtype} {self.shape} does not read as whole {dtype} elements", value=dtype)
        strides = (*(s * old // new for s in self.strides[:-1]), 1)
        return Tile(self.storage, dtype, (*self.shape[:-1], last // new), strides, self.offset * old // new, self.name)

    def ap(
        self,
        pattern: Sequence[Sequence[int]],
        offset: int | None = None,
        scalar_offset: object = None,
        vector_offset: object = None,
        indirect_dim: int = 0,
        dtype: str | None = None,
    ) -> Tile:
        """Return an explicit access pattern of the storage; the view's own shape and strides do not matter."""
        if scalar_offset is not None or vector_offset is not None:
            refuse("dynamic-index", "ap with a runtime offset")
        kind = self.dtype if dtype is None else dtype
        size = storage_of(kind).itemsize
        at = self.offset * self.itemsize // size if offset is None else offset
        strides, shape = tuple(int(p[0]) for p in pattern), tuple(int(p[1]) for p in pattern)
        if self.buffer.on_chip and strides[0] * size != self.storage.partition_bytes and shape[0] != 1:
            partition = self.storage.partition_bytes // size
            refuse("ap-partition-stride", f"the partition step is {strides[0]}", value=pattern, valid=str(partition))
        reach = at + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        if at < 0 or min(shape) < 1 or (reach + 1) * size > self.storage.data.size:
            refuse("ap-out-of-bounds", "the pattern leaves its storage", value=pattern)
        return Tile(self.storage, kind, shape, strides, at, self.name)

    def _not_partition(self, dim: int, what: str) -> None:
        if self.buffer.on_chip and dim == 0:
            refuse("partition-dim-fixed", f"{what} of the partition dimension", value=self.shape)

    # ---- what a tile is not -----------------------------------------------------------------------------------

    def vector_select(self, dim: int, vector_offset: object) -> NoReturn:
        """Refuse: runtime addressing is outside the subset."""
        refuse("dynamic-index", "vector_select")

    def indirect(self, index: object, num_elem: int | None = None) -> NoReturn:
        """Refuse: runtime addressing is outside the subset."""
        refuse("dynamic-index", "indirect")

    def rearrange(self, src_pattern: object, dst_pattern: object, fixed_sizes: object = None) -> NoReturn:
        """Refuse: use reshape and permute."""
        refuse("not-in-subset", "rearrange")

    def __setitem__(self, key: object, value: object) -> NoReturn:
        refuse("tile-arithmetic", "assignment into a tile", fix="write through an instruction's dst")

    def _no_value(self, *_: object) -> NoReturn:
        refuse("value-at-trace-time", "the value of a tile was asked for")

    def _no_operator(self, *_: object) -> NoReturn:
        refuse("tile-arithmetic", "a Python operator was applied to a tile")

    __bool__ = __int__ = __float__ = __index__ = __len__ = __iter__ = item = tolist = _no_value
    __lt__ = __le__ = __gt__ = __ge__ = _no_value
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _no_operator
    __neg__ = __matmul__ = __pow__ = __iadd__ = __isub__ = __imul__ = _no_operator

    def __repr__(self) -> str:
        return f"<{self.name or 'tile'} {self.buffer.value} {self.dtype}{list(self.shape)}>"


def is_packed(tile: Tile) -> bool:
    """Return True for the four-to-an-element MX types."""
    return tile.dtype in PACKED
