import json

import pytest

from hybrid.errors import DataError
from hybrid.scheduler.step.replay import Change, Pace, read_trace, replay


def pace_of(chips):
    used = min(chips.get("trn2", 0), 4)
    return Pace(step_s=8.0 / used, tokens=100, chips={"trn2": used}) if used else None


def change(at_s, num_chips, price=None):
    return Change(at_s=at_s, chip="trn2", num_chips=num_chips, usd_per_hour=price)


def test_a_fleet_that_never_changes_loses_its_first_start_only():
    found = replay([change(0, 4, 2.0)], pace_of, end_s=100, recovery_s=10)
    assert (found.stretches[0].steps, found.tokens) == (45, 4500)
    assert found.useful_share == pytest.approx(0.9)
    assert found.goodput == pytest.approx(45)
    assert found.usd == pytest.approx(100 / 3600 * 8)
    assert found.usd_per_million_tokens == pytest.approx(found.usd / 4500 * 1e6)


def test_a_loss_costs_the_step_under_way_and_the_recovery():
    found = replay([change(0, 4), change(51, 2)], pace_of, end_s=100, recovery_s=0)
    assert [stretch.steps for stretch in found.stretches] == [25, 12]
    assert found.stretches[0].lost_s == pytest.approx(1.0)
    slow = replay([change(0, 4), change(51, 2)], pace_of, end_s=100, recovery_s=9)
    assert [stretch.steps for stretch in slow.stretches] == [21, 10]
    assert slow.stretches[1].lost_s == pytest.approx(9)


def test_chips_that_the_step_does_not_use_cost_no_recovery_but_money():
    found = replay([change(0, 4, 1.0), change(51, 9)], pace_of, end_s=100, recovery_s=0)
    assert sum(stretch.steps for stretch in found.stretches) == 50
    assert found.useful_share == 1.0
    assert found.stretches[1].usd == pytest.approx(49 / 3600 * 9)


def test_time_with_no_plan_is_lost_whole():
    found = replay([change(0, 4), change(50, 0), change(80, 4)], pace_of, end_s=100, recovery_s=4)
    assert [stretch.steps for stretch in found.stretches] == [23, 0, 8]
    assert found.stretches[1].lost_s == 30


def test_a_recovery_that_outlasts_a_stretch_goes_on_in_the_next():
    found = replay([change(0, 4), change(3, 5)], pace_of, end_s=20, recovery_s=10)
    assert [stretch.lost_s for stretch in found.stretches] == [3, 7]
    assert [stretch.steps for stretch in found.stretches] == [0, 5]


def test_a_state_that_comes_back_is_asked_for_once():
    asked = []

    def noting(chips):
        asked.append(dict(chips))
        return pace_of(chips)

    replay([change(0, 4), change(10, 2), change(20, 4)], noting, end_s=30, recovery_s=0)
    assert asked == [{"trn2": 4}, {"trn2": 2}]


def test_csv_and_json_say_the_same():
    text = "at_s,chip,num_chips,usd_per_hour\n0,trn2,4,2.5\n30,trn2,2,\n60,end,0,\n"
    raw = {
        "end_s": 60,
        "changes": [
            {"at_s": 0, "chip": "trn2", "num_chips": 4, "usd_per_hour": 2.5},
            {"at_s": 30, "chip": "trn2", "num_chips": 2},
        ],
    }
    assert read_trace(text) == read_trace(json.dumps(raw)) == ((change(0, 4, 2.5), change(30, 2)), 60.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("at_s,chip\n0,trn2\n", "num_chips"),
        ("at_s,chip,num_chips\n-1,trn2,4\n", "at_s is no number from 0 on"),
        ("at_s,chip,num_chips\n0,trn2,four\n", "num_chips is no number"),
        ("at_s,chip,num_chips\n0,trn2,4\n", "no change or no end"),
        ("{", "not JSON"),
        ('{"changes": 3}', "no list of changes"),
        ("", "no change or no end"),
    ],
)
def test_a_wrong_trace_is_refused(text, words):
    with pytest.raises(DataError, match=words):
        read_trace(text)


def test_changes_that_do_not_rise_are_refused():
    with pytest.raises(DataError, match="rise in time"):
        replay([change(10, 4), change(5, 4)], pace_of, end_s=20, recovery_s=0)
    with pytest.raises(DataError, match="rise in time"):
        replay([change(10, 4)], pace_of, end_s=5, recovery_s=0)
