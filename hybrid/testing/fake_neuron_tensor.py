"""The fake `neuron` device's tensor: a wrapper on device `neuron:0` that holds a CPU tensor and computes on it.

What a real device would refuse is refused here: operands on two devices, float64, arithmetic in int64. What it
counts: bytes alive (each storage once), and bytes copied between host and device. May import only torch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import return_and_correct_aliasing

aten = torch.ops.aten
NUM_BYTES = 96 * 2**30 // 4
"""What the fake device holds: a logical core's share of a Trainium2."""

# Indices may be int64 on the device (the real one narrows them); arithmetic on them may not.
_INT64_MAY = {
    *(
        "arange",
        "argmax",
        "clone",
        "copy_",
        "detach",
        "empty",
        "empty_like",
        "empty_strided",
        "expand",
        "full",
        "gather",
    ),
    *(
        "alias",
        "as_strided",
        "fill_",
        "full_like",
        "index",
        "index_select",
        "new_empty",
        "new_empty_strided",
        "new_full",
    ),
    *(
        "new_ones",
        "new_zeros",
        "ones",
        "ones_like",
        "permute",
        "select",
        "slice",
        "split",
        "squeeze",
        "stack",
        "t",
        "topk",
    ),
    *("_to_copy", "_unsafe_view", "_reshape_alias", "cat", "lift_fresh", "scalar_tensor", "transpose", "unbind"),
    *(
        "unsqueeze",
        "view",
        "where",
        "zero_",
        "zeros",
        "zeros_like",
        "random_",
        "_local_scalar_dense",
        "max",
        "nll_loss_forward",
    ),
}


class Ledger:
    """Bytes alive on the fake device, and bytes that went over the host's bus."""

    def __init__(self) -> None:
        self.limit_bytes = NUM_BYTES
        self.reset()

    def reset(self) -> None:
        """Forget the peaks and the traffic; what is alive stays counted."""
        self.live_bytes = getattr(self, "live_bytes", 0)
        self.peak_bytes = self.live_bytes
        self.to_device_bytes = self.to_host_bytes = 0
        self.num_ops = 0

    def hold(self, inner: torch.Tensor) -> None:
        """Count a storage from now until nothing refers to it; each storage once."""
        storage = inner.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        if self.live_bytes + size > self.limit_bytes:
            raise torch.OutOfMemoryError(
                f"fake neuron out of memory: tried to allocate {size} bytes; {self.live_bytes} of "
                f"{self.limit_bytes} are in use"
            )
        self._sizes[key] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._drop, key).atexit = False

    def _drop(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key, 0)

    _sizes: dict[int, int] = {}  # noqa: RUF012 - one device a process, one ledger


ledger = Ledger()


class DeviceTensor(torch.Tensor):
    """A tensor on `neuron:0`."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> DeviceTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("neuron", 0),
        )

    def __init__(self, inner: torch.Tensor) -> None:
        self.host = inner

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"neuron({self.host!r})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return run_op(func, args, dict(kwargs or {}))


def wrap(inner: torch.Tensor) -> DeviceTensor:
    """Return a device tensor over a CPU tensor; refuses what the device does not have."""
    if inner.dtype in (torch.float64, torch.complex128):
        raise RuntimeError(f"the neuron device has no {inner.dtype}; compute in float32 or on the host")
    ledger.hold(inner)
    return DeviceTensor(inner)


def run_op(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operator of the dispatcher on the CPU tensors inside."""
    ledger.num_ops += 1
    if func in (aten.copy_.default, aten._copy_from.default):
        return _copy(*((args[0], args[1]) if func is aten.copy_.default else (args[1], args[0])))
    if func is aten._to_copy.default:
        return _to_copy(args[0], kwargs)
    inner_args, inner_kwargs = pytree.tree_map(lambda x: _inside(x, func), (args, kwargs))
    if inner_kwargs.get("device") is not None:
        inner_kwargs["device"] = torch.device("cpu")
    if func is aten._local_scalar_dense.default:
        ledger.to_host_bytes += inner_args[0].element_size()
    out = func(*inner_args, **inner_kwargs)
    _check_int64(func, out)
    wrapped = pytree.tree_map(lambda x: wrap(x) if isinstance(x, torch.Tensor) else x, out)
    aliasing: Any = return_and_correct_aliasing
    return aliasing(func, args, kwargs, wrapped)


def _inside(x: Any, func: Any) -> Any:
    if isinstance(x, DeviceTensor):
        return x.host
    # As on CUDA, a host number of no dims may go with device tensors.
    if isinstance(x, torch.Tensor) and x.dim() > 0:
        raise RuntimeError(
            f"{func}: expected all tensors to be on the same device, but found at least two devices, neuron:0 and "
            f"{x.device}"
        )
    return x


def _check_int64(func: Any, out: Any) -> None:
    name = func.overloadpacket.__name__
    for x in pytree.tree_leaves(out):
        if isinstance(x, torch.Tensor) and x.dtype == torch.int64 and x.dim() > 0 and name not in _INT64_MAY:
            raise RuntimeError(f"{func}: the neuron device has no arithmetic in int64; compute it on the host")


def _copy(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    if isinstance(target, DeviceTensor):
        if isinstance(source, DeviceTensor):
            target.host.copy_(source.host)
        else:
            ledger.to_device_bytes += target.host.nbytes
            target.host.copy_(source)
        return target
    assert isinstance(source, DeviceTensor)
    ledger.to_host_bytes += source.host.nbytes
    return target.copy_(source.host)


def _to_copy(x: DeviceTensor, kwargs: dict[str, Any]) -> torch.Tensor:
    device = kwargs.pop("device", None)
    to_host = device is not None and torch.device(device).type == "cpu"
    kwargs.pop("pin_memory", None)
    out: torch.Tensor = aten._to_copy.default(x.host, **kwargs)
    if to_host:
        ledger.to_host_bytes += x.host.nbytes
        return out
    return wrap(out)


def factory(op: Any) -> Callable[..., torch.Tensor]:
    """Return a factory operator of the device: the CPU's, wrapped."""

    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        return wrap(op(*args, **kwargs))

    return make
