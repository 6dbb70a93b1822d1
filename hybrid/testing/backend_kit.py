"""The Backend contract's kit: one function a clause; run it on a new backend with one line.

    @pytest.mark.parametrize("clause", backend_kit.CLAUSES, ids=lambda clause: clause.__name__)
    def test_my_backend_keeps_the_contract(clause):
        clause(lambda memory_bytes: MyBackend(...))

Each clause takes a function that opens a fresh backend with a memory limit; it raises AssertionError with what was
broken.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn

from hybrid.backends.base import DTYPE_OF_PRECISION, Backend
from hybrid.errors import DeviceError, UnsupportedFormat
from hybrid_kernels.selection import OPS, choose

Open: TypeAlias = Callable[[int | None], Backend]


def _formats(backend: Backend) -> list[str]:
    """Return the compute formats that the kit tries."""
    return sorted(backend.capabilities.formats & DTYPE_OF_PRECISION.keys())


def round_trip_keeps_the_bits(open_backend: Open) -> None:
    """Clause 1."""
    backend = open_backend(None)
    generator = torch.Generator().manual_seed(1)
    for name in _formats(backend):
        for shape in ((0,), (1,), (3, 5), (2, 3, 4)):
            x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DTYPE_OF_PRECISION[name])
            placed = backend.to_device(x)
            assert placed.device == backend.device, f"to_device landed on {placed.device}, not on {backend.device}"
            back = backend.to_host(placed)
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
    if backend.memory_stats().device_bytes is not None:
        _device_memory_follows_its_tensors(backend)
    backend.release(600)
    stats = backend.memory_stats()
    assert stats.allocated_bytes == before, "release gave nothing back"
    assert stats.peak_bytes >= before + 600, "the peak was forgotten"


def _device_memory_follows_its_tensors(backend: Backend) -> None:
    """Where the device's own allocator is asked, it knows of the tensors on the device."""
    before = backend.memory_stats().device_bytes or 0
    x = backend.to_device(torch.zeros(2**18))
    held = backend.memory_stats()
    assert (held.device_bytes or 0) >= before + x.nbytes, "a tensor on the device is not in its memory"
    del x
    after = backend.memory_stats()
    assert (after.device_bytes or 0) < (held.device_bytes or 0), "a tensor that has gone is still in its memory"
    assert (after.device_peak_bytes or 0) >= (held.device_bytes or 0), "the device's peak was forgotten"


def synchronize_waits_for_all_work(open_backend: Open) -> None:
    """Clause 5."""
    backend = open_backend(None)
    x = backend.to_device(torch.ones(64, 64))
    for _ in range(8):
        x = backend.execute(lambda x=x: x @ x / 64, expected_s=0.0)  # type: ignore[misc]
    backend.synchronize()
    assert torch.allclose(backend.to_host(x), torch.ones(64, 64), rtol=1e-2), "work was lost"


def placed_modules_compute_on_the_device(open_backend: Open) -> None:
    """Clause 6."""
    backend = open_backend(None)
    host = _Scaled()
    wanted = {name: x.detach().clone() for name, x in (*host.named_parameters(), *host.named_buffers())}
    x = torch.arange(6, dtype=torch.float32).view(2, 3)
    direct = (x @ host.weight.T * host.scale).sum().detach()
    placed = backend.place(host)
    found = dict((*placed.named_parameters(), *placed.named_buffers()))
    assert found.keys() == wanted.keys(), "place changed the names"
    for name, there in found.items():
        assert there.device == backend.device, f"{name} was left on {there.device}"
        assert torch.equal(backend.to_host(there.detach()), wanted[name]), f"{name} lost bits"
    out = backend.execute(lambda: placed(backend.to_device(x)), expected_s=0.0)
    assert out.device == backend.device, f"the result is on {out.device}"
    assert torch.allclose(backend.to_host(out.detach()), direct, rtol=1e-3), "a placed module computes another result"
    out.backward()
    grad = placed.weight.grad
    assert grad is not None, "no gradient reached the placed parameter"
    assert grad.device == backend.device, f"the gradient is on {grad.device}"


def compiled_functions_keep_result_and_shapes(open_backend: Open) -> None:
    """Clause 7."""
    backend = open_backend(None)
    calls: list[int] = []

    def double(x: torch.Tensor, *, by: float) -> torch.Tensor:
        calls.append(x.shape[0])
        return x * by

    compiled = backend.compile(double)
    x = backend.to_device(torch.ones(4, 3))
    for _ in range(2):
        assert torch.equal(backend.to_host(compiled(x, by=2.0)), torch.full((4, 3), 2.0)), "compile changed the result"
    if backend.capabilities.execution == "graph":
        for other in (torch.ones(5, 3), torch.ones(4, 3, dtype=torch.bfloat16)):
            before = len(calls)
            told = ""
            try:
                compiled(backend.to_device(other), by=2.0)
            except DeviceError as error:
                told = str(error)
            assert told, f"static graphs took {other.dtype}{list(other.shape)} after float32[4, 3]"
            assert "[4, 3]" in told, "the refusal must name the shapes that are taken"
            assert len(calls) == before, "the function ran before its shapes were refused"

    def broken(x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("planted: does not compile")

    try:
        backend.compile(broken)(x)
    except (NotImplementedError, DeviceError):
        return
    raise AssertionError("a function that does not compile ran nevertheless")


def chance_is_drawn_on_the_host(open_backend: Open) -> None:
    """Clause 8."""
    backend = open_backend(None)
    wanted = torch.rand(16, generator=torch.Generator().manual_seed(7))
    found = torch.rand(16, generator=backend.generator(7))
    assert torch.equal(found, wanted), "the same seed drew other numbers"
    assert torch.equal(backend.to_host(backend.to_device(found)), wanted), "draws changed on their way"


def host_buffers_come_back_when_they_are_free(open_backend: Open) -> None:
    """Clause 9."""
    backend = open_backend(None)
    buffer = backend.host_buffer((64, 32), torch.float32)
    assert buffer.device.type == "cpu", "a host buffer must be on the host"
    assert (tuple(buffer.shape), buffer.dtype) == ((64, 32), torch.float32), "the buffer has another shape or format"
    assert buffer.is_contiguous(), "a host buffer must be contiguous"
    held = []
    for value in range(4):
        buffer.fill_(value)
        held.append(backend.to_device(buffer).clone())
        backend.recycle(buffer)
        buffer = backend.host_buffer((64, 32), torch.float32)
        other = backend.host_buffer((64, 32), torch.float32)
        assert other.data_ptr() != buffer.data_ptr(), "one buffer was given out twice"
        backend.recycle(other)
    for value, x in enumerate(held):
        back = backend.to_host(x, into=buffer)
        assert torch.equal(back, torch.full((64, 32), float(value))), (
            "a buffer was used again before its copy had ended"
        )


def a_group_of_one_reduces_to_itself(open_backend: Open) -> None:
    """Clause 10."""
    import torch.distributed as dist

    backend = open_backend(None)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    group = backend.native_group([0], rank=0, address=f"127.0.0.1:{port}", timeout_s=20.0)
    try:
        x = backend.to_device(torch.arange(4, dtype=torch.float32))
        dist.all_reduce(x, group=group)
        assert x.device == backend.device, "the reduced tensor left the device"
        assert torch.equal(backend.to_host(x), torch.arange(4, dtype=torch.float32)), "a group of one changed the sum"
    finally:
        dist.destroy_process_group()


def every_kernel_has_a_variant(open_backend: Open) -> None:
    """Clause 11."""
    backend = open_backend(None)
    kernels = backend.kernels
    assert set(kernels) == set(OPS), f"kernels names {sorted(kernels)}"
    for op, choice in kernels.items():
        assert choice.op == op, f"{op} answers with the choice for {choice.op}"
        assert choice == choose(op, backend.device.type), f"{op}: not the selection rule's choice"


class _Scaled(nn.Module):
    """A module with a parameter and a buffer."""

    scale: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 12).view(4, 3))
        self.register_buffer("scale", torch.tensor([0.5, 1.0, 2.0, 4.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = (x @ self.weight.T * self.scale).sum()
        return out


CLAUSES: tuple[Callable[[Open], None], ...] = (
    round_trip_keeps_the_bits,
    formats_are_refused_by_name,
    execute_is_the_same_mathematics,
    memory_is_told_and_limited,
    synchronize_waits_for_all_work,
    placed_modules_compute_on_the_device,
    compiled_functions_keep_result_and_shapes,
    chance_is_drawn_on_the_host,
    host_buffers_come_back_when_they_are_free,
    a_group_of_one_reduces_to_itself,
    every_kernel_has_a_variant,
)
