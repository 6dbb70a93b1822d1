"""The Backend contract's kit: one function a clause; run it on a new backend with one line.

    @pytest.mark.parametrize("clause", backend_kit.CLAUSES, ids=lambda clause: clause.__name__)
    def test_my_backend_keeps_the_contract(clause):
        clause(lambda memory_bytes: MyBackend(...))

Each clause takes a function that opens a fresh backend with a memory limit; it raises AssertionError with what was
broken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from hybrid.backends.base import DTYPE_OF_PRECISION, Backend
from hybrid.errors import UnsupportedFormat

Open: TypeAlias = Callable[[int | None], Backend]


def round_trip_keeps_the_bits(open_backend: Open) -> None:
    """Clause 1."""
    backend = open_backend(None)
    generator = torch.Generator().manual_seed(1)
    for name in sorted(backend.capabilities.formats & DTYPE_OF_PRECISION.keys()):
        for shape in ((0,), (1,), (3, 5), (2, 3, 4)):
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPE_OF_PRECISION[name])
            back = backend.to_host(backend.to_device(x))
            assert back.device.type == "cpu", "to_host left the tensor on the device"
            assert back.dtype == x.dtype, f"{x.dtype} came back as {back.dtype}"
            assert torch.equal(
                back.view(torch.uint8) if x.numel() else back, x.view(torch.uint8) if x.numel() else x
            ), f"{name} of shape {shape} lost bits"
        column = torch.arange(12, dtype=torch.float32).to(DTYPE_OF_PRECISION[name]).view(3, 4).T
        assert backend.to_host(backend.to_device(column)).is_contiguous(), "to_host must return contiguous memory"


def formats_are_refused_by_name(open_backend: Open) -> None:
    """Clause 2."""
    backend = open_backend(None)
    for name in DTYPE_OF_PRECISION:
        refused, named = False, True
        try:
            backend.check_precision(name)
        except UnsupportedFormat as error:
            refused = True
            named = backend.capabilities.chip in str(error)
        assert named, "the refusal must name the chip"
        assert refused != (name in backend.capabilities.formats), f"{name}: refused={refused} against the capabilities"


def execute_is_the_same_mathematics(open_backend: Open) -> None:
    """Clause 3."""
    backend = open_backend(None)
    a = torch.arange(6, dtype=torch.float32).view(2, 3)
    direct = a @ a.T
    placed = backend.to_device(a)
    out = backend.execute(lambda: placed @ placed.T, expected_s=0.0)
    assert torch.allclose(backend.to_host(out), direct, rtol=1e-3), "execute changed the result"

    def fails() -> None:
        raise KeyError("planted")

    try:
        backend.execute(fails, expected_s=0.0)
    except KeyError:
        return
    raise AssertionError("execute swallowed an exception")


def memory_is_told_and_limited(open_backend: Open) -> None:
    """Clause 4."""
    backend = open_backend(1000)
    before = backend.memory_stats().allocated_bytes
    backend.allocate(600, "weights")
    assert backend.memory_stats().allocated_bytes == before + 600, "allocate was not counted"
    try:
        backend.allocate(600, "activations")
    except torch.OutOfMemoryError as error:
        told = str(error)
        assert backend.memory_stats().allocated_bytes == before + 600, "a refused allocation was counted"
    else:
        raise AssertionError("1200 bytes were allocated on a device of 1000")
    assert "activations" in told, "the error must say what the memory was for"
    backend.release(600)
    stats = backend.memory_stats()
    assert stats.allocated_bytes == before, "release gave nothing back"
    assert stats.peak_bytes >= before + 600, "the peak was forgotten"


def synchronize_waits_for_all_work(open_backend: Open) -> None:
    """Clause 5."""
    backend = open_backend(None)
    x = backend.to_device(torch.ones(64, 64))
    for _ in range(8):
        x = backend.execute(lambda x=x: x @ x / 64, expected_s=0.0)  # type: ignore[misc]
    backend.synchronize()
    assert torch.allclose(backend.to_host(x), torch.ones(64, 64), rtol=1e-2), "work was lost"


CLAUSES: tuple[Callable[[Open], None], ...] = (
    round_trip_keeps_the_bits,
    formats_are_refused_by_name,
    execute_is_the_same_mathematics,
    memory_is_told_and_limited,
    synchronize_waits_for_all_work,
)
