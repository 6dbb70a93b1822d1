"""The data plane's records: golden bytes, round trips, and refusal of everything else."""

import random

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.errors import ProtocolError
from hybrid.wire import (
    MAX_BUFFERS,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_RECORD_BYTES,
    Attach,
    Chunk,
    Credit,
    Goodbye,
    Hello,
    MessageHeader,
    Refusal,
    Welcome,
    decode_header,
    encode_header,
    pack,
    unpack,
)

GOLDEN = {
    "95010ca3304633921a00ce00200000": MessageHeader(12, "0F3", (26, 0), 2 << 20),
    "93020cce00200000": Chunk(12, 2 << 20),
    "9203cd1000": Credit(4096),
    "9104": Goodbye(),
    "9505010203c403616263": Hello(1, 2, 3, b"abc"),
    "9306ad7463703a2f2f302e302e302e30c402ff00": Welcome("tcp://0.0.0.0", b"\xff\x00"),
    "9207a26e6f": Refusal("no"),
    "9308c40101ce04000000": Attach(b"\x01", 64 << 20),
}


@pytest.mark.parametrize(("text", "record"), GOLDEN.items(), ids=lambda item: type(item).__name__)
def test_a_record_has_these_bytes_and_comes_back(text: str, record: object) -> None:
    assert encode_header(record).hex() == text  # type: ignore[arg-type]
    assert decode_header(bytes.fromhex(text)) == record


@given(
    seq=st.integers(0, 2**64 - 1),
    tag=st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
    sizes=st.lists(st.integers(0, 2**30), max_size=20),
    frame_bytes=st.integers(1, MAX_FRAME_BYTES),
)
def test_a_message_header_comes_back(seq: int, tag: str, sizes: list[int], frame_bytes: int) -> None:
    header = MessageHeader(seq, tag, tuple(sizes), frame_bytes)
    assert decode_header(encode_header(header)) == header


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x91" * 5000,
        b"\x00",
        b"\x80",
        b"\x90",
        pack([9]),
        pack([True]),
        pack(["1"]),
        pack([-1]),
        pack([3]),
        pack([3, 1, 2]),
        pack([3, -1]),
        pack([3, 1.0]),
        pack([3, True]),
        pack([3, "1"]),
        pack([5, 1, 2, 3, "text"]),
        pack([1, 0, "tag", 5, 100]),
        pack([1, 0, b"tag", [], 100]),
        pack([1, 0, "tag", [-1], 100]),
        pack([1, 0, "tag", [1.5], 100]),
        pack([1, 0, "tag", [[1]], 100]),
        pack([1, 0, "tag", [], 0]),
        pack([1, 0, "tag", [], MAX_FRAME_BYTES + 1]),
        pack([1, 0, "tag", [MAX_MESSAGE_BYTES, 1], 100]),
        pack([1, 0, "t" * 257, [], 100]),
        pack([1, 0, "é" * 129, [], 100]),
        pack([1, 0, "tag", [0] * (MAX_BUFFERS + 1), 100]),
        pack([4]) + b"\x00",
        msgpack.packb([3, msgpack.ExtType(1, b"x")]),
        msgpack.packb([3, msgpack.Timestamp(0)]),
        b"\x92\x03\xdb\xff\xff\xff\xff",
        b"\x92\x07\xa2\xff\xfe",
        b"\xdd\xff\xff\xff\xff",
        bytes(MAX_RECORD_BYTES + 1),
    ],
)
def test_a_frame_that_no_honest_peer_sends_is_refused(frame: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_header(frame)


@pytest.mark.parametrize(
    "header",
    [
        MessageHeader(0, "t" * 257, (), 1),
        MessageHeader(0, "t", (0,) * (MAX_BUFFERS + 1), 1),
        MessageHeader(0, "t", (MAX_MESSAGE_BYTES + 1,), 1),
    ],
)
def test_a_message_beyond_the_limits_is_not_sent(header: MessageHeader) -> None:
    with pytest.raises(ProtocolError):
        encode_header(header)


@given(st.binary(max_size=200))
@settings(max_examples=500)
def test_random_bytes_are_a_record_or_refused(frame: bytes) -> None:
    try:
        record = decode_header(frame)
    except ProtocolError:
        return
    assert decode_header(encode_header(record)) == record


def test_mutated_records_are_a_record_or_refused() -> None:
    chance = random.Random(5)
    refused = 0
    frames = [bytes.fromhex(text) for text in GOLDEN]
    for _ in range(5000):
        frame = bytearray(chance.choice(frames))
        for _ in range(chance.randint(1, 3)):
            frame[chance.randrange(len(frame))] = chance.randrange(256)
        try:
            decode_header(bytes(frame[: chance.randint(1, len(frame))]))
        except ProtocolError:
            refused += 1
    assert refused > 2500


def test_plain_values_come_back_with_arrays_as_tuples() -> None:
    value = {"a": [1, None, True, 2.5, "é", b"\x00"], "b": {"c": []}}
    assert unpack(pack(value)) == {"a": (1, None, True, 2.5, "é", b"\x00"), "b": {"c": ()}}


def test_a_frame_over_its_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ProtocolError, match="longer than its kind allows"):
        unpack(pack("x" * 100), max_bytes=50)
