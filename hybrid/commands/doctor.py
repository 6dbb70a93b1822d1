"""`hybrid doctor`: what works on this machine, each thing really tried: PASS, or why not."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata

from rich.console import Console
from rich.table import Table

from hybrid.errors import HybridError, MachineError


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was tried."""

    name: str
    status: str
    """`PASS`, `FAIL` or `ABSENT`: absent hardware is no fault of the installation."""
    detail: str
    seconds: float


def run_doctor(*, as_json: bool) -> int:
    """Try everything; return 0 unless something that should work does not."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("python", _python),
        ("torch", _torch),
        ("ray", _ray),
        ("backend cpu", lambda: _backend("cpu", "cpu")),
        ("backend emulated trn2", lambda: _backend("emulated", "trn2")),
        ("backend emulated h100", lambda: _backend("emulated", "h100")),
        ("transport inproc", lambda: _transport("inproc")),
        ("transport shm", lambda: _transport("shm")),
        ("transport zmq-ipc", lambda: _transport("zmq-ipc")),
        ("transport zmq-tcp", lambda: _transport("zmq-tcp")),
        ("real CUDA device", _cuda),
        ("real Trainium device", _neuron),
        ("Trainium's environment", _neuron_environment),
    ]
    findings = [_try(name, check) for name, check in checks]
    failed = [finding for finding in findings if finding.status == "FAIL"]
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}))
        return 1 if failed else 0
    table = Table(title="hybrid doctor")
    for column in ("what", "status", "detail"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        table.add_row(finding.name, finding.status, finding.detail)
    console = Console()
    console.print(table)
    console.print(
        "Emulated chips are the CPU's mathematics at a chip's pace, memory and formats. "
        "The cuda and neuron backends have run on stand-ins only, on no GPU and no Trainium yet: docs/hardware.md.",
        soft_wrap=True,
    )
    return 1 if failed else 0


class _Absent(Exception):
    """The hardware or package is not here."""


def _try(name: str, check: Callable[[], str]) -> Finding:
    started_s = time.monotonic()
    try:
        status, detail = "PASS", check()
    except _Absent as absent:
        status, detail = "ABSENT", str(absent)
    except (HybridError, Exception) as error:
        status, detail = "FAIL", f"{type(error).__name__}: {error}"
    return Finding(name=name, status=status, detail=detail, seconds=round(time.monotonic() - started_s, 3))


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}, {sys.executable}"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _ray() -> str:
    return f"{metadata.version('ray')} (a cluster is started or joined by `hybrid train`)"


def _backend(name: str, chip: str) -> str:
    import torch

    from hybrid.backends import open_backend
    from hybrid.hardware import load_catalog
    from hybrid.runtime.capabilities import capabilities_of

    backend = open_backend(name, capabilities_of(load_catalog().chip(chip), None))
    x = torch.arange(1, 1001, dtype=torch.float32)
    total = backend.execute(lambda: backend.to_device(x).sum(), expected_s=0.0)
    backend.synchronize()
    value = backend.to_host(total).item()
    if value != 500_500.0:
        raise ArithmeticError(f"the sum of 1 to 1000 came out as {value}")
    formats = ", ".join(sorted(backend.capabilities.formats))
    return f"summed 1 to 1000 on {backend.device}; formats {formats}"


def _transport(medium: str) -> str:
    from hybrid.testing.transport_probe import measure_round_trip

    return f"loopback round trip of 4 KiB in {measure_round_trip(medium) * 1e6:.0f} µs"


def _cuda() -> str:
    import torch

    if not torch.cuda.is_available():
        raise _Absent("no CUDA device; emulate one: `device: h100`")
    return f"{torch.cuda.get_device_name()}: {_backend('cuda', 'h100')}; try `hybrid validate --device cuda`"


def _neuron() -> str:
    import torch

    from hybrid.backends.neuron_packages import found_packages, why_not_loaded

    packages = found_packages()
    if not hasattr(torch, "neuron"):
        fact, fix = why_not_loaded(packages)
        if packages:  # something of the vendor's name is here and does not work
            raise MachineError(fact, fix=fix)
        raise _Absent("torch-neuronx is not installed; emulate a chip: `device: trn2`")
    versions = ", ".join(f"{package.name} {package.version}" for package in packages)
    return f"{versions}: {_backend('neuron', 'trn2')}; try `hybrid validate --device neuron`"


def _neuron_environment() -> str:
    from hybrid.hardware.neuron_environment import NeuronProcess, neuron_environment

    found = neuron_environment(NeuronProcess(cores=(0,), physical_cores_a_logical=2))
    return "set for each process before torch is imported: " + ", ".join(f"{key}={found[key]}" for key in found)
