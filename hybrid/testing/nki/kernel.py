"""Kernel: what `nki.jit` makes of a function, and one launch of it on the current machine.

Host arrays and CPU tensors become copies in HBM, hyper-parameters pass through; the returned tiles become arrays
(tensors, where tensors came in), and arguments that the kernel wrote are written back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, final

from hybrid.testing.nki.hosts import as_array, as_tensor, is_tensor, overwrite
from hybrid.testing.nki.lint import check_function
from hybrid.testing.nki.machine import Machine, current
from hybrid.testing.nki.memory import MemoryRegion
from hybrid.testing.nki.refusal import refuse
from hybrid.testing.nki.tile import Tile


@final
class Kernel:
    """A kernel function; calling it interprets it on the current machine."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __getitem__(self, grid: object) -> Kernel:
        if grid not in (1, (1,)):
            refuse("spmd-grid", "a launch on more than one core", value=grid)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the kernel; see the module.

        Raises:
            NkiRefused: the kernel breaks a rule.
        """
        machine = current()
        if any(isinstance(value, Tile) for value in (*args, *kwargs.values())):
            # A kernel called inside a kernel is inlined.
            return self.function(*args, **kwargs)
        check_function(self.function)
        machine.reset()
        tiles: list[tuple[Any, Tile]] = []
        inner_args = [_argument(machine, value, tiles) for value in args]
        inner_kwargs = {name: _argument(machine, value, tiles) for name, value in kwargs.items()}
        returned = self.function(*inner_args, **inner_kwargs)
        machine.launches.append(machine.usage())
        for host, tile in tiles:
            if tile.storage.changed:
                overwrite(host, tile.array())
        to_tensors = any(is_tensor(host) for host, _ in tiles)
        return _outputs(returned, [tile for _, tile in tiles], to_tensors)


def jit(fn: Callable[..., Any] | None = None, **kwargs: Any) -> Any:
    """Return the function as a Kernel; also a decorator with empty parentheses."""
    if kwargs:
        refuse("jit-arguments", f"nki.jit with {', '.join(kwargs)}")
    return Kernel if fn is None else Kernel(fn)


def simulate(kernel: Any) -> Kernel:
    """Return the kernel itself: it is interpreted anyway."""
    return kernel if isinstance(kernel, Kernel) else Kernel(kernel)


def _argument(machine: Machine, value: Any, tiles: list[tuple[Any, Tile]]) -> Any:
    array = as_array(value)
    if array is not None:
        tiles.append((value, machine.argument(array)))
        return tiles[-1][1]
    if isinstance(value, list):
        refuse("list-argument", "a kernel argument is a list", value=value)
    try:
        hash(value)
    except TypeError:
        refuse("unhashable-argument", f"a {type(value).__name__} argument", fix="pass numbers, strings or tuples")
    return value


def _outputs(returned: Any, arguments: list[Tile], to_tensors: bool) -> Any:
    if isinstance(returned, tuple):
        return tuple(_outputs(item, arguments, to_tensors) for item in returned)
    if not isinstance(returned, Tile):
        return returned
    is_argument = any(returned.storage is tile.storage for tile in arguments)
    if returned.buffer is not MemoryRegion.shared_hbm and not is_argument:
        refuse("output-shared-hbm", f"the kernel returns a tile in {returned.buffer.value}", value=returned)
    if not returned.is_written():
        refuse("output-not-written", "the kernel returns a tensor with elements that nothing wrote", value=returned)
    array = returned.array().copy()
    return as_tensor(array) if to_tensors else array
