"""What goes where between two stages of other degrees: each byte once, and only to who needs it."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from hybrid.scheduler.reshard import Box, Degrees, boxes_of, cut, peers_of, plan_transfers

DEGREES = st.builds(Degrees, width=st.integers(1, 5), tensor_parallel=st.integers(1, 5))
SIZES = {"num_samples": st.integers(1, 12), "num_tokens": st.integers(1, 12)}


def _cells(box: Box) -> list[tuple[int, int]]:
    return [
        (sample, token)
        for sample in range(box.first_sample, box.end_sample)
        for token in range(box.first_token, box.end_token)
    ]


@given(length=st.integers(0, 100), parts=st.integers(1, 20))
def test_a_length_is_cut_into_even_parts_that_cover_it(length: int, parts: int) -> None:
    ranges = cut(length, parts)
    sizes = [end - first for first, end in ranges]
    assert [number for first, end in ranges for number in range(first, end)] == list(range(length))
    assert max(sizes) - min(sizes) <= 1


@given(degrees=DEGREES, **SIZES)
def test_a_stages_boxes_hold_every_token_once(degrees: Degrees, num_samples: int, num_tokens: int) -> None:
    boxes = boxes_of(degrees, num_samples=num_samples, num_tokens=num_tokens)
    assert len(boxes) == degrees.size
    held = Counter(cell for box in boxes for cell in _cells(box))
    assert held == Counter((sample, token) for sample in range(num_samples) for token in range(num_tokens))


@given(sending=DEGREES, receiving=DEGREES, **SIZES)
def test_each_receiver_gets_each_needed_token_once_from_a_rank_that_holds_it(
    sending: Degrees, receiving: Degrees, num_samples: int, num_tokens: int
) -> None:
    size = {"num_samples": num_samples, "num_tokens": num_tokens}
    transfers = plan_transfers(sending, receiving, **size)
    held, needed = boxes_of(sending, **size), boxes_of(receiving, **size)
    for place, box in enumerate(needed):
        got = Counter(cell for one in transfers if one.receiver == place for cell in _cells(one.box))
        assert got == Counter(_cells(box))
    for one in transfers:
        assert one.box.meet(held[one.sender]) == one.box
    assert len({(one.sender, one.receiver) for one in transfers}) == len(transfers), "one message a pair"


@given(sending=DEGREES, receiving=DEGREES, **SIZES)
def test_the_load_is_as_even_as_the_activation_can_be_cut(
    sending: Degrees, receiving: Degrees, num_samples: int, num_tokens: int
) -> None:
    transfers = plan_transfers(sending, receiving, num_samples=num_samples, num_tokens=num_tokens)
    sent = Counter(dict.fromkeys(range(sending.size), 0))
    for one in transfers:
        sent[one.sender] += one.box.size
    assert sum(sent.values()) == num_samples * num_tokens
    assert max(sent.values()) <= -(-num_samples // sending.width) * -(-num_tokens // sending.tensor_parallel)


@given(sending=DEGREES, receiving=DEGREES, **SIZES)
def test_gradients_take_the_same_boxes_the_other_way(
    sending: Degrees, receiving: Degrees, num_samples: int, num_tokens: int
) -> None:
    size = {"num_samples": num_samples, "num_tokens": num_tokens}
    there = {(one.sender, one.receiver, one.box) for one in plan_transfers(sending, receiving, **size)}
    back = {(one.receiver, one.sender, one.box) for one in plan_transfers(receiving, sending, **size)}
    assert there == back
    for place in range(sending.size):
        assert peers_of(sending, receiving, place, **size) == tuple(
            sorted(receiver for sender, receiver, _ in there if sender == place)
        )


def _text(sending: tuple[int, int], receiving: tuple[int, int]) -> list[str]:
    one, other = (Degrees(width=width, tensor_parallel=degree) for width, degree in (sending, receiving))
    return [
        f"{t.sender}>{t.receiver} samples {t.box.first_sample}:{t.box.end_sample} "
        f"tokens {t.box.first_token}:{t.box.end_token}"
        for t in plan_transfers(one, other, num_samples=4, num_tokens=8)
    ]


def test_two_tensor_parallel_ranks_to_one_send_half_the_tokens_each() -> None:
    assert _text((1, 2), (1, 1)) == ["0>0 samples 0:4 tokens 0:4", "1>0 samples 0:4 tokens 4:8"]


def test_two_ranks_to_four_send_each_its_quarter() -> None:
    assert _text((1, 2), (1, 4)) == [
        "0>0 samples 0:4 tokens 0:2",
        "0>1 samples 0:4 tokens 2:4",
        "1>2 samples 0:4 tokens 4:6",
        "1>3 samples 0:4 tokens 6:8",
    ]


def test_two_copies_to_two_tensor_parallel_ranks_exchange_quarters() -> None:
    assert _text((2, 1), (1, 2)) == [
        "0>0 samples 0:2 tokens 0:4",
        "0>1 samples 0:2 tokens 4:8",
        "1>0 samples 2:4 tokens 0:4",
        "1>1 samples 2:4 tokens 4:8",
    ]


def test_equal_degrees_send_one_message_a_rank() -> None:
    assert _text((2, 2), (2, 2)) == [
        "0>0 samples 0:2 tokens 0:4",
        "1>1 samples 0:2 tokens 4:8",
        "2>2 samples 2:4 tokens 0:4",
        "3>3 samples 2:4 tokens 4:8",
    ]


def test_a_box_is_counted_from_the_corner_of_the_one_that_holds_it() -> None:
    outer = Box(first_sample=2, end_sample=4, first_token=4, end_token=8)
    inner = Box(first_sample=3, end_sample=4, first_token=5, end_token=8)
    assert inner.within(outer) == Box(first_sample=1, end_sample=2, first_token=1, end_token=4)
