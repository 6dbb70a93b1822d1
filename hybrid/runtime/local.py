"""ThreadPlacement: every worker a thread of this process. For tests, debugging and machines without Ray."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import final

from hybrid.runtime.placement import OnGone, Placement, WorkerSpec


@final
class ThreadPlacement(Placement):
    """Workers as threads; they end by themselves once one of them fails, since their edges then break."""

    host = "127.0.0.1"
    worker_host = "127.0.0.1"
    owns_process = False

    def __init__(self, *, threads_per_rank: int) -> None:
        self._threads: list[threading.Thread] = []
        self._threads_per_rank = threads_per_rank

    def open(self) -> None:
        import torch

        # One setting for the whole process: its threads share torch's pool size.
        torch.set_num_threads(self._threads_per_rank)

    def launch(self, specs: Sequence[WorkerSpec], on_gone: OnGone) -> None:
        from hybrid.runtime.worker import run_worker

        def run(spec: WorkerSpec) -> None:
            try:
                run_worker(spec)
            finally:
                on_gone(spec.rank, "its thread returned")

        for spec in specs:
            thread = threading.Thread(target=run, args=(spec,), name=f"rank-{spec.rank}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        for thread in self._threads:
            thread.join(timeout=10.0)
