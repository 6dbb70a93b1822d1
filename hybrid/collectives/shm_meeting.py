"""How the members of a group on one host come to share memory: the first makes it, the others open it by its word.

The word goes over the group's own edges, which know who is who; who may open another process's descriptor is the
kernel's affair: the same user, in the same container. May import only torch, `errors`, `host_memory` and
`transports.base`.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections.abc import Generator, Mapping

import torch
from torch import Tensor

from hybrid.errors import MachineError, PeerLost, ProtocolError
from hybrid.host_memory import check_memory, create_memory, host_word
from hybrid.transports.base import Pending, Transport

_INVITATION = struct.Struct("<8sqqQQ")
_NAME = "hybrid-group"


def meet(edges: Mapping[int, Transport], rank: int, tag: str, size_bytes: int) -> Generator[Pending, None, Tensor]:
    """Yield what is to be waited for, and return zeroed memory that all members share.

    It is unmapped when the last tensor over it is gone; the kernel frees it with the last member that has it.

    Shapes:
        returns: (size_bytes,), uint8

    Raises:
        MachineError: no memory, or a member on another host.
        PeerLost: a member has gone meanwhile.
        ProtocolError: the first member told of memory of another size.
    """
    if rank == 0:
        fd = create_memory(size_bytes, _NAME)
        try:
            memory = _map(fd, size_bytes)
            word = _INVITATION.pack(host_word(), os.getpid(), fd, os.fstat(fd).st_ino, size_bytes)
            for edge in edges.values():
                yield edge.send(tag, [word])
            for edge in edges.values():
                yield edge.recv(tag, [memoryview(bytearray(1))])
        finally:
            os.close(fd)
        return memory
    told = bytearray(_INVITATION.size)
    yield edges[0].recv(tag, [memoryview(told)])
    fd = _open_told(told, size_bytes)
    try:
        memory = _map(fd, size_bytes)
    finally:
        os.close(fd)
    yield edges[0].send(tag, [b"!"])
    return memory


def _map(fd: int, size_bytes: int) -> Tensor:
    return torch.frombuffer(mmap.mmap(fd, size_bytes), dtype=torch.uint8)


def _open_told(told: bytearray, size_bytes: int) -> int:
    """Return a descriptor of the memory that the first member told of."""
    host, pid, remote_fd, inode, told_bytes = _INVITATION.unpack(told)
    try:
        if host != host_word():
            raise OSError(errno.EXDEV, "it is on another host")
        fd = os.open(f"/proc/{pid}/fd/{remote_fd}", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        # It has ended, or closed the memory again because it failed while it waited for another member.
        raise PeerLost("the first member has given up the memory that was to be shared") from None
    except OSError as error:
        raise MachineError(
            f"cannot open the first member's shared memory: {error.strerror}",
            value=f"process {pid}",
            fix="take ranks of one host, user and container only; others take a TransportGroup",
        ) from None
    try:
        if os.fstat(fd).st_ino != inode or told_bytes != size_bytes:
            raise ProtocolError("the first member told of other memory", value=told_bytes, valid=str(size_bytes))
        check_memory(fd, size_bytes)
    except BaseException:
        os.close(fd)
        raise
    return fd
