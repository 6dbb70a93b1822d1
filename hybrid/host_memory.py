"""Memory that processes of one host share, and the two things that need the machine's help: order and sleep.

`memfd_create` makes it: there is no name that a killed process could leave behind, and the kernel frees the memory with
the last process that has it mapped. Sealed, so that nobody can shorten it under another's feet.
Linux. Pure of protocols: who writes what where is its users' affair. May import only `errors`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import os
import platform
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path

from hybrid.errors import MachineError, ProtocolError

IS_X86 = platform.machine() in ("x86_64", "AMD64")
"""Whether stores are seen by others in the order in which they are made."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL if hasattr(fcntl, "F_SEAL_SEAL") else 0
_FUTEX_OF_MACHINE = {"x86_64": 202, "aarch64": 98}
_WAIT, _WAKE = 0, 1
_EVERYBODY = 1 << 30
_LOCK = threading.Lock()


def create_memory(size_bytes: int, name: str) -> int:
    """Return the descriptor of fresh memory; `name` is only what /proc shows.

    Raises:
        MachineError: no memfd on this system, or no memory.
    """
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except (AttributeError, OSError) as error:
        raise MachineError(f"no shared memory here: {error}", fix="use a Linux kernel, or the zmq transport") from None
    try:
        os.ftruncate(fd, size_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except OSError as error:
        os.close(fd)
        raise MachineError(f"no shared memory of {size_bytes} bytes: {error.strerror}") from None
    return fd


def check_memory(fd: int, size_bytes: int) -> None:
    """Go on only if a peer's memory is one that `create_memory` made.

    Raises:
        ProtocolError: of another size, or one that can be shortened.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        seals = 0
    if seals & _SEALS != _SEALS or os.fstat(fd).st_size != size_bytes:
        raise ProtocolError("a peer's shared memory is not of this protocol", valid=f"{size_bytes} bytes, sealed")


@cache
def host_word() -> bytes:
    """Return a word for this running host, which other hosts do not have."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        text = platform.node()
    return hashlib.sha256(text.encode()).digest()[:8]


def fence() -> None:
    """Let no load after it pass a store before it.

    Taking a lock is a locked instruction, which x86-64 does not move a load across; elsewhere a real fence is called.

    Raises:
        MachineError: not x86-64, and no libatomic.
    """
    _fence()()


def publish_fence() -> None:
    """Let no store after it be seen before a store before it; x86-64 keeps that order by itself."""
    if not IS_X86:
        _fence()()


@cache
def _fence() -> Callable[[], object]:
    if IS_X86:

        def locked() -> None:
            with _LOCK:
                pass

        return locked
    try:
        thread_fence = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError):
        raise MachineError(
            f"no memory fence for {platform.machine()}", fix="install libatomic (libatomic1), or use the zmq transport"
        ) from None
    return lambda: thread_fence(5)


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


@cache
def _futex() -> Callable[..., int]:
    number = _FUTEX_OF_MACHINE.get(platform.machine())
    if number is None:
        raise MachineError("no futex known for this machine", value=platform.machine(), valid=_FUTEX_OF_MACHINE)
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    syscall.restype = ctypes.c_long

    def call(address: int, operation: int, value: int, timeout: object) -> int:
        return int(
            syscall(
                ctypes.c_long(number),
                ctypes.c_void_p(address),
                ctypes.c_int(operation),
                ctypes.c_uint32(value),
                timeout,
                None,
                ctypes.c_int(0),
            )
        )

    return call


def sleep_while(address: int, value: int, timeout_s: float) -> None:
    """Sleep while the 32-bit word at `address` in shared memory is `value`, for `timeout_s` at most.

    May return early: look at the word. Other threads of this process go on.
    """
    whole = int(timeout_s)
    pause = _Timespec(whole, int((timeout_s - whole) * 1e9))
    if _futex()(address, _WAIT, value, ctypes.byref(pause)) < 0:
        code = ctypes.get_errno()
        assert code in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT), f"futex: {os.strerror(code)}"


def wake_sleepers(address: int) -> None:
    """Wake all who sleep on the word at `address`, in whatever process."""
    _futex()(address, _WAKE, _EVERYBODY, None)
