"""The driver of a training job: checks all that can be checked, then places, coordinates and sums up.

Imports no torch: tensors live in the workers. Nothing is written before every check has passed, and whatever ends the
run, its workers, its sockets and its local Ray end with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.config import JobConfig, dump_job
from hybrid.errors import ConfigError, MachineError, TrainingDiverged, UserError
from hybrid.hardware.fleet import Fleet
from hybrid.models.corpus import open_corpus
from hybrid.models.profile import build_profile
from hybrid.models.tokens import TokenData, prepare_data, prepare_tokens
from hybrid.observe.events import Event, PhaseEvent, Sink, StepEvent
from hybrid.observe.metrics import MetricsFile, Tally, all_of
from hybrid.runtime import checkpoint
from hybrid.runtime.degrees import check_degrees
from hybrid.runtime.ledger import Commit, Ledger
from hybrid.runtime.messages import Ready
from hybrid.runtime.pace import time_scale
from hybrid.runtime.placement import Placement, WorkerSpec
from hybrid.runtime.preflight import check_diloco, check_folder, check_memory, check_plan, check_port, check_resume
from hybrid.scheduler.plan import Plan

if TYPE_CHECKING:
    from hybrid.runtime.coordinator import Coordinator

_TICK_S = 0.5
_LATE_HELLO_S = 5.0
"""How long a worker that is still starting is waited for when its job has ended already."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How a run ended."""

    run: str
    """The run folder."""
    steps: int
    final_loss: float | None
    held_out_loss: float | None
    unigram_entropy: float
    """Held-out loss of a model that knows only how frequent each token is, in nats."""
    tokens_per_s: float | None
    step_s: float | None
    """Median, measured."""
    predicted_step_s: float | None
    """The plan's, in wall seconds: times the emulation's time scale. None without a plan or without pace."""
    time_scale: float
    first_step_s: float | None
    """Seconds from the command's start to the end of the first step."""
    phases: dict[str, float]
    """Name to seconds since the start."""
    idle_share_of_rank: tuple[float, ...]
    peak_bytes_of_rank: tuple[int, ...]
    checkpoint: str | None


class Run:
    """One run's folder and sinks; made only when every check has passed.

    Args:
        started_s: when the command started, on `time.monotonic`'s clock.

    Raises:
        MachineError: the folder cannot be written; nothing of it is left.
    """

    def __init__(self, job: JobConfig, plan: Plan | None, tokens: TokenData, sink: Sink, started_s: float) -> None:
        self._started_s = started_s
        self.tally = Tally()
        self.first_step_s: float | None = None
        self.folder = _new_folder(job)
        try:
            (self.folder / "job.yaml").write_text(dump_job(job), encoding="utf-8")
            if tokens.tokenizer_path.is_file():
                shutil.copyfile(tokens.tokenizer_path, self.folder / "tokenizer.json")
            if plan is not None:
                (self.folder / "plan.yaml").write_text(plan.to_yaml(), encoding="utf-8")
            self._metrics = MetricsFile(self.folder / "metrics.jsonl")
        except OSError as error:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise _no_folder(self.folder, error) from None
        self.sink: Sink = all_of(self._note_first_step, self._metrics, self.tally, sink)

    def phase(self, name: str) -> None:
        """Tell that a phase of the start-up has ended."""
        self.sink(PhaseEvent(name=name, since_start_s=time.monotonic() - self._started_s))

    def close(self) -> None:
        """Close the files and remove what was left half-written."""
        self._metrics.close()
        checkpoint.discard_partial(self.folder)

    def refused(self, error: UserError, resume: Path | None) -> UserError:
        """Return what to tell of a run that the user's input ended; where it did no step, its folder goes."""
        if not self.tally.steps:
            shutil.rmtree(self.folder, ignore_errors=True)
        if not isinstance(error, TrainingDiverged):
            return error
        whole = checkpoint.complete_checkpoints(self.folder)
        last = whole[-1] if whole else resume
        fix = "no checkpoint was written yet: start again" if last is None else f"then go on with --resume {last}"
        return TrainingDiverged(str(error).rstrip("."), fix=fix)

    def _note_first_step(self, event: Event) -> None:
        if isinstance(event, StepEvent) and self.first_step_s is None:
            self.first_step_s = time.monotonic() - self._started_s


def _new_folder(job: JobConfig) -> Path:
    """Make a run folder of its own: RUNS_DIR/NAME-YYYYMMDD-HHMMSS."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    base = job.runs_dir / f"{job.name}-{stamp}"
    for number in range(1000):
        folder = base if number == 0 else base.with_name(f"{base.name}.{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise _no_folder(folder, error) from None
        return folder
    raise MachineError("no free run folder", value=str(base), fix="remove old runs")


def _no_folder(folder: Path, error: OSError) -> MachineError:
    return MachineError(
        f"the run folder cannot be made: {error.strerror}",
        value=str(folder),
        valid="a runs_dir that can be written, with room",
        fix="set runs_dir to another, or free space there",
    )


def train(
    job: JobConfig,
    fleet: Fleet,
    plan: Plan,
    placement: Placement,
    *,
    resume: Path | None,
    sink: Sink,
    started_s: float,
) -> Summary:
    """Train the job on the plan's devices and return how it went.

    Raises:
        UserError: something the user handed us is wrong; before the first step, nothing of the run is left.
        WorkerFailed: a worker ended before its job did; the run folder keeps the metrics so far.
    """
    check_plan(plan)
    check_degrees(job, plan)
    check_diloco(job, plan)
    check_folder(job.runs_dir, where="runs_dir")
    check_port(placement.host, job.runtime.coordinator_port)
    found = check_resume(job, resume)
    corpus = open_corpus(job.data)
    from hybrid.runtime.coordinator import Coordinator

    run: Run | None = None
    coordinator: Coordinator | None = None
    with ThreadPoolExecutor(max_workers=1) as pool:
        preparing: Future[TokenData] = pool.submit(prepare_tokens, corpus, job.model)
        try:
            if found is not None:
                # A checkpoint of another text is told before a device is taken.
                checkpoint.check_matches(found, job, preparing.result().sha256)
            placement.open()
            opened_s = time.monotonic() - started_s
            tokens = preparing.result()
            coordinator = Coordinator(host=placement.host, port=job.runtime.coordinator_port)
            run = Run(job, plan, tokens, sink, started_s)
            run.sink(PhaseEvent(name="devices taken", since_start_s=opened_s))
            run.phase("data ready")
            from_path = None if found is None else found.path
            specs = _specs(job, fleet, plan, coordinator, tokens, run.folder, from_path, placement)
            gone: asyncio.Queue[tuple[int, str]] = asyncio.Queue()
            return asyncio.run(_coordinate(job, plan, placement, coordinator, run, tokens, specs, gone, started_s))
        except UserError as error:
            raise error if run is None else run.refused(error, resume) from None
        finally:
            # The workers first: one of them may still be writing.
            placement.close()
            if coordinator is not None:
                coordinator.close()
            if run is not None:
                run.close()


async def _coordinate(
    job: JobConfig,
    plan: Plan,
    placement: Placement,
    coordinator: Coordinator,
    run: Run,
    tokens: TokenData,
    specs: list[WorkerSpec],
    gone: asyncio.Queue[tuple[int, str]],
    started_s: float,
) -> Summary:
    loop = asyncio.get_running_loop()
    scale = 0.0

    def scale_of(ready: list[Ready]) -> float:
        nonlocal scale
        scale = time_scale(
            plan,
            [message.seconds_of for message in ready],
            wanted=job.emulation.time_scale,
            pace=job.emulation.pace,
            num_cores=os.cpu_count() or 1,
        )
        return scale

    ledger = Ledger(
        num_ranks=len(specs),
        token=coordinator.address.token,
        tokens_per_step=job.batch.global_batch * job.model.sequence_length,
        scale_of=scale_of,
        join_timeout_s=job.runtime.placement_timeout_s,
        silence_s=max(10.0, 10 * job.runtime.heartbeat_s),
        started_s=started_s,
    )

    def on_commit(commit: Commit) -> None:
        folder = checkpoint.checkpoint_folder(run.folder, commit.steps_done)
        files = {name: checkpoint.FileFact(size_bytes=f[0], sha256=f[1]) for name, f in commit.files.items()}
        facts = checkpoint.job_facts(job, tokens.sha256)
        checkpoint.commit_checkpoint(
            folder, steps_done=commit.steps_done, facts=facts, files=files, keep=job.checkpoint.keep
        )

    def on_gone(rank: int, why: str) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(gone.put_nowait, (rank, why))

    ended_well = False
    try:
        await loop.run_in_executor(None, placement.launch, specs, on_gone)
        run.phase("workers placed")
        await coordinator.run(ledger, sink=run.sink, on_commit=on_commit, tick_s=_TICK_S, gone=gone)
        ended_well = True
    finally:
        if not ended_well:
            # A process is ended by its placement; a thread ends only when it is told.
            late_s = 0.0 if placement.owns_process else _LATE_HELLO_S
            await coordinator.abort_all("the driver is ending the job", num_ranks=len(specs), timeout_s=late_s)
    return summarise(
        job,
        run,
        tokens,
        predicted_step_s=plan.step_s * scale if scale > 0 else None,
        time_scale=scale,
        peak_bytes=tuple(ledger.peak_bytes_of_rank[rank] for rank in range(len(specs))),
    )


def summarise(
    job: JobConfig,
    run: Run,
    tokens: TokenData,
    *,
    predicted_step_s: float | None,
    time_scale: float,
    peak_bytes: tuple[int, ...],
) -> Summary:
    """Return the run's summary, and write it beside its metrics."""
    tally = run.tally
    step_s = tally.step_s
    idle = [event.idle_share_of_rank for event in tally.steps[1:] or tally.steps]
    checkpoints = checkpoint.complete_checkpoints(run.folder)
    summary = Summary(
        run=str(run.folder),
        steps=len(tally.steps),
        final_loss=tally.steps[-1].loss if tally.steps else None,
        held_out_loss=tally.evals[-1].loss if tally.evals else None,
        unigram_entropy=tokens.unigram_entropy_nats,
        tokens_per_s=job.batch.global_batch * job.model.sequence_length / step_s if step_s else None,
        step_s=step_s,
        predicted_step_s=predicted_step_s,
        time_scale=time_scale,
        first_step_s=run.first_step_s,
        phases={event.name: event.since_start_s for event in tally.phases},
        idle_share_of_rank=tuple(sum(column) / len(column) for column in zip(*idle, strict=True)),
        peak_bytes_of_rank=peak_bytes,
        checkpoint=str(checkpoints[-1]) if checkpoints else None,
    )
    (run.folder / "summary.json").write_text(json.dumps(asdict(summary), indent=1) + "\n", encoding="utf-8")
    return summary


def train_in_one_process(
    job: JobConfig, *, resume: Path | None, sink: Sink, started_s: float, plan: Plan | None = None
) -> Summary:
    """Train the job by the reference: one process, no pipeline, no Ray; raises what `train` does.

    Args:
        plan: whose replicas' order of sums to follow.
    """
    if job.diloco is not None:
        raise ConfigError(
            "the reference reduces at every step, DiLoCo does not",
            where="diloco",
            fix="leave the section out for --reference, to compare with the synchronous job",
        )
    profile = build_profile(job.model, microbatch=job.batch.microbatch, precision=job.precision)
    state_bytes = sum(layer.num_parameters for layer in profile.layers) * profile.bytes_per_parameter
    held_bytes = sum(layer.saved_activation_bytes for layer in profile.layers)
    check_memory(state_bytes + held_bytes, "the whole model in one process")
    check_folder(job.runs_dir, where="runs_dir")
    found = check_resume(job, resume)
    tokens = prepare_data(job.data, job.model)
    if found is not None:
        checkpoint.check_matches(found, job, tokens.sha256)
    from hybrid.runtime.reference import train_reference

    run = Run(job, None, tokens, sink, started_s)
    try:
        run.phase("data ready")
        from_path = None if found is None else found.path
        replicas = None if plan is None else plan.replicas
        train_reference(job, tokens, run_dir=run.folder, resume=from_path, sink=run.sink, replicas=replicas)
        return summarise(job, run, tokens, predicted_step_s=None, time_scale=0.0, peak_bytes=())
    except UserError as error:
        raise run.refused(error, resume) from None
    finally:
        run.close()


def _specs(
    job: JobConfig,
    fleet: Fleet,
    plan: Plan,
    coordinator: Coordinator,
    tokens: TokenData,
    run_dir: Path,
    resume: Path | None,
    placement: Placement,
) -> list[WorkerSpec]:
    specs = []
    for rank in range(plan.num_ranks):
        stage = plan.stages_of_rank(rank)[0]
        island = fleet.island(stage.island)
        specs.append(
            WorkerSpec(
                rank=rank,
                job=job,
                plan=plan,
                chip=island.chip,
                memory_bytes=stage.memory_limit_bytes,
                control=coordinator.address,
                tokens_dir=tokens.path.resolve(),
                data_digest=tokens.sha256,
                run_dir=run_dir.resolve(),
                resume=None if resume is None else resume.resolve(),
                host=placement.worker_host,
                owns_process=placement.owns_process,
            )
        )
    return specs


__all__ = ["Run", "Summary", "train", "train_in_one_process"]
