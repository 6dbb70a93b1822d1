"""What `hybrid validate` runs on a device: the kits, the kernels, the numerics, a two-stage job, timings.

Each check is tried for itself; one that fails stops no other. Reads the clock. May import all.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hybrid.backends import Backend, BackendOptions, open_backend
from hybrid.backends.base import DTYPE_OF_PRECISION
from hybrid.backends.neuron import NeuronBackend
from hybrid.config import ModelConfig, Precision, parse_job
from hybrid.hardware.catalog import Chip
from hybrid.models.stage import build_stage, compute_context, microbatch_loss, named_state, parameter_dtype
from hybrid.runtime.capabilities import capabilities_of
from hybrid.testing import backend_kit, neuron_clauses
from hybrid_kernels import kit, kit_cases
from hybrid_kernels.selection import OPS

MODEL = ModelConfig(
    num_blocks=2,
    hidden_size=64,
    num_heads=4,
    num_kv_heads=2,
    intermediate_size=96,
    vocab_size=320,
    sequence_length=32,
)
FP32_LIMIT = 1e-4
"""Relative L2 error of fp32 gradients against float64: plain fp32 has about 1e-6, TF32 about 1e-3."""
BF16_LIMITS = (5.0, 3.0)
"""Largest error and L2 error of bf16 gradients, as multiples of bf16 on the CPU (both against fp32 on the CPU)."""
JOB_LIMIT = 1e-3
"""Relative difference of a loss from the reference's, in the two-stage job's few steps."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that was tried."""

    group: str
    name: str
    status: str
    """`PASS` or `FAIL`."""
    detail: str
    seconds: float


def run_checks(device: str, chip: Chip, *, quick: bool) -> Iterator[Check]:
    """Yield every check's outcome, as it comes."""

    def open_device(memory_bytes: int | None) -> Backend:
        return open_backend(device, capabilities_of(chip, memory_bytes))

    for clause in backend_kit.CLAUSES:
        yield _tried("backend kit", clause.__name__, lambda clause=clause: clause(open_device))  # type: ignore[misc]
    if device == "neuron":
        make: Callable[..., NeuronBackend] = lambda options=None, *, compiler=None: NeuronBackend(  # noqa: E731
            capabilities_of(chip, None), options or BackendOptions(), compiler=compiler
        )
        for own in neuron_clauses.CLAUSES:
            yield _tried("neuron backend", own.__name__, lambda own=own: own(make))  # type: ignore[misc]
    backend = open_device(None)
    for op in OPS:
        yield _tried("kernels", op, lambda op=op: _kernel(backend, op, quick=quick))  # type: ignore[misc]
    yield _tried("numerics", "fp32 gradients", lambda: _fp32(backend))
    if "bf16" in backend.capabilities.formats:
        yield _tried("numerics", "bf16 gradients", lambda: _bf16(backend))
    yield _tried("job", f"two stages, {device} and cpu", lambda: _two_stages(device, chip))


def measure_timings(backend: Backend, *, quick: bool) -> dict[str, float]:
    """Return figures of the device: copies in bytes/s, products in FLOP/s, a model's step in seconds."""
    size, width = (2**20, 256) if quick else (2**26, 4096)
    host = backend.host_buffer((size // 4,), torch.float32).fill_(1.0)
    placed = backend.to_device(host)
    found = {
        "to_device_bytes_per_s": size / _seconds(backend, lambda: backend.to_device(host)),
        "to_host_bytes_per_s": size / _seconds(backend, lambda: backend.to_host(placed, into=host)),
    }
    for precision in ("fp32", "bf16"):
        if precision not in backend.capabilities.formats:
            continue
        x = backend.to_device(torch.ones(width, width, dtype=DTYPE_OF_PRECISION[precision]))
        found[f"matmul_{precision}_flops"] = 2 * width**3 / _seconds(backend, lambda x=x: x @ x)  # type: ignore[misc]
    found["model_step_s"] = _seconds(backend, lambda: _gradients(backend, "fp32"))
    return found


def _tried(group: str, name: str, fn: Callable[[], object]) -> Check:
    started_s = time.monotonic()
    try:
        status, detail = "PASS", str(fn() or "")
    except Exception as error:
        status, detail = "FAIL", f"{type(error).__name__}: {error}"[:2000]
    return Check(group=group, name=name, status=status, detail=detail, seconds=round(time.monotonic() - started_s, 3))


def _kernel(backend: Backend, op: str, *, quick: bool) -> str:
    """Run an operation's cases in the variant that the device's rule chooses."""
    choice = backend.kernels[op]
    worst, number = 0.0, 0
    dtypes = [dtype for dtype in kit.DTYPES if not quick or dtype == torch.float32]
    for case in kit_cases.CASES:
        for dtype in dtypes if case.op == op else ():
            outcome = kit.run_case(case, variant=choice.variant, device=backend.device.type, dtype=dtype)
            assert outcome.passed, f"{choice.variant}, {case.name}, {outcome.dtype}: {outcome.worst}"
            worst, number = max(worst, outcome.share), number + 1
    return f"{choice.variant} ({choice.reason}): {number} cases, worst at {worst:.0%} of its tolerance"


def _gradients(backend: Backend, precision: Precision, seed: int = 7) -> Tensor:
    """Return all gradients of a small decoder on the device, as one float64 vector on the host."""
    dtype = parameter_dtype(precision)
    stage = backend.place(build_stage(MODEL, 0, MODEL.num_layers, seed=seed, dtype=dtype))
    ids = torch.randint(0, MODEL.vocab_size, (2, MODEL.sequence_length + 1), generator=backend.generator(seed))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    with compute_context(precision, backend.device.type):
        torch.autograd.backward(microbatch_loss(stage(backend.to_device(inputs)), targets))
    return torch.cat(
        [backend.to_host(p.grad).double().flatten() for p in named_state(stage).values() if p.grad is not None]
    )


def _on_cpu(precision: Precision) -> Tensor:
    from hybrid.hardware import load_catalog

    return _gradients(open_backend("cpu", capabilities_of(load_catalog().chip("cpu"), None)), precision)


def _fp32(backend: Backend) -> str:
    wanted = _on_cpu("fp64")
    error = float((_gradients(backend, "fp32") - wanted).norm() / wanted.norm())
    assert error <= FP32_LIMIT, f"relative L2 error {error:.2g}, allowed {FP32_LIMIT:g}: is TF32 or auto-cast on?"
    return f"relative L2 error {error:.2g} against float64 on the CPU"


def _bf16(backend: Backend) -> str:
    wanted = _on_cpu("fp32")
    ours, theirs = _gradients(backend, "bf16") - wanted, _on_cpu("bf16") - wanted
    ratios = float(ours.abs().max() / theirs.abs().max()), float(ours.norm() / theirs.norm())
    text = f"error ratio to bf16 on the CPU: largest {ratios[0]:.2f} (limit 5), L2 {ratios[1]:.2f} (limit 3)"
    assert all(ratio < limit for ratio, limit in zip(ratios, BF16_LIMITS, strict=True)), text
    return text


def _two_stages(device: str, chip: Chip) -> str:
    """Train a stage on the device and one on the host; compare every loss with the one-process reference."""
    from hybrid.commands.job import fleet_of, plan_of
    from hybrid.observe.events import Event, StepEvent
    from hybrid.runtime.local import ThreadPlacement
    from hybrid.runtime.trainer import train, train_in_one_process

    with tempfile.TemporaryDirectory(prefix="hybrid-validate-") as folder:
        text = Path(folder) / "text.txt"
        text.write_text("\n".join(f"line {i} of {i * i % 97} and {i**3 % 89} apples" for i in range(4000)))
        raw: dict[str, Any] = {
            "name": "validate",
            "model": MODEL.model_dump(),
            "data": {"source": "text", "path": folder, "held_out_share": 0.1},
            "batch": {"global_batch": 4, "microbatch": 2},
            "steps": 4,
            "num_stages": 2,
            "fleet": {
                "islands": [
                    {"name": "device", "device": chip.name, "backend": device},
                    {"name": "host", "device": "cpu"},
                ]
            },
            "evaluate": {"at_end": False},
            "runtime": {"placement": "threads", "transport": "inproc"},
            "runs_dir": str(Path(folder) / "runs"),
        }
        job, fleet = fleet_of(parse_job(raw), None)
        plan = plan_of(job, fleet)
        # The planner may think little of the host; here both must take part.
        islands = [fleet.island("device"), fleet.island("host")]
        stages = tuple(
            dataclasses.replace(
                stage,
                island=island.name,
                chip=island.chip.name,
                backend=island.backend,
                memory_limit_bytes=island.memory_bytes,
            )
            for stage, island in zip(plan.stages, islands, strict=True)
        )
        plan = dataclasses.replace(plan, replicas=(dataclasses.replace(plan.replica, stages=stages),))
        events: list[Event] = []
        wanted: list[Event] = []
        placement = ThreadPlacement(threads_per_rank=1)
        train(job, fleet, plan, placement, resume=None, sink=events.append, started_s=time.monotonic())
        train_in_one_process(job, resume=None, sink=wanted.append, started_s=time.monotonic())
    losses, reference = ([e.loss for e in found if isinstance(e, StepEvent)] for found in (events, wanted))
    assert len(losses) == len(reference) == job.steps, "a step is missing"
    worst = max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))
    assert worst <= JOB_LIMIT, f"losses {losses}, the reference's {reference}"
    return f"{job.steps} steps, losses within {worst:.1g} of the reference's"


def _seconds(backend: Backend, fn: Callable[[], object], rounds: int = 3) -> float:
    """Return the least seconds of one call, the device's work included, after a warm-up."""
    fn()
    backend.synchronize()
    best = float("inf")
    for _ in range(rounds):
        started_s = time.perf_counter()
        fn()
        backend.synchronize()
        best = min(best, time.perf_counter() - started_s)
    return best
