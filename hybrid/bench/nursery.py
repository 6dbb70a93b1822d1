"""The nursery: one process that imports what is slow to import once, and forks a benchmark's processes.

Run as `python -m hybrid.bench.nursery FD FD …`: one child for each inherited connection. A child's first message is a
maker; the child calls it and answers messages with what it made. None outlives its parent. Nothing but `processes`
starts it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import traceback
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any

_PR_SET_PDEATHSIG = 1
_IDLE_LIMIT_S = 600.0
"""A child that is told nothing for this long leaves: whoever started it is stuck."""


def main(fds: list[int]) -> int:
    """Fork a child for each connection and wait until all have left; return how many failed.

    Standard input tells the parent's process id, then the modules to import first, one line each.
    """
    parent, *modules = sys.stdin.read().splitlines()
    die_with_parent(int(parent))
    for module in modules:
        import_module(module)
    gc.freeze()  # the children's collections leave what they share with us alone
    own = os.getpid()
    pids = [_fork(fd, fds, own) for fd in fds]
    for fd in fds:
        os.close(fd)
    return sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in pids)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process as soon as its parent ends, however that ends (Linux; elsewhere nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)


def _fork(fd: int, fds: list[int], parent: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        die_with_parent(parent)
        for other in fds:
            if other != fd:
                os.close(other)
        with Connection(fd) as connection:
            serve(connection)
        code = 0
    except (EOFError, ConnectionError):
        code = 0  # the other end has left: so do we
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def serve(connection: Connection[Any, Any]) -> None:
    """Make what the first message says, then answer each message with ("ok", reply) or ("error", traceback)."""
    handle = None
    while connection.poll(_IDLE_LIMIT_S):
        try:
            message = connection.recv()
            if handle is None:
                handle, reply = message(), None
            else:
                reply = handle(message)
        except (EOFError, ConnectionError):
            raise
        except Exception:
            connection.send(("error", traceback.format_exc()))
        else:
            connection.send(("ok", reply))


if __name__ == "__main__":
    raise SystemExit(main([int(word) for word in sys.argv[1:]]))
