"""Preflight: what can be checked of a run before a device is taken and before anything is written.

Looks, binds and connects; changes nothing. No torch, no Ray.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from hybrid.config import JobConfig
from hybrid.errors import MachineError
from hybrid.runtime import checkpoint

_CONNECT_TIMEOUT_S = 5.0


def check_resume(job: JobConfig, resume: Path | None) -> checkpoint.Manifest | None:
    """Return the checkpoint to resume from: found, whole and of this job; its text is compared by `check_matches`.

    Raises:
        CheckpointError: it is not.
    """
    if resume is None:
        return None
    manifest = checkpoint.read_manifest(checkpoint.find_checkpoint(resume))
    checkpoint.check_matches(manifest, job, None)
    checkpoint.check_content(manifest)
    return manifest


def check_runs_dir(path: Path) -> None:
    """Refuse a folder in which no run folder can be made.

    Raises:
        MachineError: it, or what stands in its place, cannot be written.
    """
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        fact = f"runs_dir cannot be made: {there} is a file"
    elif not os.access(there, os.W_OK | os.X_OK):
        fact = f"runs_dir cannot be written: no permission in {there}"
    else:
        return
    raise MachineError(fact, value=str(path), valid="a folder that can be written", fix="set runs_dir to another")


def check_port(host: str, port: int) -> None:
    """Refuse a port that is taken; 0 always passes.

    Raises:
        MachineError: nobody can listen there.
    """
    if port == 0:
        return
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As ZeroMQ does: a port that an ended job has just left is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise MachineError(
                f"the coordinator cannot listen there: {error.strerror}",
                value=f"{host}:{port}",
                valid="a free port, or 0 for any",
                where="runtime.coordinator_port",
                fix="free the port, or set another",
            ) from None


def check_memory(needed_bytes: int, what: str) -> None:
    """Refuse what this machine's memory cannot hold, before the system kills the job for it.

    Raises:
        MachineError: more is needed than the machine has.
    """
    total_bytes = psutil.virtual_memory().total
    if needed_bytes > total_bytes:
        raise MachineError(
            f"{what} needs {needed_bytes / 2**30:,.1f} GiB of memory and this machine has {total_bytes / 2**30:,.1f}",
            value=needed_bytes,
            valid=f"at most {total_bytes} bytes",
            fix="shrink the model or the microbatch, or run on a cluster (--address)",
        )


def check_address(address: str) -> None:
    """Refuse an address of Ray at which nothing listens; `auto` is Ray's to find.

    Raises:
        MachineError: no HOST:PORT, or nothing answers.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise MachineError(
            "no address of a running Ray",
            value=address,
            valid="HOST:PORT of the cluster's head, usually port 6379, or auto",
            where="--address",
            fix="give one of these, or leave --address out to start a local Ray",
        )
    _connect(host.strip("[]"), int(port), address, "give HOST:PORT of a running head, or leave --address out")


def check_dashboard(url: str) -> None:
    """Refuse a URL of Ray's dashboard at which nothing listens.

    Raises:
        MachineError: no URL, or nothing answers.
    """
    parts = urlsplit(url)
    try:
        port = parts.port or 8265
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or not port:
        raise MachineError(
            "no URL of a Ray dashboard", value=url, valid="http://HOST:8265", where="--address", fix="give one"
        )
    _connect(parts.hostname, port, url, "check the address; the cluster must run with its dashboard")


def _connect(host: str, port: int, address: str, fix: str) -> None:
    try:
        socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        why = getattr(error, "strerror", None) or str(error) or "no answer"
        raise MachineError(f"no Ray answers there: {why}", value=address, where="--address", fix=fix) from None
