"""ProcessPlacement: every worker a process of its own on this host, without Ray. For tests and `hybrid validate`.

Where an island's backend is `neuron`, its workers' processes may install the fake device first. May import all.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import final

from hybrid.config import set_environment
from hybrid.runtime.placement import OnGone, Placement, WorkerSpec

_END_S = 10.0


@final
class ProcessPlacement(Placement):
    """Workers as processes that are started afresh.

    Args:
        fake_neuron: install the fake device where a rank's backend is `neuron`.
    """

    host = "127.0.0.1"
    worker_host = "127.0.0.1"
    owns_process = True

    def __init__(self, *, fake_neuron: bool) -> None:
        self._fake_neuron = fake_neuron
        self._processes: list[BaseProcess] = []
        self._closing = threading.Event()

    def open(self) -> None:
        """Take nothing: the host is here."""

    def launch(self, specs: Sequence[WorkerSpec], on_gone: OnGone) -> None:
        # A fork would carry this process's threads' locks, and a device can be registered once a process only.
        context = multiprocessing.get_context("spawn")
        for spec in specs:
            fake = self._fake_neuron and spec.plan.stages_of_rank(spec.rank)[0].backend == "neuron"
            process = context.Process(target=_run, args=(spec, fake), name=f"rank-{spec.rank}", daemon=True)
            process.start()
            self._processes.append(process)
            watcher = threading.Thread(target=self._watch, args=(spec.rank, process, on_gone), daemon=True)
            watcher.start()

    def close(self) -> None:
        self._closing.set()
        for process in self._processes:
            process.join(timeout=_END_S)
            if process.is_alive():
                process.kill()
                process.join(timeout=_END_S)

    def _watch(self, rank: int, process: BaseProcess, on_gone: OnGone) -> None:
        process.join()
        if not self._closing.is_set():
            on_gone(rank, f"its process ended with code {process.exitcode}")


def _run(spec: WorkerSpec, fake: bool) -> None:
    set_environment({"OMP_NUM_THREADS": str(spec.job.runtime.threads_per_rank)})
    if fake:
        from hybrid.testing import fake_neuron

        fake_neuron.install()
    from hybrid.runtime.worker import run_worker

    run_worker(spec)
