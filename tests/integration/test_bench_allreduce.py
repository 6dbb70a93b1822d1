"""`hybrid bench allreduce`: every arm has its figures for every number of ranks, and each really reduces."""

from hybrid.bench import allreduce
from hybrid.bench.allreduce import FIGURES, Settings, arms
from hybrid.bench.p2p import KIB

TINY = Settings(sizes=(4 * KIB,), turns=2, most=3, ranks=(2,), islands=False)


def test_every_arm_has_a_time_and_the_summary_the_names_of_what_was_measured(monkeypatch):
    monkeypatch.setattr(allreduce, "QUICK", TINY)
    result = allreduce.measure_allreduce(quick=True)
    assert {(row["ranks"], row["arm"], row["size_bytes"]) for row in result.rows} == {
        (2, arm, 4 * KIB) for arm in arms()
    }
    assert all(row["median_s"] > 0 and row["turns"] == 2 for row in result.rows)
    measured = {
        name for name, (ranks, arm, size, _) in FIGURES.items() if (ranks, size) == (2, 4 * KIB) and arm in arms()
    }
    assert set(result.summary) == set(result.floors) == measured
