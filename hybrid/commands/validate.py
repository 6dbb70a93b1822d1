"""`hybrid validate`: what a person with a real device runs, and the one file that they send back."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

from hybrid import __version__
from hybrid.config import environment
from hybrid.errors import ConfigError, MachineError
from hybrid.hardware import load_catalog
from hybrid.hardware.catalog import Chip
from hybrid.hardware.fleet import real_backend
from hybrid.hardware.neuron_environment import NeuronProcess, neuron_environment
from hybrid.runtime.device_environment import apply_before_torch

DEVICES = ("cpu", "cuda", "neuron")
_DEFAULT_CHIP: Mapping[str, str] = {"cpu": "cpu", "cuda": "h100", "neuron": "trn2"}
_VARIABLES = (
    *("NEURON_RT_VISIBLE_CORES", "NEURON_LOGICAL_NC_CONFIG", "NEURON_CC_FLAGS"),
    *("NEURON_RT_STOCHASTIC_ROUNDING_EN", "NEURON_RT_STOCHASTIC_ROUNDING_SEED", "TORCH_NEURONX_NEFF_CACHE_DIR"),
    *(
        "TORCH_DEVICE_BACKEND_AUTOLOAD",
        "CUDA_VISIBLE_DEVICES",
        "NVIDIA_TF32_OVERRIDE",
        "FI_PROVIDER",
        "OMP_NUM_THREADS",
    ),
)
_PACKAGES = ("torch", "torch-neuronx", "neuronx-cc", "nki", "triton", "ray", "numpy")


def run_validate(device: str, *, chip: str | None, to: Path | None, fake: bool, quick: bool, as_json: bool) -> int:
    """Run every check on the device; return 0 where all passed, 1 where one did not.

    Args:
        device: one of DEVICES.
        chip: the catalog's name of it; default: h100 for `cuda`, trn2 for `neuron`.
        to: where the report is written (JSON).
        fake: take the fake `neuron` device; the report says so.
        quick: fewer formats and smaller timings.

    Raises:
        ConfigError: no such device, or a chip that it does not drive.
        MachineError: the device is not on this machine; nothing is written.
    """
    row = _chip_of(device, chip, fake)
    if device == "neuron" and not fake and environment("NEURON_RT_VISIBLE_CORES") is None:
        lnc = max(1, (row.cores or 1) // row.ray_units_per_chip)
        apply_before_torch(neuron_environment(NeuronProcess(cores=(0,), physical_cores_a_logical=lnc)))
    if fake:
        from hybrid.testing import fake_neuron

        fake_neuron.install()
    from hybrid.backends import open_backend
    from hybrid.runtime.capabilities import capabilities_of
    from hybrid.testing.validation import measure_timings, run_checks

    backend = open_backend(device, capabilities_of(row, None))  # refused here, if the device is not there
    console = Console(stderr=as_json)
    checks = []
    for check in run_checks(device, row, quick=quick):
        console.print(f"{check.status}  {check.group}: {check.name}  {check.detail}", markup=False, highlight=False)
        checks.append(check)
    report: dict[str, Any] = {
        "report": "hybrid validate",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": device,
        "chip": row.name,
        "real": not fake,
        "ok": all(check.status == "PASS" for check in checks),
        "environment": _environment_facts(backend.device, fake),
        "kernels": {op: asdict(choice) for op, choice in backend.kernels.items()},
        "checks": [asdict(check) for check in checks],
        "timings": measure_timings(backend, quick=quick),
        "memory": asdict(backend.memory_stats()),
    }
    _hand_over(report, to, as_json, console)
    return 0 if report["ok"] else 1


def _chip_of(device: str, chip: str | None, fake: bool) -> Chip:
    if device not in DEVICES:
        raise ConfigError("no such device", value=device, valid=DEVICES, where="--device", fix="name one of these")
    if fake and device != "neuron":
        raise ConfigError("only the neuron device has a fake", value=device, where="--fake", fix="add --device neuron")
    catalog = load_catalog()
    row = catalog.chip(chip or _DEFAULT_CHIP[device])
    if real_backend(row) != device:
        raise ConfigError(
            f"device {device} does not drive the chip {row.name}",
            value=row.name,
            valid=[name for name, other in catalog.chips.items() if real_backend(other) == device],
            where="--chip",
            fix="name one of these",
        )
    return row


def _environment_facts(device: Any, fake: bool) -> dict[str, Any]:
    import torch

    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    elif device.type == "neuron":
        name = "fake neuron device" if fake else "NeuronCore"
    return {
        "hybrid": __version__,
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "device_name": name,
        "packages": versions,
        "variables": {key: value for key in _VARIABLES if (value := environment(key)) is not None},
    }


def _hand_over(report: dict[str, Any], to: Path | None, as_json: bool, console: Console) -> None:
    text = json.dumps(report, indent=1)
    if as_json:
        print(text)
    if to is not None:
        try:
            to.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise MachineError(
                f"the report cannot be written: {error.strerror}",
                value=str(to),
                fix="give --to a file in a folder that is there",
            ) from None
    failed = [check for check in report["checks"] if check["status"] != "PASS"]
    told = f"{len(report['checks'])} checks, {len(failed)} failed" + (f"; report in {to}" if to is not None else "")
    console.print(told, markup=False, highlight=False)
