"""Two islands of two ranks over shaped links: every arm reduces, and none is faster than the links allow."""

import pytest

from hybrid.bench import islands, netns
from hybrid.bench.islands import FLOORS, Measured, Settings, measure_islands, with_islands
from hybrid.bench.p2p import MIB
from hybrid.bench.result import Result

REASON = netns.why_not()
TINY_FAST = Settings(arms=islands.FAST.arms, size_bytes=4 * MIB, turns=2)
TINY_SLOW = Settings(arms=islands.SLOW.arms, size_bytes=4 * MIB, bits_per_s=2e8, turns=2)
PLAIN = Result(rows=[{"arm": "gloo"}], summary={"a": 1.0}, shown=[{"ranks": "2", "ms": "gloo", "4 KiB": "1"}])


@pytest.mark.slow
@pytest.mark.skipif(REASON is not None, reason=f"no network namespaces: {REASON}")
def test_every_arm_reduces_and_no_link_carries_more_than_it_can():
    measured = measure_islands(TINY_FAST, TINY_SLOW)
    assert measured.reason is None
    assert set(measured.summary) == set(FLOORS)
    assert {row["arm"] for row in measured.rows} == {*TINY_FAST.arms, *TINY_SLOW.arms, "tcp stream"}
    for row in measured.rows:
        # The shaper lets a bucket's worth through at once, which is much of so little.
        assert row["bound_over_this"] < 1.3, row
    assert with_islands(PLAIN, measured).summary.keys() == {"a", *FLOORS}


def test_where_islands_are_not_allowed_the_reason_is_shown_and_the_rest_stands(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(islands, "why_not", lambda: "network namespaces need root")
    result = with_islands(PLAIN, measure_islands())
    assert result.summary == {"a": 1.0}
    assert result.floors == {}
    assert "need root" in result.shown[-1]["ms"]
    assert list(result.shown[-1]) == list(PLAIN.shown[0])
    assert "need root" in str(result.rows[-1]["skipped"])


def test_the_bound_is_the_bytes_of_one_island_over_all_its_links():
    two = netns.Islands(namespaces=("a", "b"), addresses=(("x", "y"), ("z", "w")), bits_per_s=1e9)
    assert islands.bound_s(10**9, 2, two) == pytest.approx(10**9 / (2 * 125e6 * 1448 / 1514))


def test_a_result_without_figures_keeps_its_own():
    assert with_islands(PLAIN, Measured(summary={}, reason="none")).rows[0] == {"arm": "gloo"}
