from itertools import count

import pytest

from hybrid.scheduler.bench_schedules import (
    PUBLISHED,
    SPEEDS_OF_IMBALANCE,
    bench_schedules,
    by_hand_rates,
    published_rows,
    unequal_rows,
)


@pytest.mark.parametrize("setting", PUBLISHED, ids=lambda s: f"{s.model}-{s.num_microbatches}")
def test_the_printed_bubble_rates_come_out_to_the_fourth_decimal(setting):
    rates = by_hand_rates(setting)
    for name in ("1f1b", "interleaved", "zb-h1", "zb-h2"):
        assert f"{rates[name]:.4f}" == f"{setting.rate_of[name]:.4f}", name
    assert rates["interleaved_every_wait"] > rates["interleaved"]


@pytest.mark.parametrize(
    "settings", [PUBLISHED[::3], pytest.param(PUBLISHED, marks=pytest.mark.slow)], ids=["24 microbatches", "all"]
)
def test_auto_reaches_the_printed_rates_at_their_memory_limits(settings):
    rows = published_rows(settings, clock=count().__next__, num_tries=250)
    rows = [row for row in rows if str(row["schedule"]).startswith("auto")]
    assert len(rows) == 2 * len(settings)
    for row in rows:
        assert round(row["rate"], 4) <= row["published"], row


def test_auto_is_never_worse_than_the_best_named_schedule_on_unequal_stages():
    rows = list(unequal_rows(num_tries=6))
    assert len(rows) == len(SPEEDS_OF_IMBALANCE) * 8
    assert all(row["rates"]["auto"] <= row["best_named"] for row in rows)


@pytest.mark.slow
def test_the_summary_has_the_names_of_the_contract():
    rows, summary = bench_schedules(clock=lambda: 0.0, quick=True)
    assert rows
    assert summary["published_max_abs_diff"] == 0.0
    assert summary["auto_over_zb1p_max"] <= 1.0
    assert summary["auto_over_zb2p_max"] <= 1.0
    assert summary["unequal_auto_over_best_named_max"] <= 1.0
