"""The worker: one device rank of a job, from its hello to its last step.

Runs in the main thread of an actor's process, or in a thread of the driver. Builds its stage, opens its edges,
walks its actions step after step, and tells the coordinator. It decides nothing about the plan.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
import traceback
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from hybrid.backends import BackendOptions, open_backend
from hybrid.backends.ahead import compile_ahead
from hybrid.backends.emulated import EmulatedBackend
from hybrid.backends.number_emulation import emulate_matmuls
from hybrid.config import JobConfig
from hybrid.errors import CommError, DataError, HybridError, PeerLost, TrainingDiverged
from hybrid.models.sampler import batch_at, held_out_batch
from hybrid.models.stage import (
    Stage,
    boundary_dtype,
    boundary_shape,
    build_stage,
    named_state,
    parameter_dtype,
)
from hybrid.models.tokens import TokenData, open_tokens, prepare_data
from hybrid.runtime import checkpoint
from hybrid.runtime.capabilities import capabilities_of
from hybrid.runtime.compute import StageCompute
from hybrid.runtime.control import ControlLine
from hybrid.runtime.emulated_link import EmulatedLink
from hybrid.runtime.exchange import add_tied_gradients, share_squares
from hybrid.runtime.interpreter import Batch, Interpreter, StepRecord, host_bytes
from hybrid.runtime.messages import (
    CheckpointPart,
    Compiled,
    EvalReport,
    Fault,
    Finished,
    Hello,
    Ready,
    Shutdown,
    Start,
    StepReport,
    Welcome,
)
from hybrid.runtime.optimizer import AdamW, global_norm, learning_rate
from hybrid.runtime.placement import WorkerSpec
from hybrid.runtime.stage_numerics import declared_numerics
from hybrid.runtime.stage_state import StageState, is_due, squares_of_layers
from hybrid.runtime.warmup import first_calls_of, warm_up
from hybrid.scheduler.lowering import lower_communication
from hybrid.transports import open_node
from hybrid.transports.base import Transport, TransportNode

_ABORT_GRACE_S = 3.0


def run_worker(spec: WorkerSpec) -> None:
    """Run one rank to the end of its job; every failure is told to the coordinator and ends quietly here."""
    node: TransportNode | None = None
    closing = threading.Lock()

    def close_node() -> None:
        with closing:
            if node is not None:
                node.close()

    def on_abort(reason: str) -> None:
        # Ends every wait of the compute thread with PeerLost.
        close_node()
        if spec.owns_process:
            # The compute thread may sit in a wait that nobody will end; the process may not outlive its job.
            timer = threading.Timer(_ABORT_GRACE_S, os._exit, args=(70,))
            timer.daemon = True
            timer.start()

    runtime = spec.job.runtime
    control = ControlLine(
        spec.control,
        spec.rank,
        heartbeat_s=runtime.heartbeat_s,
        silence_s=max(10.0, 10 * runtime.heartbeat_s),
        on_abort=on_abort,
    )
    try:
        node = _open_node(spec)
        host = socket.gethostname()
        control.tell(Hello(rank=spec.rank, token=spec.control.token, pid=os.getpid(), host=host, address=node.address))
        Worker(spec, control, node).run()
    except Exception as error:
        if node is None:  # the coordinator listens to no one who has not said hello
            control.tell(Hello(rank=spec.rank, token=spec.control.token, pid=os.getpid(), host="", address=""))
        control.tell(_fault(spec.rank, error))
    finally:
        close_node()
        control.close()


class Worker:
    """One rank at work; see `run_worker` for its life."""

    def __init__(self, spec: WorkerSpec, control: ControlLine, node: TransportNode) -> None:
        self._spec, self._control, self._node = spec, control, node
        self._job, self._plan = spec.job, spec.plan.replica_of_rank(spec.rank)
        (self._stage_plan,) = spec.plan.stages_of_rank(spec.rank)
        self._timeout_s = self._job.runtime.timeout_s
        options = BackendOptions(compile=self._job.runtime.compile)
        capabilities = capabilities_of(spec.chip, spec.memory_bytes)
        self._backend = open_backend(self._stage_plan.backend, capabilities, options)
        self._edges: dict[int, Transport] = {}
        self._tokens: TokenData = _tokens_of(spec)

    def run(self) -> None:
        """Build, train, evaluate, write; ends after the coordinator's Shutdown."""
        job, spec = self._job, self._spec
        if spec.owns_process:
            torch.set_num_threads(job.runtime.threads_per_rank)
        self._backend.check_precision(job.precision)
        self._build()
        first_step = 0 if spec.resume is None else self._state.load(spec.resume)
        welcome = cast(Welcome, self._control.await_order(Welcome, timeout_s=job.runtime.placement_timeout_s))
        self._open_edges(welcome.address_of_rank)
        self._compile()
        forward_s, backward_s = warm_up(self._compute, job.batch.microbatch, job.precision)
        self._links = self._emulated_links()
        self._interpreter = self._build_interpreter()
        self._control.tell(
            Ready(
                rank=spec.rank,
                forward_s=forward_s,
                backward_s=backward_s,
                allocated_bytes=self._backend.memory_stats().allocated_bytes,
            )
        )
        start = cast(
            Start,
            self._control.await_order(Start, timeout_s=_patience_s(job)),
        )
        if isinstance(self._backend, EmulatedBackend):
            self._backend.time_scale = start.time_scale
        for link in self._links.values():
            link.time_scale = start.time_scale
        for step in range(first_step, job.steps):
            self._train_step(step)
            self._after_step(step + 1)
        stats = self._backend.memory_stats()
        self._control.tell(Finished(rank=spec.rank, peak_bytes=stats.device_peak_bytes or stats.peak_bytes))
        self._control.await_order(Shutdown, timeout_s=self._timeout_s)

    def _build(self) -> None:
        job, plan = self._job, self._stage_plan
        dtype = parameter_dtype(job.precision)
        stage = build_stage(job.model, plan.first_layer, plan.end_layer, seed=job.seed, dtype=dtype)
        state_bytes = sum(p.numel() * p.element_size() for p in stage.parameters()) * 4
        self._backend.allocate(state_bytes, "weights, gradients and optimizer state")
        self._stage: Stage = self._backend.place(stage)
        island, chip = plan.island, self._spec.chip
        numerics = declared_numerics(job, island=island, chip=chip, backend=plan.backend)
        if numerics is not None:
            emulate_matmuls(self._stage, numerics, seed=job.seed + plan.stage)
        self._compute = StageCompute(
            self._stage,
            self._backend,
            precision=job.precision,
            num_microbatches=job.batch.num_microbatches,
        )
        self._optimizer = AdamW(named_state(self._stage), job.optimizer, job.steps)
        self._state = StageState(self._stage, self._optimizer)

    def _compile(self) -> None:
        """Compile the stage for the plan's shapes before anything is timed, where the job asks for it."""
        job = self._job
        if not job.runtime.compile:
            return

        def tell(name: str, done: int, total: int, seconds: float) -> None:
            self._control.tell(Compiled(rank=self._spec.rank, name=name, done=done, total=total, seconds=seconds))

        first_calls = first_calls_of(self._compute, job.batch.microbatch, job.precision)
        compile_ahead(first_calls, timeout_s=job.runtime.compile_timeout_s, on_progress=tell)

    def _build_interpreter(self) -> Interpreter:
        job, plan = self._job, self._plan
        return Interpreter(
            lower_communication(plan.build_schedule()),
            self._spec.rank,
            {self._stage_plan.stage: self._compute},
            self._edges,
            shape=boundary_shape(job.model, job.batch.microbatch),
            dtype=boundary_dtype(job.precision),
            seconds_of=plan.seconds_of,
            timeout_s=self._timeout_s,
            link_of_rank=self._links,
        )

    def _emulated_links(self) -> dict[int, EmulatedLink]:
        """Return the links to the neighbours, where both ends are emulated chips."""
        rank, plan = self._spec.rank, self._plan
        return {
            peer: EmulatedLink(transfer_s=edge.transfer_s, busy_s=edge.transfer_s - edge.latency_s)
            for edge in plan.edges
            for own, peer in ((edge.from_stage, edge.to_stage), (edge.to_stage, edge.from_stage))
            if own == rank and plan.stages[own].backend == plan.stages[peer].backend == "emulated"
        }

    def _open_edges(self, address_of_rank: Mapping[str, str]) -> None:
        last = self._plan.num_stages - 1
        pairs = {(rank, rank + 1) for rank in range(last)}
        if self._job.model.tied_embeddings and last > 0:
            pairs.add((0, last))
        # One global order of edges: no two ranks can wait for each other in a ring.
        for low, high in sorted(pairs):
            if self._spec.rank in (low, high):
                self._check_not_aborted()
                peer = high if self._spec.rank == low else low
                self._edges[peer] = self._node.open(peer, address_of_rank[str(peer)], timeout_s=self._timeout_s)

    def _check_not_aborted(self) -> None:
        if self._control.aborted is not None:
            raise PeerLost(f"job aborted: {self._control.aborted}")

    def _train_step(self, step: int) -> None:
        self._control.step = step
        started_s = time.monotonic()
        self._check_not_aborted()
        record = self._interpreter.run(step, batch_of(self._job, self._tokens, step))
        norm, loss = self._reduce(step)
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise TrainingDiverged.at(step, loss, norm)
        self._optimizer.step(step, norm)
        self._report(step, record, norm, time.monotonic() - started_s)

    def _reduce(self, step: int) -> tuple[float, float]:
        """Return the global gradient norm and the loss, the same bits on every rank."""
        add_tied_gradients(self._stage, self._edges, step=step, timeout_s=self._timeout_s)
        loss = self._compute.take_loss()
        shared, loss = share_squares(
            squares_of_layers(self._stage),
            loss,
            rank=self._spec.rank,
            num_ranks=self._plan.num_stages,
            num_layers=self._job.model.num_layers,
            edges=self._edges,
            step=step,
            timeout_s=self._timeout_s,
        )
        self._last_loss = loss
        return global_norm(shared), loss

    def _report(self, step: int, record: StepRecord, norm: float, seconds: float) -> None:
        backend = self._backend
        self._control.tell(
            StepReport(
                rank=self._spec.rank,
                step=step,
                loss=self._last_loss if self._compute.is_last else None,
                grad_norm=norm,
                learning_rate=learning_rate(self._job.optimizer, step, self._job.steps),
                seconds=seconds,
                busy_s=record.busy_s,
                overrun_s=backend.overrun_s if isinstance(backend, EmulatedBackend) else 0.0,
            )
        )

    def _after_step(self, steps_done: int) -> None:
        job = self._job
        at_end = steps_done == job.steps
        if is_due(job.evaluate.every_steps, at_end=job.evaluate.at_end and at_end, steps_done=steps_done):
            self._evaluate(steps_done)
        if is_due(job.checkpoint.every_steps, at_end=job.checkpoint.at_end and at_end, steps_done=steps_done):
            self._write_checkpoint(steps_done)

    def _evaluate(self, steps_done: int) -> None:
        job, total = self._job, 0.0
        rank, last = self._spec.rank, self._plan.num_stages - 1
        sends = []
        for number in range(job.evaluate.num_microbatches):
            inputs, targets = (
                torch.from_numpy(array)
                for array in held_out_batch(
                    self._tokens.held_out_tokens,
                    first_sample=number * job.batch.microbatch,
                    num_samples=job.batch.microbatch,
                    sequence_length=job.model.sequence_length,
                )
            )
            tag = f"eval/{steps_done}/{number}"
            if rank == 0:
                x = inputs
            else:
                shape = boundary_shape(job.model, job.batch.microbatch)
                x = self._backend.host_buffer(shape, boundary_dtype(job.precision))
                self._edges[rank - 1].recv(tag, [host_bytes(x)]).wait(self._timeout_s)
            with self._compute.context():
                out = self._backend.to_host(self._compute.evaluate(self._backend.to_device(x), targets))
            if rank > 0:
                self._backend.recycle(x)
            if rank == last:
                total += out.item()
            else:
                sends.append((self._edges[rank + 1].send(tag, [host_bytes(out)]), out))
        for pending, _ in sends:
            pending.wait(self._timeout_s)
        if rank == last:
            self._control.tell(EvalReport(rank=rank, steps_done=steps_done, loss=total / job.evaluate.num_microbatches))

    def _write_checkpoint(self, steps_done: int) -> None:
        facts = self._state.write(checkpoint.checkpoint_folder(self._spec.run_dir, steps_done))
        files = {name: (fact.size_bytes, fact.sha256) for name, fact in facts.items()}
        self._control.tell(CheckpointPart(rank=self._spec.rank, steps_done=steps_done, files=files))


def _patience_s(job: JobConfig) -> float:
    """Return how long a rank waits for the slowest to be ready."""
    compile_s = job.runtime.compile_timeout_s if job.runtime.compile else 0.0
    return job.runtime.placement_timeout_s + job.runtime.timeout_s + compile_s


def batch_of(job: JobConfig, tokens: TokenData, step: int) -> Batch:
    """Return what gives a step's microbatches: a pure function of the seed, the step and the sample."""

    def batch(microbatch: int) -> tuple[Tensor, Tensor]:
        inputs, targets = batch_at(
            tokens.train_tokens,
            seed=job.seed,
            step=step,
            global_batch=job.batch.global_batch,
            first_sample=microbatch * job.batch.microbatch,
            num_samples=job.batch.microbatch,
            sequence_length=job.model.sequence_length,
        )
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    return batch


def _tokens_of(spec: WorkerSpec) -> TokenData:
    """Return the job's token file: the driver's where this host sees it, else one made here from the same corpus.

    Raises:
        DataError: this host's corpus gives other tokens, for example by another Python version.
    """
    shared = spec.tokens_dir.is_dir()
    tokens = open_tokens(spec.tokens_dir) if shared else prepare_data(spec.job.data, spec.job.model)
    if tokens.sha256 != spec.data_digest:
        raise DataError(
            f"host {socket.gethostname()} makes other tokens than the driver",
            value=tokens.sha256[:12],
            valid=spec.data_digest[:12],
            fix="use the same release of Python on every node, or `data.path` on a shared folder",
        )
    return tokens


def _open_node(spec: WorkerSpec) -> TransportNode:
    runtime = spec.job.runtime
    medium = "inproc" if runtime.transport == "inproc" else f"zmq-{runtime.zmq_medium}"
    return open_node(medium, spec.rank, host=spec.host, token=spec.control.token)


def _fault(rank: int, error: Exception) -> Fault:
    known = isinstance(error, HybridError)
    oom = isinstance(error, torch.OutOfMemoryError)
    return Fault(
        rank=rank,
        error="DeviceOutOfMemory" if oom else type(error).__name__,
        text=str(error)[:4000],
        traceback="".join(traceback.format_exception(error))[-20_000:],
        exit_code=error.exit_code if isinstance(error, HybridError) else 1,
        is_consequence=known and isinstance(error, CommError),
    )
