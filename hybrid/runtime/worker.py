"""The worker: one device rank of a job, from its hello to its last step.

Runs in the main thread of an actor's process, or in a thread of the driver. Builds its stages, opens its edges,
walks its actions step after step, and tells the coordinator. It decides nothing about the plan.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Mapping
from typing import cast

import torch

from hybrid.backends import BackendOptions, open_backend
from hybrid.backends.ahead import compile_ahead
from hybrid.backends.emulated import EmulatedBackend
from hybrid.collectives.base import Group
from hybrid.config import JobConfig
from hybrid.errors import PeerLost, TrainingDiverged
from hybrid.models.stage import boundary_dtype
from hybrid.models.tokens import TokenData
from hybrid.runtime import checkpoint
from hybrid.runtime.axes import SINGLE
from hybrid.runtime.capabilities import capabilities_of
from hybrid.runtime.coded_edge import coding_of
from hybrid.runtime.control import ControlLine
from hybrid.runtime.diloco import Fragments
from hybrid.runtime.edges import degrees_of, emulated_links, open_edges
from hybrid.runtime.evaluation import evaluate
from hybrid.runtime.exchange import share_squares
from hybrid.runtime.held_stages import HeldStage, build_held_stages, parameters_of, squares_of
from hybrid.runtime.interpreter import Interpreter, StepRecord
from hybrid.runtime.last_words import fault_of
from hybrid.runtime.messages import (
    CheckpointPart,
    Compiled,
    EvalReport,
    Finished,
    Hello,
    Ready,
    Shutdown,
    Start,
    StepReport,
    Welcome,
)
from hybrid.runtime.open_axes import Door, axes_timeout_s, open_axes, open_door
from hybrid.runtime.open_diloco import build_fragments, write_met
from hybrid.runtime.open_replicas import build_replicas, load_lost, open_groups, write_shared
from hybrid.runtime.optimizer import global_norm, learning_rate
from hybrid.runtime.ownership import shared_layers
from hybrid.runtime.placement import WorkerSpec
from hybrid.runtime.replicas import Replicas
from hybrid.runtime.stage_state import is_due
from hybrid.runtime.stage_sums import add_losses, add_squares, share_from_first, sum_gradients
from hybrid.runtime.tied_copies import meet_tied
from hybrid.runtime.warmup import first_calls_of, warm_up
from hybrid.runtime.worker_data import batch_of, tokens_of
from hybrid.scheduler.lowering import lower_communication
from hybrid.transports import open_node
from hybrid.transports.arrival import ArrivalHistory, TimeoutRule
from hybrid.transports.base import TransportNode

_ABORT_GRACE_S = 3.0
_WAITS = TimeoutRule(initial_s=60.0, floor_s=30.0, cap_s=600.0)
"""The floor leaves room for what a peer does now and then, and not in every step: a checkpoint, an evaluation."""


def run_worker(spec: WorkerSpec) -> None:
    """Run one rank to the end of its job; every failure is told to the coordinator and ends quietly here."""
    node: TransportNode | None = None
    door: Door | None = None
    worker: Worker | None = None
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
        door = open_door(spec)
        control.tell(
            Hello(
                rank=spec.rank,
                token=spec.control.token,
                pid=os.getpid(),
                host=socket.gethostname(),
                address=node.address,
                native_address="" if door is None else door.address,
            )
        )
        worker = Worker(spec, control, node)
        try:
            worker.run()
        finally:
            worker.close()
    except Exception as error:
        if worker is None:  # the coordinator listens to no one who has not said hello
            control.tell(Hello(rank=spec.rank, token=spec.control.token, pid=os.getpid(), host="", address=""))
        control.tell(fault_of(spec.rank, error))
    finally:
        if door is not None:
            door.close()
        close_node()
        control.close()


class Worker:
    """One rank at work; see `run_worker` for its life."""

    def __init__(self, spec: WorkerSpec, control: ControlLine, node: TransportNode) -> None:
        self._spec, self._control, self._node = spec, control, node
        self._job, self._replica = spec.job, spec.plan.replica_of_rank(spec.rank)
        self._own, self._place = self._replica.place_of_rank(spec.rank)
        self._degrees = degrees_of(self._replica, self._own)
        self._axes = SINGLE
        """Over which ranks this one's stages are shared out."""
        self._waits = ArrivalHistory(_WAITS, fixed_s=self._job.runtime.fixed_timeout_s)
        options = BackendOptions(compile=self._job.runtime.compile)
        capabilities = capabilities_of(spec.chip, spec.memory_bytes)
        self._backend = open_backend(spec.plan.stages_of_rank(spec.rank)[0].backend, capabilities, options)
        self._tokens: TokenData = tokens_of(spec)
        self._groups: tuple[Group, ...] = ()

    def close(self) -> None:
        """Leave the groups; the node, which carries them, is the caller's."""
        for group in self._groups:
            group.close()
        self._axes.close()

    def run(self) -> None:
        """Build, train, evaluate, write; ends after the coordinator's Shutdown."""
        job, spec = self._job, self._spec
        if spec.owns_process:
            torch.set_num_threads(job.runtime.threads_per_rank)
        self._backend.check_precision(job.precision)
        address_of_rank = self._meet_peers()
        self._held = build_held_stages(spec, self._backend, self._axes)
        self._parameters = parameters_of(self._held)
        first_step = 0 if spec.resume is None else max(one.state.load(spec.resume) for one in self._held)
        self._join_replicas(address_of_rank)
        self._make_ready()
        start = cast(Start, self._control.await_order(Start, timeout_s=_patience_s(job)))
        if isinstance(self._backend, EmulatedBackend):
            self._backend.time_scale = start.time_scale
        for link in self._links.values():
            link.time_scale = start.time_scale
        for step in range(first_step, job.steps):
            self._train_step(step)
            self._after_step(step + 1)
        stats = self._backend.memory_stats()
        self._control.tell(Finished(rank=spec.rank, peak_bytes=stats.device_peak_bytes or stats.peak_bytes))
        self._control.await_order(Shutdown, timeout_s=self._waits.timeout_s)

    def _meet_peers(self) -> Mapping[str, str]:
        """Open the edges to other stages and the axes among those who hold the same; return all ranks' addresses."""
        job, replica, rank = self._job, self._replica, self._spec.rank
        welcome = cast(Welcome, self._control.await_order(Welcome, timeout_s=job.runtime.placement_timeout_s))
        self._edges = open_edges(
            replica,
            rank,
            self._node,
            welcome.address_of_rank,
            model=job.model,
            token_bytes=job.model.hidden_size * boundary_dtype(job.precision).itemsize,
            timeout_s=self._waits.timeout_s,
            before_each=self._check_not_aborted,
            coded=coding_of(replica, boundary_dtype(job.precision)),
        )
        self._axes = open_axes(
            replica,
            rank,
            self._degrees,
            node=self._node,
            backend=self._backend,
            native_address=welcome.native_address_of_rank.get(str(replica.groups[self._own][0]), ""),
            address_of_rank=welcome.address_of_rank,
            timeout_s=axes_timeout_s(job),
            before_each=self._check_not_aborted,
        )
        self._links = emulated_links(replica, self._own)
        return welcome.address_of_rank

    def _join_replicas(self, address_of_rank: Mapping[str, str]) -> None:
        """Open what joins this rank to the other replicas, where there are any."""
        spec, self._replicas = self._spec, cast(Replicas | None, None)
        self._fragments: Fragments | None = None
        shared = shared_layers(self._job, spec.plan, spec.rank)
        if shared:
            self._groups = groups = open_groups(shared, self._node, address_of_rank, timeout_s=self._waits.timeout_s)
            if spec.job.diloco is not None:
                self._fragments = build_fragments(spec, self._held, shared, groups)
                return
            self._replicas = build_replicas(spec, self._held, shared, groups)
            if spec.resume is not None:
                load_lost(self._replicas, self._held, spec.resume)

    def _make_ready(self) -> None:
        """Compile, warm up, lower the schedule, and tell what the stages cost here."""
        job, replica = self._job, self._replica
        seconds_of: dict[str, float] = {}
        for one in self._held:
            self._compile(one)
            seconds = warm_up(one.compute, replica.microbatch // self._degrees.width, job.precision)
            seconds_of |= {f"{one.plan.stage}{kind}": value for kind, value in seconds.items()}
        self._interpreter = Interpreter(
            lower_communication(replica.build_schedule()),
            self._own,
            {one.plan.stage: one.compute for one in self._held},
            self._edges.activations,
            shape=self._held[0].stage.boundary_shape(replica.microbatch // self._degrees.width),
            dtype=boundary_dtype(job.precision),
            seconds_of=replica.seconds_of,
            waits=self._waits,
            link_of_rank=self._links,
            # What several ranks of a stage hold is added up first: their buckets leave when the whole stage is done.
            on_last_backward=self._replicas.last_backward if self._replicas and self._axes is SINGLE else None,
            on_stage_done=self._on_stage_done,
        )
        allocated_bytes = self._backend.memory_stats().allocated_bytes
        self._control.tell(Ready(rank=self._spec.rank, seconds_of=seconds_of, allocated_bytes=allocated_bytes))

    def _compile(self, one: HeldStage) -> None:
        """Compile a stage for the plan's shapes before anything is timed, where the job asks for it."""
        job = self._job
        if not job.runtime.compile:
            return

        def tell(name: str, done: int, total: int, seconds: float) -> None:
            self._control.tell(Compiled(rank=self._spec.rank, name=name, done=done, total=total, seconds=seconds))

        first_calls = first_calls_of(one.compute, self._replica.microbatch, job.precision)
        compile_ahead(first_calls, timeout_s=job.runtime.compile_timeout_s, on_progress=tell)

    def _check_not_aborted(self) -> None:
        if self._control.aborted is not None:
            raise PeerLost(f"job aborted: {self._control.aborted}")

    def _train_step(self, step: int) -> None:
        self._control.step = step
        started_s = time.monotonic()
        self._check_not_aborted()
        copy, width = self._place // self._degrees.tensor_parallel, self._degrees.width
        batch = batch_of(self._job, self._replica, self._tokens, step, copy=copy, width=width)
        record = self._interpreter.run(step, batch)
        norm, loss = self._reduce(step)
        if not (math.isfinite(norm) and math.isfinite(loss)):
            raise TrainingDiverged.at(step, loss, norm)
        for one in self._held:
            one.optimizer.step(step, norm)
        if self._replicas is not None:
            self._replicas.spread()
        if self._fragments is not None:
            self._fragments.after_step(step + 1)
        self._report(step, record, loss, norm, time.monotonic() - started_s)

    def _on_stage_done(self, stage: int) -> None:
        """Add up what several ranks of the stage hold; then its gradients may leave for the other replicas."""
        sum_gradients(next(one.stage for one in self._held if one.plan.stage == stage), self._axes)
        if self._replicas is not None:
            self._replicas.stage_done(stage)

    def _reduce(self, step: int) -> tuple[float, float]:
        """Return the global gradient norm and the loss, the same bits on every rank."""
        meet_tied(
            self._job.model,
            self._replica,
            self._spec.rank,
            self._parameters,
            self._edges,
            self._axes,
            step=step,
            timeout_s=self._waits.timeout_s,
        )
        stage = self._held[0].stage
        own_loss = add_losses(self._held[-1].compute.take_loss(), stage, self._axes)
        if self._replicas is None:
            squares = squares_of(self._held, self._axes)
        else:
            own_squares, own_loss = self._replicas.reduce(own_loss)
            squares = add_squares(own_squares, stage, self._axes)
        row: list[float] | None = None
        if self._place == 0:
            shared, loss = share_squares(
                squares,
                own_loss,
                rank=self._own,
                num_ranks=len(self._replica.groups),
                num_layers=self._job.model.num_layers,
                edges=self._edges.leads,
                step=step,
                timeout_s=self._waits.timeout_s,
            )
            row = [*shared, loss]
        *shared, loss = share_from_first(row, self._job.model.num_layers + 1, stage, self._axes)
        return global_norm(shared), loss

    def _report(self, step: int, record: StepRecord, loss: float, norm: float, seconds: float) -> None:
        backend = self._backend
        self._control.tell(
            StepReport(
                rank=self._spec.rank,
                step=step,
                loss=self._share_of_loss(loss),
                grad_norm=norm,
                learning_rate=learning_rate(self._job.optimizer, step, self._job.steps),
                seconds=seconds,
                busy_s=record.busy_s,
                overrun_s=backend.overrun_s if isinstance(backend, EmulatedBackend) else 0.0,
            )
        )

    def _share_of_loss(self, loss: float) -> float | None:
        """Return what this rank adds to the step's loss in the report; None where another rank tells it."""
        if not self._held[-1].compute.is_last or self._place > 0:
            return None
        if self._fragments is not None:  # each replica knows its own only
            return loss * self._replica.num_samples / self._spec.plan.global_batch
        return loss if self._replica.replica == 0 else None

    def _after_step(self, steps_done: int) -> None:
        job = self._job
        at_end = steps_done == job.steps
        evaluates = is_due(job.evaluate.every_steps, at_end=job.evaluate.at_end and at_end, steps_done=steps_done)
        writes = is_due(job.checkpoint.every_steps, at_end=job.checkpoint.at_end and at_end, steps_done=steps_done)
        if self._fragments is not None and (evaluates or writes):
            self._fragments.meet_now()
        if evaluates:
            self._evaluate(steps_done)
        if writes:
            self._write_checkpoint(steps_done)

    def _evaluate(self, steps_done: int) -> None:
        if self._replica.replica != 0:
            return  # all replicas hold the same bits
        loss = evaluate(
            self._held,
            self._edges.activations,
            self._replica.rank_of_stage,
            rank=self._spec.rank,
            job=self._job,
            tokens=self._tokens,
            backend=self._backend,
            steps_done=steps_done,
            timeout_s=self._waits.timeout_s,
        )
        loss = add_losses(loss, self._held[-1].stage, self._axes)
        if loss is not None and self._place == 0:
            loss /= self._degrees.width
            self._control.tell(EvalReport(rank=self._spec.rank, steps_done=steps_done, loss=loss))

    def _write_checkpoint(self, steps_done: int) -> None:
        folder = checkpoint.checkpoint_folder(self._spec.run_dir, steps_done)
        if self._fragments is not None:
            facts = write_met(self._fragments, self._held, folder) if self._replica.replica == 0 else {}
        elif self._replicas is None:
            facts = {name: fact for one in self._held for name, fact in one.state.write(folder).items()}
        else:
            facts = write_shared(self._replicas, self._held, folder)
        files = {name: (fact.size_bytes, fact.sha256) for name, fact in facts.items()}
        self._control.tell(CheckpointPart(rank=self._spec.rank, steps_done=steps_done, files=files))


def _patience_s(job: JobConfig) -> float:
    """Return how long a rank waits for the slowest to be ready."""
    compile_s = job.runtime.compile_timeout_s if job.runtime.compile else 0.0
    return job.runtime.placement_timeout_s + job.runtime.setup_timeout_s + compile_s


def _open_node(spec: WorkerSpec) -> TransportNode:
    return open_node(spec.job.runtime.medium, spec.rank, host=spec.host, token=spec.control.token)
