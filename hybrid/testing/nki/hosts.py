"""Host arrays at a kernel's border: NumPy arrays, and CPU tensors where torch is already imported.

Does not import torch by itself: without torch in the process there is no tensor to convert.
"""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from hybrid.testing.nki.dtypes import Array

_BITS_OF = {"bfloat16": (np.int16, ml_dtypes.bfloat16), "float8_e4m3fn": (np.uint8, ml_dtypes.float8_e4m3fn),
            "float8_e5m2": (np.uint8, ml_dtypes.float8_e5m2)}  # fmt: skip
"""Formats that cross between torch and NumPy as their bits."""


def is_tensor(value: object) -> bool:
    """Return True for a torch tensor."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def as_array(value: Any) -> Array | None:
    """Return a host array or tensor as an array; None for anything else."""
    if isinstance(value, np.ndarray):
        return value
    if not is_tensor(value):
        return None
    tensor = value.detach().contiguous()
    bits = _BITS_OF.get(str(tensor.dtype).removeprefix("torch."))
    if bits is None:
        plain: Array = tensor.numpy()
        return plain
    integers: Array = tensor.view(getattr(sys.modules["torch"], np.dtype(bits[0]).name)).numpy()
    values: Array = integers.view(bits[1])
    return values


def as_tensor(array: Array) -> Any:
    """Return an array as a CPU tensor."""
    torch = sys.modules["torch"]
    for name, (bits, dtype) in _BITS_OF.items():
        if array.dtype == dtype:
            return torch.from_numpy(array.view(bits)).view(getattr(torch, name))
    return torch.from_numpy(array)


def overwrite(value: Any, array: Array) -> None:
    """Write an array back into the host array or tensor that it came from."""
    if is_tensor(value):
        value.detach().copy_(as_tensor(array.copy()))
    else:
        value[...] = array
