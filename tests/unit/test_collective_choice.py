"""Which algorithm is taken is a table's affair, and the table is data."""

from dataclasses import replace

import pytest

from hybrid.collectives.algorithms import ALGORITHMS
from hybrid.collectives.choose import BETWEEN_ISLANDS, DEFAULT_TABLE, Choice, Row, choose, load_table, save_table
from hybrid.collectives.measure import Timing, best_rows
from hybrid.errors import ConfigError

DIRECT, RING = Choice(algorithm="direct"), Choice(algorithm="ring")


@pytest.mark.parametrize("operation", ALGORITHMS)
def test_the_shipped_table_has_a_row_for_every_case(operation: str) -> None:
    for size_bytes in (0, 1, 1 << 16, 1 << 40):
        for size in (1, 2, 3, 1000):
            for narrow in (False, True):
                choice = choose(DEFAULT_TABLE, operation, size_bytes, size, "a new medium", narrow=narrow)
                assert choice.algorithm in ALGORITHMS[operation]


def test_the_first_row_that_fits_decides() -> None:
    rows = (
        Row(operation="all_reduce", choice=RING, link="tcp", max_bytes=100, max_size=4),
        Row(operation="all_reduce", choice=DIRECT),
    )
    assert choose(rows, "all_reduce", 100, 4, "tcp") == RING
    assert choose(rows, "all_reduce", 101, 4, "tcp") == DIRECT
    assert choose(rows, "all_reduce", 100, 5, "tcp") == DIRECT
    assert choose(rows, "all_reduce", 100, 4, "shm") == DIRECT
    assert choose((replace(rows[0], narrow=True), rows[1]), "all_reduce", 100, 4, "tcp") == DIRECT


def test_two_islands_exchange_in_one_step() -> None:
    for size_bytes in (1, 1 << 30):
        assert choose(DEFAULT_TABLE, "all_reduce", size_bytes, 2, BETWEEN_ISLANDS).algorithm == "exchange"


def test_a_table_survives_its_file_and_comes_before_the_shipped_one(tmp_path) -> None:
    rows = (Row(operation="all_reduce", choice=RING, link="tcp", max_bytes=7, narrow=True),)
    save_table(tmp_path / "mine.json", rows, measured={"date": "2026-11-25"})
    assert load_table(tmp_path / "mine.json") == (*rows, *DEFAULT_TABLE)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a table"),
        ("{}", "not a table"),
        ('{"rows": [{"operation": "all_reduce", "choice": {"algorithm": "star"}}]}', "no such algorithm"),
        ('{"rows": [{"operation": "all_reduce"}]}', "not a table"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, text: str, words: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_table(tmp_path / "mine.json")


def test_the_fastest_of_each_size_becomes_a_row_and_equal_neighbours_one() -> None:
    def timing(size_bytes: int, choice: Choice, median_s: float) -> Timing:
        return Timing(operation="all_reduce", size_bytes=size_bytes, choice=choice, median_s=median_s)

    timings = [
        *(timing(100, DIRECT, 1.0), timing(100, RING, 2.0)),
        *(timing(10_000, RING, 1.0), timing(10_000, DIRECT, 2.0)),
        *(timing(1_000_000, RING, 3.0), timing(1_000_000, DIRECT, 4.0)),
    ]
    assert best_rows(timings, link="tcp", size=2) == [
        Row(operation="all_reduce", choice=DIRECT, link="tcp", max_bytes=1000, max_size=2),
        Row(operation="all_reduce", choice=RING, link="tcp", max_bytes=None, max_size=2),
    ]
