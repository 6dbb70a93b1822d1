"""The backend kit on every backend that runs here, and the kit against planted faults."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.distributed

from hybrid.backends import Backend, open_backend
from hybrid.backends.base import Capabilities
from hybrid.backends.cpu import CpuBackend
from hybrid.backends.emulated import EmulatedBackend
from hybrid.errors import DeviceError
from hybrid.hardware import load_catalog
from hybrid.runtime.capabilities import capabilities_of
from hybrid.testing import backend_kit
from hybrid_kernels.selection import choose


def _opener(name: str, chip: str) -> Callable[[int | None], Backend]:
    def open_it(memory_bytes: int | None) -> Backend:
        return open_backend(name, capabilities_of(load_catalog().chip(chip), memory_bytes))

    return open_it


VARIANTS = {
    "cpu": _opener("cpu", "cpu"),
    "emulated trn2": _opener("emulated", "trn2"),
    "emulated h100": _opener("emulated", "h100"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("clause", backend_kit.CLAUSES, ids=lambda clause: clause.__name__)
def test_backend_keeps_the_contract(clause: Callable[..., None], variant: str) -> None:
    clause(VARIANTS[variant])


class _LosesBits(CpuBackend):
    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        return (x.float() * 1.0000001).to(x.dtype)


class _Transposes(CpuBackend):
    def to_host(self, x: torch.Tensor) -> torch.Tensor:
        return x


class _TakesEveryFormat(CpuBackend):
    def check_precision(self, precision: str) -> None:
        pass


class _SwallowsErrors(CpuBackend):
    def execute(self, fn, *, expected_s, ready_s=None):
        try:
            return fn()
        except Exception:
            return None


class _HasNoLimit(CpuBackend):
    def allocate(self, num_bytes: int, what: str) -> None:
        self._memory._allocated += num_bytes


class _CountsRefusals(CpuBackend):
    def allocate(self, num_bytes: int, what: str) -> None:
        try:
            super().allocate(num_bytes, what)
        finally:
            if self._memory._allocated + num_bytes > 1000:
                self._memory._allocated += num_bytes


class _NeverReleases(CpuBackend):
    def release(self, num_bytes: int) -> None:
        pass


class _LosesWork(CpuBackend):
    def execute(self, fn, *, expected_s, ready_s=None):
        out = fn()
        return torch.zeros_like(out) if isinstance(out, torch.Tensor) and out.shape == (64, 64) else out


class _LeavesBuffersBehind(CpuBackend):
    """Moves the parameters of a module to a device, here a format, and forgets its buffers' bits."""

    def place(self, module):
        for buffer in module.buffers():
            buffer.zero_()
        return module


class _RenamesParameters(CpuBackend):
    def place(self, module):
        return torch.nn.Sequential(module)


class _CompilesSomethingElse(CpuBackend):
    def compile(self, fn):
        return lambda *args, **kwargs: fn(*args, **kwargs) + 1


class _FallsBackInSilence(CpuBackend):
    def compile(self, fn):
        def call(*args, **kwargs):
            try:
                return fn(*args, **kwargs)
            except NotImplementedError:
                return args[0]

        return call


class _TakesEveryShape(CpuBackend):
    """Claims static graphs and holds no shape."""


class _ComparesShapesTooLate(CpuBackend):
    def compile(self, fn):
        shapes = []

        def call(x, **kwargs):
            out = fn(x, **kwargs)
            shapes.append((x.shape, x.dtype))
            if shapes[0] != shapes[-1]:
                raise DeviceError("other shapes", valid="float32[4, 3]")
            return out

        return call


class _HasDiceOfItsOwn(CpuBackend):
    def generator(self, seed):
        return torch.Generator().manual_seed(seed + 1)


class _CopiesLate(CpuBackend):
    """Gives a buffer out again while a copy from it is still to come."""

    def to_device(self, x):
        late = [x]
        return _Late(late)


class _Late:
    def __init__(self, source):
        self.source = source

    def clone(self):
        return self.source[0]

    def __getattr__(self, name):
        return getattr(self.source[0], name)


class _GivesABufferTwice(CpuBackend):
    def host_buffer(self, shape, dtype):
        if not hasattr(self, "_only"):
            self._only = torch.empty(shape, dtype=dtype)
        return self._only


class _ReducesToTwice(CpuBackend):
    def native_group(self, ranks, *, rank, address, timeout_s):
        group = super().native_group(ranks, rank=rank, address=address, timeout_s=timeout_s)
        return _Twice(group)


class _Twice(torch.distributed.ProcessGroup):
    def __init__(self, group):
        super().__init__(0, 1)
        self._group = group
        torch.distributed.distributed_c10d._world.pg_map[self] = torch.distributed.distributed_c10d._world.pg_map[group]
        torch.distributed.distributed_c10d._world.pg_group_ranks[self] = {0: 0}

    def allreduce(self, tensors, opts=None):
        tensors[0].mul_(2)
        return self._group.allreduce(tensors)


class _NamesTheWrongKernel(CpuBackend):
    @property
    def kernels(self):
        return {**super().kernels, "rope": choose("rope", "cpu", variant="ref")}


class _ForgetsAKernel(CpuBackend):
    @property
    def kernels(self):
        return {op: choice for op, choice in super().kernels.items() if op != "adamw"}


class _ForgetsDeviceMemory(CpuBackend):
    """Says that its own allocator is asked, and never asks it."""

    def memory_stats(self):
        return dataclasses.replace(super().memory_stats(), device_bytes=0, device_peak_bytes=0)


FAULTS = {
    _LosesBits: backend_kit.round_trip_keeps_the_bits,
    _Transposes: backend_kit.round_trip_keeps_the_bits,
    _TakesEveryFormat: backend_kit.formats_are_refused_by_name,
    _SwallowsErrors: backend_kit.execute_is_the_same_mathematics,
    _HasNoLimit: backend_kit.memory_is_told_and_limited,
    _CountsRefusals: backend_kit.memory_is_told_and_limited,
    _NeverReleases: backend_kit.memory_is_told_and_limited,
    _ForgetsDeviceMemory: backend_kit.memory_is_told_and_limited,
    _LosesWork: backend_kit.synchronize_waits_for_all_work,
    _LeavesBuffersBehind: backend_kit.placed_modules_compute_on_the_device,
    _RenamesParameters: backend_kit.placed_modules_compute_on_the_device,
    _CompilesSomethingElse: backend_kit.compiled_functions_keep_result_and_shapes,
    _FallsBackInSilence: backend_kit.compiled_functions_keep_result_and_shapes,
    _TakesEveryShape: backend_kit.compiled_functions_keep_result_and_shapes,
    _ComparesShapesTooLate: backend_kit.compiled_functions_keep_result_and_shapes,
    _HasDiceOfItsOwn: backend_kit.chance_is_drawn_on_the_host,
    _CopiesLate: backend_kit.host_buffers_come_back_when_they_are_free,
    _GivesABufferTwice: backend_kit.host_buffers_come_back_when_they_are_free,
    _ReducesToTwice: backend_kit.a_group_of_one_reduces_to_itself,
    _NamesTheWrongKernel: backend_kit.every_kernel_has_a_variant,
    _ForgetsAKernel: backend_kit.every_kernel_has_a_variant,
}
STATIC_GRAPHS = {_TakesEveryShape, _ComparesShapesTooLate}


@pytest.mark.parametrize("faulty", FAULTS, ids=lambda cls: cls.__name__.strip("_"))
def test_the_kit_refuses_a_planted_fault(faulty: type[CpuBackend]) -> None:
    capabilities = Capabilities(
        chip="planted",
        formats=frozenset({"fp32", "fp64"}),
        fp8_max=None,
        memory_bytes=None,
        flops_of_format={},
        execution="graph" if faulty in STATIC_GRAPHS else "eager",
    )

    def open_it(memory_bytes: int | None) -> Backend:
        backend = faulty(capabilities)
        backend._memory._limit = memory_bytes
        return backend

    with pytest.raises(AssertionError):
        FAULTS[faulty](open_it)


class _FakeClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


def _emulated(clock: _FakeClock, scale: float = 1.0) -> EmulatedBackend:
    capabilities = capabilities_of(load_catalog().chip("trn2"), None)
    return EmulatedBackend(capabilities, time_scale=scale, clock=clock)


def test_an_emulated_action_takes_the_cost_tables_time_times_the_scale() -> None:
    clock = _FakeClock()
    backend = _emulated(clock, scale=10.0)
    backend.execute(lambda: None, expected_s=0.5, ready_s=100.0)
    assert clock.now_s == pytest.approx(105.0)


def test_host_time_between_two_emulated_actions_is_hidden_as_a_devices_queue_hides_it() -> None:
    clock = _FakeClock()
    backend = _emulated(clock)
    backend.execute(lambda: None, expected_s=1.0, ready_s=100.0)
    clock.now_s += 0.0005
    backend.execute(lambda: None, expected_s=1.0)
    assert clock.now_s == pytest.approx(102.0)


def test_an_idle_emulated_device_starts_when_its_input_lands() -> None:
    clock = _FakeClock()
    backend = _emulated(clock)
    backend.execute(lambda: None, expected_s=1.0, ready_s=100.0)
    clock.now_s = 150.0
    backend.execute(lambda: None, expected_s=1.0, ready_s=149.0)
    assert clock.now_s == pytest.approx(150.0), "the input landed at 149 and the action took 1"


def test_an_emulated_device_that_idled_without_input_does_not_start_in_the_past() -> None:
    clock = _FakeClock()
    backend = _emulated(clock)
    backend.execute(lambda: None, expected_s=1.0, ready_s=100.0)
    clock.now_s = 150.0
    backend.execute(lambda: None, expected_s=1.0)
    assert clock.now_s == pytest.approx(151.0, abs=0.01)


def test_missing_the_pace_is_counted_and_not_hidden() -> None:
    clock = _FakeClock()
    backend = _emulated(clock)
    backend.execute(lambda: clock.sleep(3.0), expected_s=1.0, ready_s=100.0)
    assert backend.overrun_s == pytest.approx(2.0)
    backend.execute(lambda: None, expected_s=1.0)
    assert clock.now_s == pytest.approx(104.0)


def test_an_emulated_trainium2_refuses_fp64_as_the_chip_does() -> None:
    with pytest.raises(Exception, match=r"trn2.*fp64"):
        _emulated(_FakeClock()).check_precision("fp64")
