"""What the `neuron` backend promises beyond the backend kit: one function a clause, as in `backend_kit`.

Run on the fake device by the tests, and on a real one by `hybrid validate --device neuron`. May import all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from hybrid.backends.base import BackendOptions
from hybrid.backends.neuron import NeuronBackend, check_group
from hybrid.errors import DeviceError, UnsupportedFormat


class Make(Protocol):
    """Opens a fresh `neuron` backend."""

    def __call__(
        self, options: BackendOptions | None = None, *, compiler: Callable[[Any], Any] | None = None
    ) -> NeuronBackend: ...


def device_mixups_raise(make: Make) -> None:
    """Refuse a host operand of one or more dims beside a device operand; copy nothing in silence."""
    backend = make()
    x = backend.to_device(torch.ones(3))
    try:
        _ = x + torch.ones(3)
    except RuntimeError:
        return
    raise AssertionError("tensors of two devices were added")


def float64_is_refused_before_the_device_narrows_it(make: Make) -> None:
    """Refuse the job's precision by name."""
    try:
        make().check_precision("fp64")
    except UnsupportedFormat as error:
        told = str(error)
    else:
        raise AssertionError("fp64 was taken")
    assert "fp32" in told, "the refusal must name the formats that there are"


def full_memory_is_told_in_torchs_words(make: Make) -> None:
    """Turn the runtime's own words for full memory into torch.OutOfMemoryError; leave other errors as they are."""
    backend = make()

    def fails(error: Exception) -> Callable[[], None]:
        def fn() -> None:
            raise error

        return fn

    cases: list[tuple[Exception, type[Exception]]] = [
        (RuntimeError("nrt_tensor_allocate status=4 NRT_RESOURCE"), torch.OutOfMemoryError),
        (torch.OutOfMemoryError("planted"), torch.OutOfMemoryError),
        (RuntimeError("another fault"), RuntimeError),
        (KeyError("planted"), KeyError),
    ]
    for error, wanted in cases:
        try:
            backend.execute(fails(error), expected_s=0.0)
        except Exception as found:
            told = found
        else:
            raise AssertionError(f"{error!r} was swallowed")
        assert type(told) is wanted, f"{error!r} became {told!r}, not {wanted.__name__}"


def groups_that_the_vendor_refuses_are_refused_in_words(make: Make) -> None:
    """Sizes and alignments that the collectives don't take are refused before anyone waits."""
    backend = make()
    for ranks in ([0, 1], [0, 1, 2], [1, 2, 3, 4], [0, 2, 4, 6]):
        try:
            backend.native_group(ranks, rank=ranks[0], address="127.0.0.1:1", timeout_s=1.0)
        except DeviceError as error:
            told = str(error)
        else:
            raise AssertionError(f"a group of {ranks} was opened")
        assert "4, 8, 16, 32" in told, "the refusal must name the sizes"
    for ranks in ([0], [4, 5, 6, 7], list(range(16, 32))):
        check_group(ranks)


def compile_failures_are_told_as_device_errors(make: Make) -> None:
    """With `compile`, what the compiler refuses is a DeviceError, and what it compiles is run by what it returned."""
    compiled: list[object] = []

    def compiler(fn: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: torch.Tensor) -> torch.Tensor:
            if len(compiled) > 1:
                raise _CompilerFailed("planted: unsupported operator")
            out: torch.Tensor = fn(x)
            return out

        compiled.append(fn)
        return run

    backend = make(BackendOptions(compile=True), compiler=compiler)
    x = backend.to_device(torch.ones(2))
    twice = backend.compile(lambda x: x * 2)
    assert torch.equal(backend.to_host(twice(x)), torch.full((2,), 2.0)), "a compiled function computes another result"
    broken = backend.compile(lambda x: x * 3)
    try:
        broken(x)
    except DeviceError as error:
        assert_told = "did not compile" in str(error)
    else:
        raise AssertionError("a function that did not compile ran")
    assert assert_told, "the error must say that it is the compiler's"

    def raises(x: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("planted")

    compiled.clear()
    try:
        backend.compile(raises)(x)
    except ZeroDivisionError:
        return
    raise AssertionError("a function's own error was swallowed or renamed")


class _CompilerFailed(Exception):
    """Stands for torch's BackendCompilerFailed, whose module takes seconds to import."""


_CompilerFailed.__module__ = "torch._dynamo.exc"

CLAUSES: tuple[Callable[[Make], None], ...] = (
    device_mixups_raise,
    float64_is_refused_before_the_device_narrows_it,
    full_memory_is_told_in_torchs_words,
    groups_that_the_vendor_refuses_are_refused_in_words,
    compile_failures_are_told_as_device_errors,
)
