"""Messages cut into parts and put together again, and matched with receives: no socket."""

import random

from hypothesis import given
from hypothesis import strategies as st

from hybrid.transports.base import MESSAGE_OVERHEAD_BYTES
from hybrid.transports.matching import Matcher
from hybrid.transports.message import Arriving, Part, Posted, parts_of
from hybrid.wire import Chunk, MessageHeader, decode_header


def _parts(message: list[bytes], frame_bytes: int, copy_below_bytes: int) -> tuple[MessageHeader, list[Part]]:
    header = MessageHeader(3, "t", tuple(map(len, message)), frame_bytes)
    views = [memoryview(buffer) for buffer in message]
    return header, list(parts_of(header, views, copy_below_bytes=copy_below_bytes))


@given(
    sizes=st.lists(st.integers(0, 300), max_size=6),
    frame_bytes=st.integers(1, 200),
    copy_below_bytes=st.integers(0, 200),
    bind_after=st.integers(0, 40),
)
def test_any_message_cut_into_parts_comes_together_whenever_its_receive_is_posted(
    sizes: list[int], frame_bytes: int, copy_below_bytes: int, bind_after: int
) -> None:
    message = [random.Random(size).randbytes(size) for size in sizes]
    header, parts = _parts(message, frame_bytes, copy_below_bytes)
    targets = [bytearray(size) for size in sizes]
    receive = Posted("t", tuple(memoryview(target) for target in targets))
    arriving = Arriving(header)
    for number, part in enumerate(parts):
        if number == bind_after:
            assert arriving.bind(receive)
        record = decode_header(part.head)
        if number == 0:
            assert record == header
        else:
            assert record == Chunk(3, arriving.filled_bytes)
            assert part.payload is not None
            assert len(part.payload) == arriving.frame_bytes_at(arriving.filled_bytes) <= frame_bytes
        if part.payload is not None:
            place = arriving.place_for(arriving.filled_bytes, len(part.payload))
            if place is not None:
                place[:] = part.payload
            else:
                arriving.put(arriving.filled_bytes, bytes(part.payload))
            arriving.filled_bytes += len(part.payload)
    if arriving.receive is None:
        assert arriving.bind(receive)
    assert arriving.whole
    assert [bytes(target) for target in targets] == message


@given(sizes=st.lists(st.integers(0, 300), max_size=6), frame_bytes=st.integers(1, 200))
def test_the_parts_of_a_message_weigh_its_payload_and_one_overhead(sizes: list[int], frame_bytes: int) -> None:
    _, parts = _parts([bytes(size) for size in sizes], frame_bytes, 50)
    assert sum(part.weight for part in parts) == sum(sizes) + MESSAGE_OVERHEAD_BYTES


def test_a_short_message_is_one_joined_part_and_a_long_one_is_read_in_place() -> None:
    _, joined = _parts([b"ab", b"", b"c"], 100, 100)
    assert [(part.payload, part.in_place) for part in joined] == [(b"abc", False)]
    _, single = _parts([b"x" * 90], 100, 10)
    assert [(len(part.payload or b""), part.in_place) for part in single] == [(90, True)]
    # The short last chunk too: ZeroMQ's release of it is taken for the release of all.
    _, chunked = _parts([b"x" * 101], 100, 10)
    assert [(len(part.payload or b""), part.in_place) for part in chunked] == [(0, False), (100, True), (1, True)]


def test_a_message_that_does_not_fit_leaves_the_buffers_alone() -> None:
    header, parts = _parts([b"abcdef"], 4, 1)
    target = bytearray(5)
    receive = Posted("t", (memoryview(target),))
    arriving = Arriving(header)
    arriving.put(0, b"abcd")
    arriving.filled_bytes = 4
    assert not arriving.bind(receive)
    assert arriving.place_for(arriving.filled_bytes, 2) is None
    arriving.put(4, b"ef")
    assert target == bytes(5)
    assert len(parts) == 3


def test_messages_meet_receives_of_their_tag_first_to_first() -> None:
    matcher: Matcher[Arriving, Posted] = Matcher()
    first, second, other = (Arriving(MessageHeader(n, tag, (), 1)) for n, tag in enumerate("aab"))
    early, late = Posted("a", ()), Posted("a", ())
    assert matcher.post(early) is None
    assert matcher.arrive(first) is early
    assert matcher.arrive(second) is None
    assert matcher.arrive(other) is None
    assert matcher.post(late) is second
    matcher.forget(other)
    waiting = Posted("b", ())
    assert matcher.post(waiting) is None
    assert matcher.forget_posted() == (waiting,)
