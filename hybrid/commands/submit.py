"""`hybrid submit`: run a job by Ray Jobs; ships the job file's folder, follows the log, returns the exit status."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid.commands.job import fleet_of, plan_of, read_job
from hybrid.config import FleetConfig
from hybrid.runtime.preflight import check_dashboard


def run_submit(path: Path, *, address: str, overrides: Sequence[str]) -> int:
    """Submit the job and return its exit code.

    Raises:
        UserError: the job or its fleet is wrong; nothing was sent.
        MachineError: no dashboard answers at the address.
    """
    job = read_job(path, overrides)
    if isinstance(job.fleet, FleetConfig):
        plan_of(*fleet_of(job, None))
    check_dashboard(address)
    from hybrid.runtime.launcher import follow_job

    words = ["python", "-m", "hybrid.cli", "train", path.name, "--address", "auto"]
    for override in overrides:
        words += ["--set", override]
    return follow_job(
        address,
        entrypoint=shlex.join(words),
        working_dir=path.resolve().parent,
        write=lambda text: print(text, end="", flush=True, file=sys.stdout),
    )
