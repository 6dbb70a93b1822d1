"""The Placement seam: where workers run. Ray's processes, or threads of this one.

A placement starts one worker for each spec and tells when one has ended before its time. It carries no tensor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid.config import JobConfig
from hybrid.hardware.catalog import Chip
from hybrid.runtime.messages import ControlAddress
from hybrid.scheduler.plan import Plan

OnGone = Callable[[int, str], None]
"""(rank, why): a worker's process has ended; called from any thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """All that one worker needs to know; plain values, so that it can be sent to another process."""

    rank: int
    job: JobConfig
    plan: Plan
    chip: Chip
    memory_bytes: int
    """What the device may hold."""
    control: ControlAddress
    tokens_dir: Path
    """Where the driver's token file is; a host without it makes its own."""
    data_digest: str
    """The token file's sha256: every rank must read the same data."""
    run_dir: Path
    resume: Path | None
    """The checkpoint to start from."""
    host: str
    """The address at which peers reach this worker; empty lets the placement choose."""
    owns_process: bool
    """True where the worker may end its process to leave a wait that will not end."""


class Placement(ABC):
    """Contract: `open` before `launch`, `close` always; close ends every worker, also after a failed launch."""

    host: str
    """The address at which workers reach the driver."""
    worker_host: str
    """The address at which a worker's peers reach it; empty lets each worker find its node's."""
    owns_process: bool
    """Whether each worker has a process of its own."""

    @abstractmethod
    def open(self) -> None:
        """Take what is needed to place workers.

        Raises:
            MachineError: the cluster does not answer.
            FleetError: the cluster lacks a device of the fleet.
        """

    @abstractmethod
    def launch(self, specs: Sequence[WorkerSpec], on_gone: OnGone) -> None:
        """Start every worker and return; `on_gone` is told of each that ends.

        Raises:
            MachineError: the devices could not be had in time.
        """

    @abstractmethod
    def close(self) -> None:
        """End every worker and give back what `open` took; idempotent."""
