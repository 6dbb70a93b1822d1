"""RankProcesses: the ranks of a torch.distributed world as processes of this host, to which functions are sent.

One set of processes serves many worlds, one after another: importing torch takes seconds. For tests. May import only
the standard library and `errors`; torch in the children.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, final

from hybrid.errors import CommTimeout, PeerLost, WorkerFailed

_END_S = 5.0


@final
class RankProcesses:
    """`size` processes; `run` calls a function in each of them.

    Example:
        >>> with RankProcesses(2) as ranks:                                      # doctest: +SKIP
        ...     results = ranks.run(check_all_reduce, "hybrid", timeout_s=60.0)  # doctest: +SKIP
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="hybrid-ranks-")
        self._num_runs = 0
        # A fork would carry the parent's threads' locks.
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, size), name=f"rank-{rank}", daemon=True)
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)

    def __enter__(self) -> RankProcesses:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def new_store(self) -> str:
        """Return the `init_method` of a world that no other world has had."""
        self._num_runs += 1
        return f"file://{Path(self._folder.name) / f'store-{self._num_runs}'}"

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float) -> list[Any]:
        """Return what `function(rank, size, *arguments)` returned in each process, by rank.

        Raises:
            WorkerFailed: it raised in one; its traceback is the text.
            PeerLost: a process has ended.
            CommTimeout: not all returned in time; close these processes.
        """
        self.start(function, *arguments)
        deadline_s = time.monotonic() + timeout_s
        results = [self.result(rank, deadline_s - time.monotonic()) for rank in range(self.size)]
        failures = [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(results) if not ok]
        if failures:
            raise WorkerFailed("\n".join(failures))
        return [value for _, value in results]

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Call `function` in every process that lives, and do not wait; one `result` for each rank must follow."""
        for end, process in zip(self._ends, self._processes, strict=True):
            if process.is_alive():
                end.send((function, arguments))

    def result(self, rank: int, timeout_s: float) -> tuple[bool, Any]:
        """Return whether the function returned in one process, and its value or else its traceback."""
        try:
            if not self._ends[rank].poll(max(timeout_s, 0.0)):
                raise CommTimeout(f"rank {rank} did not end within {timeout_s:.0f} s")
            answer: tuple[bool, Any] = self._ends[rank].recv()
        except (EOFError, ConnectionResetError):
            raise PeerLost(f"the process of rank {rank} has ended") from None
        return answer

    def close(self) -> None:
        """End the processes and remove the stores."""
        for end in self._ends:
            end.close()
        deadline_s = time.monotonic() + _END_S
        for process in self._processes:
            process.join(max(deadline_s - time.monotonic(), 0.0))
            if process.is_alive():
                process.kill()
                process.join(_END_S)
        self._folder.cleanup()


def _serve(end: Connection, rank: int, size: int) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, arguments = end.recv()
        except (EOFError, OSError):
            return
        try:
            end.send((True, function(rank, size, *arguments)))
        except Exception:
            end.send((False, traceback.format_exc()))
