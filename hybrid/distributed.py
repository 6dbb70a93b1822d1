"""The torch.distributed backend named `hybrid`: importing this module, or torch itself, makes it known to torch.

    import torch.distributed as dist
    dist.init_process_group("hybrid")

torch finds `register` by its entry point when torch is imported; where it may not (TORCH_DEVICE_BACKEND_AUTOLOAD=0),
import this module. What does the work is imported by the first `init_process_group("hybrid")`. Imports torch inside
functions alone: torch calls `register` while it is itself being imported, perhaps from here. May import only
`collectives`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrid.collectives.torch_options import HybridOptions

__all__ = ["HybridOptions", "register"]

NAME = "hybrid"
_DEVICES = ("cpu", "cuda")
"""Only devices that have a default backend already: that of any other is its vendor's to register."""


def register() -> None:
    """Make the backend known to torch; again does nothing."""
    dist: Any = importlib.import_module("torch.distributed")
    if not dist.is_available() or NAME in dist.Backend.backend_list:
        return
    dist.Backend.register_backend(NAME, _create, extended_api=True, devices=list(_DEVICES))


def _create(arguments: Any, options: Any) -> Any:
    from hybrid.collectives.torch_backend import create_group

    return create_group(arguments, options)


def __getattr__(name: str) -> Any:
    if name == "HybridOptions":
        return importlib.import_module("hybrid.collectives.torch_options").HybridOptions
    raise AttributeError(f"module 'hybrid.distributed' has no attribute {name!r}; it has {', '.join(__all__)}")


register()
