"""The `cuda` backend's order of operations, on a stand-in for `torch.cuda` that notes them: it never ran on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hybrid.backends import BackendOptions, open_backend
from hybrid.backends.cuda import CudaBackend
from hybrid.errors import MachineError
from hybrid.hardware import load_catalog
from hybrid.runtime.capabilities import capabilities_of

H100 = capabilities_of(load_catalog().chip("h100"), 2**30)


class NotedCuda:
    """Streams and events that only note what is asked of them."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.done = True
        self.num_streams = 0
        self.Stream, self.Event = self._stream, self._event
        self._compute = Stream(self, "compute")
        self._current = self._compute

    def is_available(self) -> bool:
        return True

    def set_device(self, index: int) -> None:
        self.log.append(f"device {index}")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def memory_allocated(self) -> int:
        return 7

    def max_memory_allocated(self) -> int:
        return 9

    def current_stream(self) -> "Stream":
        return self._current

    @contextmanager
    def stream(self, stream: "Stream") -> Iterator[None]:
        before, self._current = self._current, stream
        yield
        self._current = before

    def _stream(self) -> "Stream":
        self.num_streams += 1
        return Stream(self, ["out", "in"][self.num_streams % 2])

    def _event(self) -> "Event":
        return Event(self)


class Stream:
    def __init__(self, cuda: NotedCuda, name: str) -> None:
        self.cuda, self.name = cuda, name

    def wait_event(self, event: "Event") -> None:
        self.cuda.log.append(f"{self.name} waits for {event.on}")


class Event:
    def __init__(self, cuda: NotedCuda) -> None:
        self.cuda, self.on = cuda, "nothing"

    def record(self, stream: Stream) -> None:
        self.on = stream.name
        self.cuda.log.append(f"event on {stream.name}")

    def query(self) -> bool:
        return self.cuda.done

    def synchronize(self) -> None:
        self.cuda.log.append(f"host waits for {self.on}")


class Noted(torch.Tensor):
    """A tensor that says it is elsewhere and notes copies with their stream."""

    cuda_: NotedCuda
    device = torch.device("meta")

    def record_stream(self, stream: Stream) -> None:
        self.cuda_.log.append(f"memory kept for {stream.name}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> NotedCuda:
    noted = NotedCuda()
    Noted.cuda_ = noted
    to, copy = torch.Tensor.to, torch.Tensor.copy_

    def noting_to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("non_blocking"):
            noted.log.append(f"copy on {noted.current_stream().name}")
            return x.clone().as_subclass(Noted)
        return to(x, *args, **kwargs)

    def noting_copy(x: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if non_blocking:
            noted.log.append(f"copy on {noted.current_stream().name}")
        return copy(x, source.as_subclass(torch.Tensor))

    monkeypatch.setattr(torch.Tensor, "to", noting_to)
    monkeypatch.setattr(torch.Tensor, "copy_", noting_copy)
    return noted


def _backend(cuda: NotedCuda, **options: bool) -> CudaBackend:
    return CudaBackend(H100, BackendOptions(**options), module=cuda, device=torch.device("meta", 0))


def test_a_copy_to_the_device_runs_beside_the_compute_stream_which_waits_for_it_by_an_event(cuda: NotedCuda) -> None:
    _backend(cuda).to_device(torch.ones(3))
    assert cuda.log == [
        "device 0",
        "copy on in",
        "event on in",
        "compute waits for in",
        "memory kept for compute",
    ]


def test_a_copy_to_the_host_waits_for_what_is_computed_and_the_host_for_the_copy_alone(cuda: NotedCuda) -> None:
    backend = _backend(cuda)
    placed = backend.to_device(torch.arange(3.0))
    cuda.log.clear()
    into = backend.host_buffer((3,), torch.float32)
    back = backend.to_host(placed, into=into)
    assert back is into
    assert torch.equal(back, torch.arange(3.0))
    assert cuda.log == [
        "event on compute",
        "out waits for compute",
        "copy on out",
        "memory kept for out",
        "event on out",
        "host waits for out",
    ]
    assert "synchronize" not in cuda.log


def test_a_pinned_buffer_is_not_given_out_while_the_device_still_reads_it(
    cuda: NotedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda x: True)
    backend = _backend(cuda)
    buffer = backend.host_buffer((3,), torch.float32)
    cuda.done = False
    backend.to_device(buffer)
    backend.recycle(buffer)
    other = backend.host_buffer((3,), torch.float32)
    assert other.data_ptr() != buffer.data_ptr()
    cuda.done = True
    assert backend.host_buffer((3,), torch.float32).data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize(("tf32", "precision"), [(False, "ieee"), (True, "tf32")])
def test_tf32_is_set_and_not_inherited(tf32: bool, precision: str, cuda: NotedCuda) -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.fp32_precision, cudnn.fp32_precision
    try:
        matmul.fp32_precision = cudnn.fp32_precision = "ieee" if tf32 else "tf32"
        _backend(cuda, tf32=tf32)
        assert (matmul.fp32_precision, cudnn.fp32_precision) == (precision, precision)
    finally:
        matmul.fp32_precision, cudnn.fp32_precision = before


def test_memory_is_what_the_job_counts_and_what_the_allocator_says(cuda: NotedCuda) -> None:
    backend = _backend(cuda)
    backend.allocate(100, "weights")
    stats = backend.memory_stats()
    assert (stats.allocated_bytes, stats.device_bytes, stats.device_peak_bytes) == (100, 7, 9)
    with pytest.raises(torch.OutOfMemoryError, match="activations"):
        backend.allocate(2**30, "activations")
    backend.release(100)
    assert backend.memory_stats().allocated_bytes == 0


def test_functions_are_compiled_on_request_alone(cuda: NotedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda fn, **options: asked.append(options) or fn)
    _backend(cuda).compile(len)
    assert asked == []
    _backend(cuda, compile=True).compile(len)
    assert asked == [{"dynamic": False}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(("name", "told"), [("cuda", "sees no CUDA device"), ("neuron", "torch-neuronx")])
def test_a_real_backend_without_its_device_is_refused_with_what_to_do(name: str, told: str) -> None:
    with pytest.raises(MachineError, match=rf"{told}.*\. \w+"):
        open_backend(name, H100)
