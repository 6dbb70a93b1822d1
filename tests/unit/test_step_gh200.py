from pathlib import Path

import pytest

from hybrid.bench import gh200
from hybrid.bench.million import measure_million
from hybrid.bench.simulator import gh200_rows, read_folder
from hybrid.errors import DataError

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not (DATA / "sailor").is_dir(), reason=f"no measured plans in {DATA}")


@pytest.fixture(scope="module")
def read():
    return read_folder(DATA / "sailor")


@needs_data
def test_the_fifteen_measured_plans_are_predicted_within_the_goals():
    rows, summary = gh200_rows(DATA)
    assert len(rows) == 15
    assert sum(row["apart"] for row in rows) == 1
    assert summary["gh200_time_mae"] <= 0.05
    assert summary["gh200_memory_mae"] <= 0.05
    # Not within the mean's goal, and told: every plan counted.
    assert summary["gh200_time_mae"] < summary["gh200_time_mae_all"] < 0.055
    assert summary["gh200_time_max"] < 0.15


@needs_data
def test_no_prediction_looks_at_what_was_measured(read):
    from dataclasses import replace

    setup, plans = read
    for plan in plans[:3]:
        blind = replace(plan, step_s=float("nan"), memory_bytes=float("nan"))
        assert gh200.predict(setup, blind).step_s == gh200.predict(setup, plan).step_s


@needs_data
def test_a_layer_takes_no_longer_for_less_work(read):
    setup, _ = read
    for layer in (0, 1, 2, 25):
        for degree in (2, 4):
            forward = [gh200.layer_seconds(setup, degree, size, layer)[0] for size in (1, 2, 4, 8, 16, 32)]
            assert forward == sorted(forward)
    # Where the device decides, the profile's own number stands.
    cell = setup.table.cells[gh200.CHIP, 4, 8]
    assert gh200.layer_seconds(setup, 4, 8, 2) == pytest.approx((cell.forward_s[2], cell.backward_s[2]))


def test_missing_data_is_said_and_not_hidden(tmp_path):
    rows, summary = gh200_rows(tmp_path)
    assert summary == {}
    assert rows[0]["what"] == "SKIPPED"
    assert str(tmp_path) in rows[0]["why"]


def test_data_of_another_form_is_refused(tmp_path):
    (tmp_path / "sailor").mkdir()
    with pytest.raises(DataError, match="cannot be read"):
        gh200_rows(tmp_path)


def test_a_step_of_a_million_chips_is_simulated_in_seconds():
    result, _, simulated_s = measure_million()
    assert 999_000 <= result.step.num_devices <= 1_000_000
    assert simulated_s < 5.0
    assert sum(len(spans) for run in result.runs for spans in run.timeline.spans_of_rank) < 20_000
    for run in result.runs:
        for rank, peak in enumerate(run.peak_bytes_of_rank):
            assert peak <= run.pipeline.stages[rank].memory.limit_bytes, run.pipeline.name
