"""The tuner's choices and its table, without measuring anything."""

from hybrid.bench.tune import FULL, result_of

KIB = 1 << 10


def test_every_algorithm_is_tried_with_every_segment_that_makes_a_difference() -> None:
    small, large = list(FULL.choices(4 * KIB, 4)), list(FULL.choices(16 << 20, 4))
    assert {segment for _, segment in small} == {256 * KIB}
    assert {segment for _, segment in large} == set(FULL.segments)
    assert {algorithm for algorithm, _ in small} > {algorithm for algorithm, _ in large}
    assert len(small) == len(set(small))


def test_the_table_names_the_fastest_choice_of_each_size() -> None:
    result = result_of(
        {
            ("tcp", 2, 4 * KIB, "ring", 256 * KIB): [3.0, 1.0, 2.0],
            ("tcp", 2, 4 * KIB, "exchange", 256 * KIB): [1.5, 1.4, 9.0],
            ("tcp", 2, 64 * KIB, "ring", 256 * KIB): [1.0],
        }
    )
    assert [line["row"] for line in result.shown] == [
        'Row(operation="all_reduce", link="tcp", max_size=2, max_bytes=4096, '
        'choice=Choice(algorithm="exchange", segment_bytes=262144))',
        'Row(operation="all_reduce", link="tcp", max_size=2, max_bytes=65536, '
        'choice=Choice(algorithm="ring", segment_bytes=262144))',
    ]
    assert [row["median_s"] for row in result.rows] == [2.0, 1.5, 1.0]
