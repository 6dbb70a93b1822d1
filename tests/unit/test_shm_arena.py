"""The ring's book: nothing is given twice, everything comes back, and gaps close again."""

import random

import pytest

from hybrid.transports.shm_arena import ALIGN_BYTES, Arena, aligned


def test_extents_follow_each_other_round_the_ring() -> None:
    arena = Arena(1024)
    assert [arena.take(256), arena.take(256), arena.take(256)] == [0, 256, 512]
    arena.give_back(0)
    assert arena.take(256) == 768
    assert arena.take(256) == 0
    assert arena.take(64) is None


def test_bytes_that_come_back_out_of_turn_are_used_while_an_older_extent_stays() -> None:
    arena = Arena(1024)
    stays, first, second = arena.take(256), arena.take(256), arena.take(512)
    assert (stays, first, second) == (0, 256, 512)
    arena.give_back(512)
    arena.give_back(256)
    assert arena.take(768) == 256


def test_a_part_is_taken_where_no_gap_holds_the_whole() -> None:
    arena = Arena(1024)
    for offset in range(0, 1024, 256):
        assert arena.take(256) == offset
    arena.give_back(256)
    arena.give_back(768)
    assert arena.take(512) is None
    assert arena.take_up_to(512) == (256, 256)
    assert arena.take_up_to(128) == (768, 128)


def test_a_cut_extent_is_given_back_in_parts() -> None:
    arena = Arena(1024)
    assert arena.take(768) == 0
    arena.cut(0, 256)
    assert arena.give_back(0) == 256
    assert arena.give_back(256) == 512
    with pytest.raises(KeyError):
        arena.give_back(256)
    assert arena.take(1024) == 0


def test_random_extents_never_overlap_and_all_bytes_come_back() -> None:
    chance = random.Random(5)
    arena, held = Arena(64 * 1024), dict[int, int]()
    for _ in range(5000):
        if held and chance.random() < 0.5:
            offset = chance.choice(sorted(held))
            assert arena.give_back(offset) == held.pop(offset)
            continue
        wanted = aligned(chance.randrange(1, 9000))
        whole = arena.take(wanted) if chance.random() < 0.5 else None
        taken = (whole, wanted) if whole is not None else arena.take_up_to(wanted)
        if taken is None:
            continue
        offset, size = taken
        assert offset >= 0
        assert offset + size <= 64 * 1024
        assert all(offset + size <= other or other + held[other] <= offset for other in held)
        held[offset] = size
        if size > ALIGN_BYTES and chance.random() < 0.3:
            arena.cut(offset, ALIGN_BYTES)
            held[offset], held[offset + ALIGN_BYTES] = ALIGN_BYTES, size - ALIGN_BYTES
    for offset in held:
        arena.give_back(offset)
    assert arena.num_extents == 0
    assert arena.take(64 * 1024) is not None


def test_short_extents_walk_round_a_corner_of_their_own_and_use_the_rest_only_when_it_is_full() -> None:
    arena = Arena(8192, near_bytes=1024)
    assert [arena.take(128) for _ in range(8)] == list(range(0, 1024, 128))
    assert arena.take(128) == 1024
    assert arena.take(256) == 1152
    arena.give_back(512)
    assert arena.take(128) == 512
    assert arena.num_extents == 10


def test_long_extents_use_the_middle_first_and_the_rest_only_when_it_is_full() -> None:
    arena = Arena(8192, near_bytes=512, middle_bytes=2048)
    assert [arena.take_hot(1024), arena.take_hot(1024), arena.take_hot(1024)] == [512, 1536, None]
    assert arena.take(1024) == 2560
    arena.give_back(512)
    assert arena.take(1024) == 512
    assert arena.take_up_to(100_032) == (3584, 4608)
