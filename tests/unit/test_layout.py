"""Which rank holds which stage: by the schedule's name and the numbers; numbers that do not go together are refused."""

import pytest

from hybrid.errors import PlanError
from hybrid.scheduler.layout import layout_of
from hybrid.scheduler.schedules import SCHEDULE_NAMES


def layout(schedule: str, *, num_chips: int = 3, num_layers: int = 8, **more: object) -> tuple[int, ...]:
    return layout_of(schedule, num_chips=num_chips, num_layers=num_layers, **more)


@pytest.mark.parametrize(
    ("schedule", "more", "wanted"),
    [
        ("1f1b", {}, (0, 1, 2)),
        ("gpipe", {"num_stages": 2}, (0, 1)),
        ("zb-h1", {"stages_per_rank": 1}, (0, 1, 2)),
        ("interleaved", {}, (0, 1, 2, 0, 1, 2)),
        ("interleaved", {"num_stages": 4}, (0, 1, 0, 1)),
        ("interleaved", {"num_stages": 6, "stages_per_rank": 3}, (0, 1, 0, 1, 0, 1)),
        ("interleaved", {"stages_per_rank": (1, 3)}, (0, 1, 1, 1)),
        ("zb-v", {}, (0, 1, 2, 2, 1, 0)),
        ("zb-v", {"num_stages": 4}, (0, 1, 1, 0)),
        ("auto", {}, (0, 1, 2)),
        ("auto", {"stages_per_rank": (2, 1, 2)}, (0, 1, 2, 0, 2)),
    ],
)
def test_stages_lie_as_the_schedule_has_them(schedule, more, wanted):
    assert layout(schedule, **more) == wanted


@pytest.mark.parametrize(
    ("schedule", "more", "message"),
    [
        ("2f2b", {}, "no such schedule.*zb-v, auto"),
        ("1f1b", {"stages_per_rank": 2}, r"stages_per_rank: 1f1b has other numbers of stages a rank.*valid: 1\."),
        ("zb-v", {"stages_per_rank": (2, 1)}, r"zb-v has other numbers .*got \[2, 1\].*valid: 2\."),
        ("auto", {"stages_per_rank": (2, 0)}, r"got \[2, 0\].*1 or more"),
        ("auto", {"stages_per_rank": ()}, r"got \[\]"),
        ("interleaved", {"stages_per_rank": (2, 2), "num_stages": 3}, r"not the sum.*got 3.*valid: 4"),
        ("interleaved", {"stages_per_rank": (1, 1, 1, 1)}, "must fit the fleet's 3 chips"),
        ("interleaved", {"stages_per_rank": (4, 5)}, "together at most 8"),
        ("interleaved", {"num_stages": 3}, r"got 3.*2 to 6, a multiple of 2"),
        ("interleaved", {"num_stages": 8}, r"got 8.*2 to 6, a multiple of 2"),
        ("interleaved", {"stages_per_rank": 3}, r"3 chips of 3 stages but only 8 layers.*num_stages 3 to 6"),
        ("1f1b", {"num_chips": 9}, r"9 chips but only 8 layers.*num_stages 1 to 8"),
        ("1f1b", {"num_stages": 0}, r"got 0.*1 to 3"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(schedule, more, message):
    with pytest.raises(PlanError, match=message):
        layout(schedule, **more)


def test_every_schedule_has_a_layout_on_one_chip():
    for name in SCHEDULE_NAMES:
        assert set(layout(name, num_chips=1)) == {0}
