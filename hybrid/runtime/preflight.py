"""Preflight: what can be checked of a run before a device is taken and before anything is written.

Looks, binds and connects; leaves everything as it was. No torch, no Ray.
"""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from hybrid.config import JobConfig, environment
from hybrid.errors import MachineError, PlanError
from hybrid.runtime import checkpoint
from hybrid.scheduler.plan import Plan

_CONNECT_TIMEOUT_S = 5.0
_HTTP2_SETTINGS = 4
_HTTP2_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, _HTTP2_SETTINGS, 0, 0, 0, 0, 0])
"""How every gRPC client begins; a server answers with settings of its own (RFC 9113, section 3.4)."""


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


def check_plan(plan: Plan) -> None:
    """Refuse a plan of which the worker cannot do everything.

    Raises:
        PlanError: names what it cannot do.
    """
    for what, found in (
        ("narrow gradients of float64", plan.precision == "fp64" and plan.gradient_codec != "none"),
        (
            "narrow activations of float64",
            plan.precision == "fp64" and any(edge.codec != "none" for r in plan.replicas for edge in r.edges),
        ),
    ):
        if found:
            raise PlanError(f"the worker does not run {what}", where="plan", fix="plan the job without")


def check_diloco(job: JobConfig, plan: Plan) -> None:
    """Refuse low-communication training between replicas where there are none.

    Raises:
        PlanError: the plan has one replica.
    """
    if job.diloco is not None and len(plan.replicas) == 1:
        raise PlanError(
            "diloco joins replicas, and the plan has one",
            value=1,
            valid="2 replicas or more",
            where="diloco",
            fix="raise planner.max_replicas, give a plan of several replicas, or leave the section out",
        )


def check_folder(path: Path, *, where: str) -> None:
    """Refuse a folder that is neither there nor can be made, or in which nothing can be written.

    Tries it: the only sure way on file systems with rules of their own. What is tried is removed at once.

    Args:
        where: the key or option that names the folder.

    Raises:
        MachineError: says what stands in the way.
    """
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".hybrid-", dir=there))
    except OSError as error:
        raise MachineError(
            f"nothing can be written there: {there}: {error.strerror}",
            value=str(path),
            valid="a folder that can be written, or made",
            where=where,
            fix="give another folder",
        ) from None


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


_DEVICE_FILES = {"cuda": ("nvidia[0-9]*", "dxg", "nvgpu", "nvhost-gpu"), "neuron": ("neuron[0-9]*",)}
"""What a driver makes under /dev, on servers, under WSL and on boards."""


def check_devices(backends: Iterable[str], dev: Path = Path("/dev")) -> None:
    """Refuse a backend of real devices where this machine has none of them; the worker looks closer.

    Raises:
        MachineError: no device file of that kind.
    """
    for backend in sorted(set(backends) & _DEVICE_FILES.keys()):
        patterns = _DEVICE_FILES[backend]
        if not any(next(dev.glob(pattern), None) for pattern in patterns):
            raise MachineError(
                f"this machine has no device for the backend {backend}: no {dev}/{patterns[0]}",
                value=backend,
                valid="auto, cpu, emulated",
                where="fleet.islands",
                fix="emulate the chip (`backend: emulated`), or run on a cluster that has it (--address)",
            )


def check_address(address: str) -> None:
    """Refuse an address of Ray at which nothing listens or what listens is no gRPC server; `auto` is Ray's to find.

    Ray itself would retry for minutes.

    Raises:
        MachineError: no HOST:PORT, or no head answers.
    """
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise MachineError(
            "no address of a running Ray",
            value=address,
            valid="HOST:PORT of the cluster's head, usually port 6379, or auto",
            where="--address",
            fix="give one of these, or leave --address out to start a local Ray",
        )
    fix = "give HOST:PORT of a running head, usually port 6379, or leave --address out"
    with _connected(host.strip("[]"), int(port), address, fix) as line:
        if environment("RAY_USE_TLS", "0") in ("0", "", "false"):
            line.sendall(_HTTP2_HELLO)
            answer = line.recv(9, socket.MSG_WAITALL)
            if len(answer) < 9 or answer[3] != _HTTP2_SETTINGS:
                raise OSError("what listens there is no head of a cluster")


def check_dashboard(url: str) -> None:
    """Refuse a URL of Ray's dashboard at which nothing answers.

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
            "no URL of a Ray dashboard",
            value=url,
            valid="http://HOST:PORT, usually port 8265",
            where="--address",
            fix="give the one that `ray start --head` printed",
        )
    with _connected(parts.hostname, port, url, "check the address; the cluster must run with its dashboard") as line:
        if parts.scheme == "http":
            line.sendall(f"GET /api/version HTTP/1.0\r\nHost: {parts.hostname}\r\n\r\n".encode())
            if not line.recv(5, socket.MSG_WAITALL).startswith(b"HTTP/"):
                raise OSError("what listens there speaks no HTTP")


@contextmanager
def _connected(host: str, port: int, address: str, fix: str) -> Iterator[socket.socket]:
    """Yield a connection; whatever fails on it within seconds is told as no Ray at the address."""
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_TIMEOUT_S) as line:
            yield line
    except (OSError, OverflowError, UnicodeError) as error:
        why = "silence" if isinstance(error, TimeoutError) else getattr(error, "strerror", None) or str(error)
        raise MachineError(f"no Ray answers there: {why}", value=address, where="--address", fix=fix) from None
