"""Two islands on one machine: network namespaces joined by veth pairs, each shaped to a rate by `tc … tbf`.

The nearest thing to two hosts with a slow link between them: what crosses really passes the kernel's network stack at
that rate, each way. Needs root and iproute2; `why_not` says what is missing. Namespaces are named by the process that
owns them: `open_islands` removes those whose owner has ended without doing so.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hybrid.errors import MachineError

_CLONE_NEWNET = 0x40000000
_PREFIX = "hybrid-"
_COMMAND_TIMEOUT_S = 10.0
_QUEUE_MS = 50
"""How long a packet may wait for its turn before it is dropped: long enough that TCP sees loss rarely."""
FRAME_SHARE = 1448 / 1514
"""What is left of a shaped link for the payload of a TCP stream: `tbf` counts Ethernet frames, of 1,500 bytes and 14
more; 52 of each are headers (IPv4 20, TCP 20, its timestamps 12)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Islands:
    """Two namespaces, and the links between them.

    Shapes:
        addresses: two islands, an IPv4 address for each link.
    """

    namespaces: tuple[str, str]
    addresses: tuple[tuple[str, ...], tuple[str, ...]]
    bits_per_s: float
    """Of each link, each way, as the shaper counts them."""

    @property
    def payload_bytes_per_s(self) -> float:
        """What a TCP stream can carry over one link, each way."""
        return self.bits_per_s / 8 * FRAME_SHARE


def why_not() -> str | None:
    """Return why this machine cannot make islands, or None where it can."""
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"{_PREFIX}{os.getpid()}-try"
    try:
        _run("ip", "netns", "add", name)
        try:
            _run("ip", "-n", name, "link", "add", "try0", "type", "veth", "peer", "name", "try1")
            _run("tc", "-n", name, *_shaper("try0", 1e9))
        finally:
            _run("ip", "netns", "del", name)
    except MachineError as error:
        return error.fact
    return None


@contextmanager
def open_islands(*, num_links: int = 1, bits_per_s: float = 1e9) -> Iterator[Islands]:
    """Make two namespaces with `num_links` shaped links between them; remove them at the end.

    Link i joins 10.201.i.1 in the first to 10.201.i.2 in the second: the addresses are the namespaces' own and meet no
    network of the machine. Whoever communicates through them calls `enter` first, in a process of its own.

    Raises:
        MachineError: the machine refuses; `why_not` says it beforehand.
    """
    remove_leftovers()
    names = (f"{_PREFIX}{os.getpid()}-0", f"{_PREFIX}{os.getpid()}-1")
    try:
        for name in names:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        for link in range(num_links):
            _join(names, link, bits_per_s)
        addresses = tuple(tuple(f"10.201.{link}.{side}" for link in range(num_links)) for side in (1, 2))
        yield Islands(namespaces=names, addresses=(addresses[0], addresses[1]), bits_per_s=bits_per_s)
    finally:
        for name in names:
            if name in _namespaces():
                _run("ip", "netns", "del", name)


def enter(namespace: str) -> None:
    """Move this process's calling thread, and what it starts from now on, into a namespace; there is no way back.

    Raises:
        MachineError: no such namespace, or not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    try:
        fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    except OSError as error:
        raise MachineError(f"no network namespace {namespace}: {error.strerror}", valid=_namespaces()) from None
    try:
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            raise MachineError(f"namespace {namespace} cannot be entered: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)


def remove_leftovers() -> tuple[str, ...]:
    """Remove the namespaces of owners that have ended; return their names."""
    gone = []
    for name in _namespaces():
        owner = re.fullmatch(rf"{_PREFIX}(\d+)-\w+", name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            _run("ip", "netns", "del", name)
            gone.append(name)
    return tuple(gone)


def _join(names: tuple[str, str], link: int, bits_per_s: float) -> None:
    device = f"link{link}"
    _run("ip", "-n", names[0], "link", "add", device, "type", "veth", "peer", "name", device, "netns", names[1])
    for side, name in enumerate(names):
        _run("ip", "-n", name, "addr", "add", f"10.201.{link}.{side + 1}/24", "dev", device)
        _run("ip", "-n", name, "link", "set", device, "up")
        _run("tc", "-n", name, *_shaper(device, bits_per_s))


def _shaper(device: str, bits_per_s: float) -> list[str]:
    # The bucket holds what may leave at once: a timer tick's worth, and never less than one offloaded segment.
    burst_bytes = max(131072, round(bits_per_s / 8 / 1000))
    words = f"qdisc add dev {device} root tbf rate {round(bits_per_s)}bit burst {burst_bytes} latency {_QUEUE_MS}ms"
    return words.split()


def _namespaces() -> tuple[str, ...]:
    folder = Path("/run/netns")
    return tuple(sorted(path.name for path in folder.iterdir())) if folder.is_dir() else ()


def _run(*words: str) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_COMMAND_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MachineError(f"`{' '.join(words)}` did not run: {error}") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise MachineError(f"`{' '.join(words)}` is refused: {said[-1]}")
