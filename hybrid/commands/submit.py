"""`hybrid submit`: run a job by Ray Jobs; ships the job file's folder, follows the log, returns the exit status."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrid.commands.job import read_job
from hybrid.runtime.launcher import follow_job


def run_submit(path: Path, *, address: str, overrides: Sequence[str]) -> int:
    """Submit the job and return its exit code.

    Raises:
        ConfigError: the job is wrong; nothing was sent.
        MachineError: no dashboard answers at the address.
    """
    read_job(path, overrides)
    words = ["python", "-m", "hybrid.cli", "train", path.name, "--address", "auto"]
    for override in overrides:
        words += ["--set", override]
    return follow_job(
        address,
        entrypoint=shlex.join(words),
        working_dir=path.resolve().parent,
        write=lambda text: print(text, end="", flush=True, file=sys.stdout),
    )
