"""Time-outs from observed waits: what they follow, what they forget, and who overrides them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.errors import ConfigError
from hybrid.transports.arrival import ArrivalHistory, TimeoutRule, derived_timeout_s

RULE = TimeoutRule(initial_s=60, floor_s=2, cap_s=100, factor=5, num_needed=3, num_kept=4)


def test_the_first_waits_get_the_initial_limit():
    history = ArrivalHistory(RULE)
    assert history.timeout_s == 60
    history.observe(1.0)
    history.observe(1.0)
    assert history.timeout_s == 60


def test_the_limit_follows_the_longest_of_the_last_waits():
    history = ArrivalHistory(RULE)
    for wait_s in (1.0, 3.0, 1.0):
        history.observe(wait_s)
    assert history.timeout_s == 15


def test_a_long_wait_is_forgotten_after_as_many_others_as_are_kept():
    history = ArrivalHistory(RULE)
    for wait_s in (10.0, 1.0, 1.0, 1.0):
        history.observe(wait_s)
    assert history.timeout_s == 50
    history.observe(1.0)
    assert history.timeout_s == 5


def test_a_peer_that_slows_down_gradually_is_never_called_lost():
    history, wait_s = ArrivalHistory(RULE), 0.1
    for _ in range(40):
        assert wait_s < history.timeout_s
        history.observe(wait_s)
        wait_s = min(wait_s * 1.5, 90)


def test_the_user_overrides_what_is_observed():
    history = ArrivalHistory(RULE, fixed_s=7)
    for _ in range(10):
        history.observe(50)
    assert history.timeout_s == 7


@given(st.lists(st.floats(0, 1e6), max_size=20))
def test_the_limit_stays_between_floor_and_cap_and_never_falls_when_a_wait_grows(waits_s):
    limit = derived_timeout_s(waits_s, RULE)
    assert RULE.floor_s <= limit <= RULE.cap_s
    assert derived_timeout_s([2 * wait_s for wait_s in waits_s], RULE) >= limit


def test_limits_out_of_order_are_refused():
    with pytest.raises(ConfigError, match="out of order"):
        TimeoutRule(floor_s=10, initial_s=5)
