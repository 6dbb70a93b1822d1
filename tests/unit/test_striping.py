"""Between islands every link carries its share, whatever the islands' sizes and links."""

from itertools import pairwise

import pytest

from hybrid.collectives.striping import borders_of, stripe
from hybrid.errors import UserError


@pytest.mark.parametrize(
    ("islands", "weights"),
    [
        ([[0, 1], [2, 3]], [1, 1, 1, 1]),
        ([[0, 1], [2]], [1, 1, 1]),
        ([[0, 1, 2], [3, 4]], [1, 2, 3, 5, 5]),
        ([[2, 0], [1], [3, 4, 5]], [10, 1, 30, 1, 1, 1]),
        ([[0, 1, 2]], [1, 1, 1]),
        ([[0], [1], [2], [3]], [1, 2, 3, 4]),
    ],
)
def test_each_member_carries_its_links_share_of_its_islands_vector(islands, weights) -> None:
    pieces = stripe(islands, weights)
    assert (pieces[0].start, pieces[-1].stop) == (0.0, 1.0)
    assert all(before.stop == after.start for before, after in pairwise(pieces))
    for at, island in enumerate(islands):
        order = [piece.owners[at] for piece in pieces]
        assert sorted(order, key=island.index) == order, "a member's pieces are one run"
        for member in island:
            share = sum(piece.stop - piece.start for piece in pieces if piece.owners[at] == member)
            assert share == pytest.approx(weights[member] / sum(weights[each] for each in island))


def test_two_islands_of_two_with_equal_links_meet_in_two_pairs() -> None:
    pieces = stripe([[0, 1], [2, 3]], [1, 1, 1, 1])
    assert [(piece.start, piece.stop, piece.owners) for piece in pieces] == [(0.0, 0.5, (0, 2)), (0.5, 1.0, (1, 3))]


def test_borders_cover_a_vector_of_any_length() -> None:
    pieces = stripe([[0, 1, 2], [3, 4]], [1, 2, 3, 5, 5])
    for num_elements in (0, 1, 2, 3, 1000, 1001):
        borders = borders_of(pieces, num_elements)
        assert borders == sorted(borders)
        assert borders[-1] == num_elements


@pytest.mark.parametrize(
    ("islands", "weights", "words"),
    [
        ([[0, 1], [1, 2]], [1, 1, 1], "partition"),
        ([[0], [2]], [1, 1, 1], "partition"),
        ([[0, 1], []], [1, 1], "partition"),
        ([[0], [1]], [1, 0], "not above 0"),
    ],
)
def test_what_is_no_partition_is_refused(islands, weights, words) -> None:
    with pytest.raises(UserError, match=words):
        stripe(islands, weights)
