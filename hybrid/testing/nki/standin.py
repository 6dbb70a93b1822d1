"""The modules that stand in for `nki`, `nki.language`, `nki.isa` and `nki.typing` while `interpreting` is active.

They are never installed globally: `sys.modules` is as before when the context ends, whatever happened inside. Kernel
files are loaded under private names for the same reason, so that no importable module stays bound to the stand-ins.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from hybrid.errors import UserError
from hybrid.testing.nki import (
    enums,
    isa_move,
    isa_mx,
    isa_scalar,
    isa_tensor,
    isa_vector,
    kernel,
    language,
)
from hybrid.testing.nki.dtypes import STORAGE
from hybrid.testing.nki.generations import generation
from hybrid.testing.nki.machine import Machine, Usage, active, current
from hybrid.testing.nki.memory import MemoryRegion
from hybrid.testing.nki.refusal import NkiRefused, refuse
from hybrid.testing.nki.signatures import signature_table
from hybrid.testing.nki.tile import Tile

ISA: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        isa_move.dma_copy,
        isa_move.tensor_copy,
        isa_move.memset,
        isa_move.tensor_copy_predicated,
        isa_move.iota,
        isa_move.affine_select,
        isa_tensor.nc_matmul,
        isa_tensor.nc_transpose,
        isa_vector.tensor_tensor,
        isa_vector.tensor_scalar,
        isa_vector.scalar_tensor_tensor,
        isa_vector.tensor_reduce,
        isa_vector.reciprocal,
        isa_vector.tensor_tensor_scan,
        isa_vector.bn_stats,
        isa_vector.bn_aggr,
        isa_scalar.activation,
        isa_scalar.activation_reduce,
        isa_scalar.exponential,
        isa_mx.quantize_mx,
        isa_mx.nc_matmul_mx,
    )
}
"""The instructions of the subset."""

LANGUAGE: dict[str, Callable[..., Any]] = {
    name: function
    for name, function in vars(language).items()
    if inspect.isfunction(function)
    and function.__module__ == language.__name__
    and not name.startswith("_")
    and name != "operators"
}
"""The functions of `nki.language` in the subset, besides the operators."""


def get_nc_version() -> enums.NcVersion:
    """Return the current generation's number."""
    return enums.NcVersion(current().generation.nc_version)


def _checked(section: str, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with unknown or missing parameters refused by rule instead of by TypeError."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError:
            # Only a failed call is looked at: binding costs as much as a small instruction.
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                refuse("unknown-parameter", f"{section}.{name}: {error}", valid=signature.parameters)
            raise

    return call


def _outside_subset(section: str, name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        refuse("not-in-subset", f"nki.{section}.{name} is documented but not interpreted")

    return call


def _module(name: str, section: str, members: dict[str, Any]) -> ModuleType:
    module = ModuleType(name, "Stand-in for the vendor's module while a kernel is interpreted.")
    for documented in signature_table()[section]:
        setattr(module, documented, _outside_subset(section, documented))
    for member, value in members.items():
        setattr(module, member, value)

    def missing(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        refuse("unknown-name", f"{name} has no `{attribute}`", fix="see signatures.yaml for the documented names")

    module.__getattr__ = missing  # type: ignore[method-assign]
    return module


@dataclass(frozen=True, slots=True)
class _TensorAnnotation:
    def __getitem__(self, shape: object) -> object:
        return shape


@cache
def _modules() -> dict[str, ModuleType]:
    values: dict[str, Any] = {name: name for name in STORAGE}
    values |= {region.name: region for region in MemoryRegion}
    values |= {"hbm": MemoryRegion.private_hbm, "MemoryRegion": MemoryRegion, "tile_size": language.TileSize()}
    values |= {"NkiTensor": Tile, "NKIObject": language.NKIObject}
    values |= {name: language.UnaryOperator(name) for name in ("average", "prelu", "bypass")}
    operators: dict[str, Any] = dict(language.operators())
    functions = {name: _checked("language", name, function) for name, function in LANGUAGE.items()}
    nl = _module("nki.language", "language", {**values, **operators, **functions})

    engines = {f"{e.name}_engine": e for e in enums.Engine}
    kinds = {
        "engine": enums.Engine,
        "reduce_cmd": enums.ReduceCmd,
        "dge_mode": enums.DgeMode,
        "oob_mode": enums.OobMode,
        "matmul_perf_mode": enums.MatmulPerfMode,
        "nc_version": enums.NcVersion,
        "dma_engine": enums.DmaEngine,
    }
    instructions = {name: _checked("isa", name, function) for name, function in ISA.items()}
    others = {"get_nc_version": get_nc_version, "NkiValidationError": NkiRefused}
    nisa = _module("nki.isa", "isa", {**engines, **kinds, **instructions, **others})

    typing = ModuleType("nki.typing")
    typing.tensor = _TensorAnnotation()  # type: ignore[attr-defined]
    top = _module("nki", "nki", {"jit": kernel.jit, "simulate": kernel.simulate})
    top.__path__ = []
    top.language, top.isa, top.typing = nl, nisa, typing  # type: ignore[attr-defined]
    return {"nki": top, "nki.language": nl, "nki.isa": nisa, "nki.typing": typing}


@contextmanager
def interpreting(name: str) -> Iterator[Machine]:
    """Interpret kernels at the limits of a generation (`trn1`, `trn2`, `trn3`) inside the context.

    Contexts nest. `sys.modules` is the process's: interpret in one thread at a time.

    Raises:
        UserError: no such generation.
    """
    machine = Machine(generation(name))
    saved = {key: module for key, module in sys.modules.items() if key == "nki" or key.startswith("nki.")}
    for key in saved:
        del sys.modules[key]
    sys.modules.update(_modules())
    try:
        with active(machine):
            yield machine
    finally:
        for key in [key for key in sys.modules if key == "nki" or key.startswith("nki.")]:
            del sys.modules[key]
        sys.modules.update(saved)


def load_kernels(path: Path) -> ModuleType:
    """Return a kernel file as a module of a private name; inside `interpreting` only.

    Raises:
        NkiRefused: rule `outside-interpreter`.
        UserError: no such file.
    """
    current()
    if not path.is_file():
        raise UserError("no such kernel file", value=str(path), fix="give the path of a .py file")
    name = f"_nki_kernels_{abs(hash(path.resolve())):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[name]
    return module


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRun:
    """One interpreted launch: what it returned, and what it took."""

    outputs: Any
    usage: Usage


def run_kernel(path: Path, name: str, *args: Any, on: str = "trn2", **kwargs: Any) -> KernelRun:
    """Interpret the kernel `name` of a file with host arrays and hyper-parameters.

    Args:
        path: the kernel file.
        name: the function decorated with `nki.jit`.
        args: arrays and hyper-parameters.
        on: the generation.
        kwargs: hyper-parameters by name.

    Raises:
        NkiRefused: the kernel breaks a rule.
    """
    with interpreting(on) as machine:
        outputs = getattr(load_kernels(path), name)(*args, **kwargs)
        return KernelRun(outputs=outputs, usage=machine.usage())
