"""NKI's data types and their NumPy storage.

A data type is its name, as in the vendor's typed stubs. Packed types (`_x4`) are stored as one unsigned integer an
element; `tfloat32` as float32 whose low 13 mantissa bits are rounded away on every write.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from hybrid.testing.nki.refusal import refuse

Array = npt.NDArray[Any]

STORAGE: dict[str, np.dtype[Any]] = {
    "bool_": np.dtype(np.uint8),
    "int8": np.dtype(np.int8),
    "int16": np.dtype(np.int16),
    "int32": np.dtype(np.int32),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
    "uint32": np.dtype(np.uint32),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "tfloat32": np.dtype(np.float32),
    "float8_e4m3": np.dtype(ml_dtypes.float8_e4m3),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e8m0fnu": np.dtype(ml_dtypes.float8_e8m0fnu),
    "float8_e5m2_x4": np.dtype(np.uint32),
    "float8_e4m3fn_x4": np.dtype(np.uint32),
    "float4_e2m1fn_x4": np.dtype(np.uint16),
}
INTEGER = frozenset({"bool_", "int8", "int16", "int32", "uint8", "uint16", "uint32"})
PACKED = frozenset(name for name in STORAGE if name.endswith("_x4"))
_OF_HOST = {storage: name for name, storage in STORAGE.items() if name not in PACKED | {"bool_", "tfloat32"}}
_OF_HOST[np.dtype(np.bool_)] = "bool_"


def storage_of(dtype: object) -> np.dtype[Any]:
    """Return the NumPy type that stores an NKI type.

    Raises:
        NkiRefused: rule `dtype-not-nki`.
    """
    if not isinstance(dtype, str) or dtype not in STORAGE:
        refuse("dtype-not-nki", "not a data type of nki.language", value=dtype, valid=STORAGE)
    return STORAGE[dtype]


def dtype_of_host(dtype: np.dtype[Any]) -> str:
    """Return the NKI type of a host array.

    Raises:
        NkiRefused: rule `host-dtype`, for the 64-bit types that the device does not have, and others.
    """
    if dtype not in _OF_HOST:
        refuse(
            "host-dtype",
            "a kernel argument has a type that the device lacks",
            value=str(dtype),
            valid=_OF_HOST.values(),
        )
    return _OF_HOST[dtype]


def cast(values: Array, dtype: str) -> Array:
    """Return `values` in the storage of `dtype`: round to nearest even; integers saturate."""
    storage = storage_of(dtype)
    with np.errstate(all="ignore"):
        if dtype == "tfloat32":
            return _to_tfloat32(values.astype(np.float32))
        if dtype == "bool_":
            truth: Array = (values != 0).astype(np.uint8)
            return truth
        if dtype in INTEGER and values.dtype.kind not in "iu":
            return _to_integer(values, storage)
        return values.astype(storage)


def _to_integer(values: Array, storage: np.dtype[Any]) -> Array:
    limits = np.iinfo(storage)
    # float64 holds every 32-bit integer, so that saturation lands on the exact limit.
    return np.clip(np.rint(values.astype(np.float64)), limits.min, limits.max).astype(storage)


def _to_tfloat32(values: Array) -> Array:
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x0FFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)
    result: Array = np.where(np.isfinite(values), rounded.view(np.float32), values)
    return result
