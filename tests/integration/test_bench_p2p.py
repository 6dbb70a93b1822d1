"""`hybrid bench p2p`: every transport that joins processes has its figures, and the summary its names."""

from hybrid.bench import p2p
from hybrid.bench.p2p import KIB, MIB, Settings, arms
from hybrid.bench.result import Result
from hybrid.commands.bench import _verdict

TINY = Settings(sizes=(4 * KIB, 16 * MIB), turns=2, burst_bytes=MIB, most_messages=20, round_trips=5)


def test_every_transport_gloo_and_memcpy_have_a_rate_and_a_latency_and_the_summary_its_names(monkeypatch):
    monkeypatch.setattr(p2p, "QUICK", TINY)
    result: Result = p2p.measure_p2p(quick=True)
    rates = {(row["arm"], row["size_bytes"]) for row in result.rows if row["what"] == "one way"}
    assert rates == {(arm, size) for arm in arms() for size in TINY.sizes}
    assert {row["arm"] for row in result.rows if row["what"] == "latency"} == set(arms()) - {"memcpy"}
    assert all(row["median"] > 0 and row["turns"] == 2 for row in result.rows)
    names = {"zmq_vs_gloo_16mib", "shm_vs_memcpy_16mib", "shm_lent_vs_memcpy_16mib", "shm_latency_us_4kib"}
    assert set(result.summary) == names
    assert set(result.goals) | set(result.floors) <= names


def test_a_figure_is_judged_by_its_goal_or_by_its_floor():
    assert "≤ 2.00: met" in _verdict(1.0, 2.0, None)
    assert "≤ 2.00: MISSED" in _verdict(3.0, 2.0, None)
    assert "≥ 2.00: MISSED" in _verdict(1.0, None, 2.0)
    assert "≥ 2.00: met" in _verdict(3.0, None, 2.0)
    assert _verdict(3.0, None, None) == ""
