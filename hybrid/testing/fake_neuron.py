"""A fake `neuron` device for one process: what TorchNeuron registers, in pure Python, on the CPU.

    from hybrid.testing import fake_neuron
    fake_neuron.install()
    torch.ones(2).to("neuron")

Registers a PrivateUse1 device, its module `torch.neuron`, autocast and a process group `neuron` over gloo. The real
`neuron` backend's code runs on it unchanged. It shows that the code keeps the device's rules; it says nothing of speed,
of compilation, or of the last bits of a result. One device a process; install it before the first backward; it
cannot be taken out again, and it and the real torch_neuronx cannot be in one process. May import only torch, `errors`,
and the fake's other files.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from datetime import timedelta
from typing import Any

import torch

from hybrid.errors import MachineError
from hybrid.testing.fake_neuron_tensor import aten, factory, ledger, run_op

_FACTORIES = ("empty.memory_format", "empty_strided")
# What autocast does to an operator, as torch's own lists for CUDA have it.
_NARROW = ("mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "scaled_dot_product_attention", "conv2d", "einsum")
_WIDE = (
    "cross_entropy_loss",
    "nll_loss",
    "softmax.int",
    "log_softmax.int",
    "layer_norm",
    "norm.Scalar",
    "cumsum",
    "exp",
)
# torch's type stubs leave this key out.
_AUTOCAST_KEY: Any = getattr(torch._C.DispatchKey, "AutocastPrivateUse1")  # noqa: B009
_libraries: list[Any] = []


def installed() -> bool:
    """Return whether this process's `neuron` device is the fake one."""
    return bool(_libraries)


def install() -> None:
    """Register the fake device; a second call does nothing.

    Raises:
        MachineError: the real torch_neuronx is in this process, or another device has taken the name.
    """
    if installed():
        return
    if "torch_neuronx" in sys.modules or hasattr(torch, "neuron"):
        raise MachineError(
            "the fake neuron device cannot be loaded beside the real torch_neuronx",
            fix="use the real device, or start Python with TORCH_DEVICE_BACKEND_AUTOLOAD=0",
        )
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend("neuron", backend_module=_device_module())
    _libraries.append(_implement())
    _libraries.extend(_implement_autocast())
    _register_group()


def real_package_found() -> bool:
    """Return whether a torch_neuronx lies on the path, imported or not."""
    return importlib.util.find_spec("torch_neuronx") is not None


def _device_module() -> types.ModuleType:
    module: Any = types.ModuleType("torch.neuron")
    module.is_available = lambda: True
    module.is_initialized = lambda: True
    module.device_count = lambda: 1
    module.current_device = lambda: 0
    module.set_device = _set_device
    module.synchronize = lambda device=None: None
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None  # random numbers come from the CPU's generator
    module.manual_seed = lambda seed: None
    module.get_rng_state = lambda device=None: torch.get_rng_state()
    module.set_rng_state = lambda state, device=None: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module.memory_allocated = lambda device=None: ledger.live_bytes
    module.max_memory_allocated = lambda device=None: ledger.peak_bytes
    module.reset_peak_memory_stats = lambda device=None: ledger.reset()
    module.empty_cache = lambda: None
    return module  # type: ignore[no-any-return]


def _set_device(device: object) -> None:
    if torch.device("neuron", device if isinstance(device, int) else 0).index != 0:
        raise RuntimeError(f"the fake neuron device has one device, no {device}")


def _implement() -> Any:
    library = _library("aten", "IMPL")
    for name in _FACTORIES:
        packet, _, overload = name.partition(".")
        library.impl(name, factory(getattr(getattr(aten, packet), overload or "default")), "PrivateUse1")

    def copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        return run_op(aten._copy_from.default, (source, target), {})  # type: ignore[no-any-return]

    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


def _implement_autocast() -> list[Any]:
    through = _library("_", "IMPL", "AutocastPrivateUse1")
    through.fallback(torch.library.fallthrough_kernel)
    casts = _library("aten", "IMPL")
    for names, narrow in ((_NARROW, True), (_WIDE, False)):
        for name in names:
            packet, _, overload = name.partition(".")
            op = getattr(getattr(aten, packet), overload or "default")
            casts.impl(name, _casting(op, narrow=narrow), "AutocastPrivateUse1")
    return [through, casts]


def _library(*words: str) -> Any:
    make: Any = torch.library.Library
    return make(*words)


def _casting(op: Any, *, narrow: bool) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("neuron") if narrow else torch.float32
        # Without this the call would come back here; torch's own casts exclude the key in the same way.
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(_AUTOCAST_KEY)):
            cast = torch.utils._pytree.tree_map(lambda x: _cast(x, dtype), (args, kwargs))
            return op(*cast[0], **cast[1])

    return call


def _cast(x: Any, dtype: torch.dtype) -> Any:
    narrow = isinstance(x, torch.Tensor) and x.is_floating_point() and x.device.type == "neuron"
    return x.to(dtype) if narrow else x


def _register_group() -> None:
    import torch.distributed as dist

    if not dist.is_available() or "neuron" in dist.Backend.backend_list:
        return
    from hybrid.testing.fake_neuron_group import NeuronGroup

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> NeuronGroup:
        return NeuronGroup(store, rank, size, timeout)

    dist.Backend.register_backend("neuron", create, devices=["neuron"])
