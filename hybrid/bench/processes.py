"""Team: the persistent processes of a benchmark, asked one message at a time.

Between two messages a member waits blocked on its pipe and takes no processor time. Every wait has a limit; when the
team's owner ends, in whatever way, the kernel ends the members. Imports no torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self, TypeAlias

from hybrid.errors import WorkerFailed

Handler: TypeAlias = "Callable[[Any], Any]"
"""Takes a message, returns the reply; lives in its own process."""
Maker: TypeAlias = "Callable[[], Handler]"
"""Picklable; called in the new process."""


class Team:
    """Processes by name; use it as a context manager.

    Args:
        makers: what each member runs.
        timeout_s: the longest wait for a reply.
        preload: modules that the members share; imported once.

    Raises:
        WorkerFailed: a member raised (its traceback is in the text), ended, or was silent for `timeout_s`.
    """

    def __init__(self, makers: Mapping[str, Maker], *, timeout_s: float, preload: Iterable[str] = ()) -> None:
        self.timeout_s = timeout_s
        self.leave_s = 5.0
        """What members get to leave by themselves before they are killed."""
        pipes = {name: Pipe() for name in makers}
        self._connections: dict[str, Connection[Any, Any]] = {name: ours for name, (ours, _) in pipes.items()}
        fds = [theirs.fileno() for _, theirs in pipes.values()]
        self._nursery = subprocess.Popen(
            [sys.executable, "-m", "hybrid.bench.nursery", *map(str, fds)],
            pass_fds=fds,
            stdin=subprocess.PIPE,
            # What a library prints must not mix with what the owner prints.
            stdout=2,
            start_new_session=True,
        )
        for _, theirs in pipes.values():
            theirs.close()
        assert self._nursery.stdin is not None
        self._nursery.stdin.write("\n".join([str(os.getpid()), *preload]).encode())
        self._nursery.stdin.close()
        try:
            self.ask(makers)
        except BaseException:
            self.close()
            raise

    @property
    def nursery_pid(self) -> int:
        """The process whose children the members are."""
        return self._nursery.pid

    def ask(self, messages: Mapping[str, Any]) -> dict[str, Any]:
        """Tell each named member its message, all before any reply is waited for; return the replies."""
        for name, message in messages.items():
            try:
                self._connections[name].send(message)
            except OSError:
                raise WorkerFailed(f"benchmark process {name} has ended") from None
        deadline_s = time.monotonic() + self.timeout_s
        return {name: self._reply(name, deadline_s) for name in messages}

    def ask_all(self, names: Iterable[str], message: Any) -> list[Any]:
        """Tell every named member the same; return the replies in the order of the names."""
        return list(self.ask(dict.fromkeys(names, message)).values())

    def close(self) -> None:
        """End every member; idempotent."""
        for connection in self._connections.values():
            connection.close()
        try:
            self._nursery.wait(self.leave_s)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self._nursery.pid, signal.SIGKILL)
            self._nursery.wait(self.leave_s)

    def _reply(self, name: str, deadline_s: float) -> Any:
        connection = self._connections[name]
        if not connection.poll(max(0.0, deadline_s - time.monotonic())):
            raise WorkerFailed(f"benchmark process {name} was silent for {self.timeout_s:g} s")
        try:
            status, reply = connection.recv()
        except (EOFError, OSError):
            raise WorkerFailed(f"benchmark process {name} has ended") from None
        if status == "error":
            raise WorkerFailed(f"benchmark process {name} failed:\n{reply}")
        return reply

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
