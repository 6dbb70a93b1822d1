"""The ledger's decisions, message by message, on a clock that the test holds."""

from dataclasses import replace

import pytest

from hybrid.errors import CheckpointError, HybridError, MachineError, TrainingDiverged, UserError, WorkerFailed
from hybrid.observe.events import CheckpointEvent, EvalEvent, PhaseEvent, StepEvent
from hybrid.runtime.ledger import Commit, Effect, Emit, End, Ledger, Send
from hybrid.runtime.messages import (
    Abort,
    CheckpointPart,
    EvalReport,
    Fault,
    Finished,
    Heartbeat,
    Hello,
    Ready,
    Shutdown,
    Start,
    StepReport,
    Welcome,
)

TOKEN = b"secret"
STARTED_S = 100.0


def ledger(num_ranks: int = 2) -> Ledger:
    return Ledger(
        num_ranks=num_ranks,
        token=TOKEN,
        tokens_per_step=1000,
        scale_of=lambda ready: sum(r.seconds_of[f"{r.rank}F"] for r in ready) * 10,
        join_timeout_s=60.0,
        silence_s=10.0,
        started_s=STARTED_S,
    )


def hello(rank: int, token: bytes = TOKEN) -> Hello:
    return Hello(rank=rank, token=token, pid=1, host="h", address=f"tcp://h:{rank}")


def ready(rank: int) -> Ready:
    return Ready(rank=rank, seconds_of={f"{rank}F": 0.1, f"{rank}B": 0.2}, allocated_bytes=1)


def report(rank: int, step: int, loss: float | None = None) -> StepReport:
    return StepReport(
        rank=rank,
        step=step,
        loss=loss,
        grad_norm=1.5,
        learning_rate=0.1,
        seconds=0.5,
        busy_s=0.4 - 0.1 * rank,
        overrun_s=0.01 * rank,
    )


def part(rank: int, steps_done: int) -> CheckpointPart:
    return CheckpointPart(rank=rank, steps_done=steps_done, files={f"layer-{rank:03d}.safetensors": (10 + rank, "ab")})


def fault(rank: int, *, is_consequence: bool = False, error: str = "ValueError", exit_code: int = 1) -> Fault:
    return Fault(
        rank=rank,
        error=error,
        text=f"it broke on {rank}.",
        traceback="Traceback\n  here\n",
        exit_code=exit_code,
        is_consequence=is_consequence,
    )


def joined(num_ranks: int = 2, now_s: float = 109.0) -> Ledger:
    book = ledger(num_ranks)
    for rank in range(num_ranks):
        book.on_message(hello(rank), now_s)
    return book


def running(num_ranks: int = 2, now_s: float = 109.0) -> Ledger:
    book = joined(num_ranks, now_s)
    for rank in range(num_ranks):
        book.on_message(ready(rank), now_s)
    return book


def end_of(effects: list[Effect]) -> HybridError | None:
    """Return the error of the End, which must be there, after an Abort to all where it is an error."""
    (end,) = [effect for effect in effects if isinstance(effect, End)]
    if end.error is not None:
        assert isinstance(effects[0], Send)
        assert isinstance(effects[0].message, Abort)
        assert effects[0].rank is None
    return end.error


def test_the_last_to_join_brings_a_welcome_with_every_address_to_all():
    book = ledger(3)
    assert book.on_message(hello(2), 101) == []
    assert book.on_message(hello(0), 102) == []
    effects = book.on_message(hello(1), 103)
    assert effects == [
        Emit(event=PhaseEvent(name="workers joined", since_start_s=3.0)),
        Send(rank=None, message=Welcome(address_of_rank={"0": "tcp://h:0", "1": "tcp://h:1", "2": "tcp://h:2"})),
    ]


def test_a_wrong_token_does_not_join_and_does_not_keep_the_right_one_out():
    book = ledger(1)
    assert book.on_message(hello(0, b"guess"), 101) == []
    assert book.on_message(ready(0), 101) == []
    assert len(book.on_message(hello(0), 102)) == 2


def test_a_rank_joins_once():
    book = ledger(2)
    book.on_message(hello(0), 101)
    assert book.on_message(replace(hello(0), address="tcp://elsewhere:1"), 102) == []
    (_, welcome) = book.on_message(hello(1), 103)
    assert welcome.message.address_of_rank["0"] == "tcp://h:0"  # type: ignore[union-attr]


@pytest.mark.parametrize("rank", [-1, 2, 10**6])
def test_a_rank_that_the_job_does_not_have_is_not_heard(rank):
    book = joined()
    assert book.on_message(hello(rank), 101) == []
    assert book.on_message(fault(rank), 101) == []
    assert not book.ended


@pytest.mark.parametrize("message", [ready(0), report(0, 0), part(0, 1), fault(0), Heartbeat(rank=0, step=0)])
def test_who_has_not_said_hello_is_not_heard(message):
    assert ledger().on_message(message, 101) == []


def test_the_last_to_be_ready_starts_all_with_the_scale_of_what_they_measured_in_rank_order():
    book = joined()
    assert book.on_message(ready(1), 115) == []
    assert book.on_message(replace(ready(0), seconds_of={"0F": 0.3}), 116) == [
        Emit(event=PhaseEvent(name="stages built and warm", since_start_s=16.0)),
        Send(rank=None, message=Start(time_scale=4.0)),
    ]


def test_a_step_is_committed_when_every_rank_has_reported_it_and_not_before():
    book = running(3)
    assert book.on_message(report(2, 0, loss=5.0), 110) == []
    assert book.on_message(report(0, 0), 110) == []
    (effect,) = book.on_message(report(1, 0), 112)
    assert effect == Emit(
        event=StepEvent(
            step=0,
            loss=5.0,
            grad_norm=1.5,
            learning_rate=0.1,
            seconds=0.5,
            tokens_per_s=2000.0,
            idle_share_of_rank=(pytest.approx(0.2), pytest.approx(0.4), pytest.approx(0.6)),  # type: ignore[arg-type]
            overrun_s=0.02,
            since_start_s=12.0,
        )
    )


def test_steps_may_overlap_and_are_committed_each_with_its_own_reports():
    book = running()
    assert book.on_message(report(0, 0), 110) == []
    assert book.on_message(report(0, 1), 110) == []
    (first,) = book.on_message(report(1, 0, loss=1.0), 110)
    (second,) = book.on_message(report(1, 1, loss=2.0), 110)
    assert (first.event.step, first.event.loss) == (0, 1.0)  # type: ignore[union-attr]
    assert (second.event.step, second.event.loss) == (1, 2.0)  # type: ignore[union-attr]


def test_a_report_told_twice_counts_once():
    book = running()
    assert book.on_message(report(0, 0), 110) == []
    assert book.on_message(report(0, 0), 110) == []


def test_the_held_out_loss_is_passed_on():
    assert running().on_message(EvalReport(rank=1, steps_done=4, loss=3.5), 110) == [
        Emit(event=EvalEvent(steps_done=4, loss=3.5))
    ]


def test_a_checkpoint_is_committed_when_every_rank_has_written_its_part():
    book = running()
    assert book.on_message(part(1, 4), 110) == []
    assert book.on_message(part(1, 4), 110) == []
    assert book.on_message(part(0, 4), 111) == [
        Commit(steps_done=4, files={"layer-000.safetensors": (10, "ab"), "layer-001.safetensors": (11, "ab")}),
        Emit(event=CheckpointEvent(steps_done=4, num_bytes=21)),
    ]


def test_parts_of_different_checkpoints_do_not_mix():
    book = running()
    assert book.on_message(part(0, 4), 110) == []
    assert book.on_message(part(1, 8), 110) == []


def test_the_job_ends_well_when_every_rank_has_finished():
    book = running()
    assert book.on_message(Finished(rank=0, peak_bytes=7), 110) == []
    effects = book.on_message(Finished(rank=1, peak_bytes=9), 110)
    assert effects == [Send(rank=None, message=Shutdown()), End(error=None)]
    assert book.ended
    assert book.peak_bytes_of_rank == {0: 7, 1: 9}


def test_nothing_is_heard_after_the_end():
    book = running(1)
    book.on_message(Finished(rank=0, peak_bytes=7), 110)
    assert book.on_message(fault(0), 111) == []
    assert book.on_worker_gone(0, "it returned", 111) == []
    assert book.on_tick(10_000) == []


# What ends a job ----------------------------------------------------------------------------------------------


def test_a_root_cause_ends_the_job_at_once_with_its_traceback():
    error = end_of(running().on_message(fault(1), 110))
    assert isinstance(error, WorkerFailed)
    assert error.exit_code == 1
    assert "rank 1 failed with ValueError: it broke on 1." in str(error)
    assert "Traceback\n  here" in str(error)


def test_a_consequence_waits_for_its_cause():
    book = running(3)
    assert book.on_message(fault(0, is_consequence=True, error="PeerLost"), 110) == []
    assert book.on_tick(111) == []
    assert "rank 2 failed with ValueError" in str(end_of(book.on_message(fault(2), 112)))


def test_a_consequence_whose_cause_is_never_told_ends_the_job_itself():
    book = running(3)
    book.on_message(fault(0, is_consequence=True, error="PeerLost"), 110)
    book.on_message(fault(1, is_consequence=True, error="CommTimeout"), 112)
    assert book.on_tick(112.9) == []
    assert "rank 0 failed with PeerLost" in str(end_of(book.on_tick(113.1)))


def test_a_worker_that_dies_without_a_word_is_the_root_cause_even_where_others_complain_first():
    book = running(3)
    book.on_message(fault(0, is_consequence=True, error="PeerLost"), 110)
    assert book.on_worker_gone(1, "killed by signal 9", 110.2) == []
    error = end_of(book.on_tick(111.3))
    assert isinstance(error, WorkerFailed)
    assert str(error) == "rank 1's process ended before its job did: killed by signal 9."


def test_the_last_words_of_a_worker_may_come_after_the_news_that_its_process_has_ended():
    book = running()
    assert book.on_worker_gone(1, "its thread returned", 110) == []
    assert book.on_tick(110.5) == []
    error = end_of(book.on_message(fault(1, error="TrainingDiverged", exit_code=2), 110.6))
    assert isinstance(error, TrainingDiverged)
    assert error.exit_code == 2


def test_a_worker_that_told_a_consequence_and_then_ended_is_no_root_cause():
    book = running(3)
    assert book.on_worker_gone(1, "it returned early", 110) == []
    assert book.on_message(fault(1, is_consequence=True, error="PeerLost"), 110.2) == []
    assert book.on_worker_gone(1, "it returned early", 110.3) == []
    assert "rank 2 failed" in str(end_of(book.on_message(fault(2), 110.4)))


def test_a_worker_that_leaves_after_it_has_finished_is_not_missed():
    book = running()
    book.on_message(Finished(rank=0, peak_bytes=1), 110)
    assert book.on_worker_gone(0, "it returned", 111) == []
    assert book.on_tick(119) == []


@pytest.mark.parametrize(
    ("name", "cls"), [("TrainingDiverged", TrainingDiverged), ("CheckpointError", UserError), ("DataError", UserError)]
)
def test_what_the_user_gave_wrong_keeps_exit_code_2_and_one_line(name, cls):
    error = end_of(running().on_message(fault(1, error=name, exit_code=CheckpointError.exit_code), 110))
    assert isinstance(error, cls)
    assert error.exit_code == 2
    assert str(error) == "rank 1: it broke on 1."


def test_who_does_not_join_in_time_is_named():
    book = ledger(3)
    book.on_message(hello(1), 101)
    for now_s in range(110, 160, 5):
        book.on_message(Heartbeat(rank=1, step=-1), now_s)
        assert book.on_tick(now_s) == []
    assert book.on_tick(159.9) == []
    error = end_of(book.on_tick(160.1))
    assert isinstance(error, MachineError)
    assert "did not join within 60 s: rank 0, 2" in str(error)
    assert "runtime.placement_timeout_s" in str(error)


def test_a_silent_worker_ends_the_job_and_is_named_with_its_step():
    book = running(now_s=100.0)
    for now_s in (105.0, 110.0, 115.0):
        book.on_message(Heartbeat(rank=0, step=3), now_s)
    book.on_message(Heartbeat(rank=1, step=2), 106.0)
    assert book.on_tick(115.9) == []
    error = end_of(book.on_tick(116.5))
    assert isinstance(error, WorkerFailed)
    assert "rank 1 has been silent for 10.5 s after step 2" in str(error)


def test_any_word_breaks_the_silence():
    book = running(1)
    assert book.on_tick(118) == []
    book.on_message(EvalReport(rank=0, steps_done=1, loss=1.0), 118)
    assert book.on_tick(127) == []


def test_who_has_finished_may_be_silent_while_others_work():
    book = running()
    book.on_message(Finished(rank=0, peak_bytes=1), 110)
    book.on_message(Heartbeat(rank=1, step=5), 130)
    assert book.on_tick(131) == []


def test_the_reason_of_an_abort_is_short_enough_to_send():
    long = replace(fault(0), traceback="x" * 20_000)
    (abort, _) = running().on_message(long, 110)
    assert len(abort.message.reason) <= 2000  # type: ignore[union-attr]
