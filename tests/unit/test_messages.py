"""Control messages: what is sent arrives equal, and what no honest peer sends is refused."""

from dataclasses import asdict, fields, replace
from typing import Any, get_args

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.errors import ProtocolError
from hybrid.runtime import messages
from hybrid.runtime.messages import (
    CONTROL_VERSION,
    MAX_CONTROL_BYTES,
    Abort,
    Alive,
    CheckpointPart,
    Hello,
    Message,
    StepReport,
    decode,
    encode,
)

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False),
    "str": st.text(),
    "bytes": st.binary(),
    "bool": st.booleans(),
    "float | None": st.none() | st.floats(allow_nan=False),
    "Mapping[str, str]": st.dictionaries(st.text(), st.text(), max_size=5),
    "Mapping[str, float]": st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=5),
    "Mapping[str, tuple[int, str]]": st.dictionaries(
        st.text(), st.tuples(st.integers(0, 2**63), st.text()), max_size=5
    ),
}
CLASSES = get_args(Message)
MESSAGES = st.one_of([st.builds(cls, **{f.name: VALUES[str(f.type)] for f in fields(cls)}) for cls in CLASSES])
REPORT = StepReport(
    rank=1, step=2, loss=None, grad_norm=0.5, learning_rate=1e-3, seconds=0.1, busy_s=0.05, overrun_s=0.0
)
HELLO = Hello(rank=0, token=b"t", pid=1, host="here", address="tcp://127.0.0.1:1")


def test_every_message_has_a_name_on_the_wire():
    assert {cls.__name__ for cls in CLASSES} == set(messages._TYPES)


@given(MESSAGES)
def test_a_message_arrives_equal(message):
    assert decode(encode(message)) == message


def test_a_number_that_is_not_finite_arrives():
    arrived = decode(encode(replace(REPORT, grad_norm=float("nan"), loss=float("inf"))))
    assert arrived.grad_norm != arrived.grad_norm
    assert arrived.loss == float("inf")


def _frame(message: Message, **changes: Any) -> bytes:
    """Return a message's frame with fields changed; `...` removes one."""
    raw = {"v": CONTROL_VERSION, "t": type(message).__name__, **asdict(message)} | changes
    return bytes(msgpack.packb({key: value for key, value in raw.items() if value is not ...}))


def test_the_frame_that_the_tests_spoil_is_a_right_one():
    assert decode(_frame(REPORT)) == REPORT


@pytest.mark.parametrize(
    ("frame", "fact"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (encode(REPORT)[:-1], "not msgpack"),
        (encode(REPORT) + b"\x00", "not msgpack"),
        (b"\x81" * 2000, "not msgpack"),
        (b"\xdd\xff\xff\xff\xff", "not msgpack"),
        (msgpack.packb(msgpack.ExtType(4, b"")), "msgpack extension"),
        (msgpack.packb({1: 2}), "not msgpack"),
        (msgpack.packb([1, 2]), "control message is no map"),
        (msgpack.packb(None), "control message is no map"),
        (b"\xc6" + (MAX_CONTROL_BYTES + 1).to_bytes(4, "big") + bytes(MAX_CONTROL_BYTES + 1), "longer than its kind"),
        (_frame(Alive(), v=...), "another version"),
        (_frame(Alive(), v=CONTROL_VERSION + 1), r"another version \(got '3'\); valid: 2"),
        (_frame(Alive(), v="1"), "another version"),
        (_frame(Alive(), v=True), "another version"),
        (_frame(Alive(), v="1" * 10_000), "another version"),
        (_frame(Alive(), t=...), "unknown type"),
        (_frame(Alive(), t="Exit"), r"unknown type \(got 'Exit'\); valid: Hello"),
        (_frame(Alive(), t=["Alive"]), "unknown type"),
        (_frame(Alive(), t="x" * 10_000), "unknown type"),
        (_frame(REPORT, step=...), "StepReport has the wrong fields"),
        (_frame(REPORT, extra=1), "StepReport has the wrong fields"),
        (_frame(Abort(reason="x"), t="Alive"), "Alive has the wrong fields"),
        (_frame(REPORT, rank="1"), "StepReport.rank is not int"),
        (_frame(REPORT, rank=True), "StepReport.rank is not int"),
        (_frame(REPORT, rank=1.0), "StepReport.rank is not int"),
        (_frame(REPORT, seconds="1"), "StepReport.seconds is not float"),
        (_frame(REPORT, seconds=None), "StepReport.seconds is not float"),
        (_frame(REPORT, loss="low"), r"StepReport.loss is not float \| None"),
        (_frame(HELLO, token="text"), "Hello.token is not bytes"),
        (_frame(HELLO, host=b"bytes"), "Hello.host is not str"),
        (_frame(HELLO, address=["x"] * 5000), "Hello.address is not str"),
        (_frame(CheckpointPart(rank=0, steps_done=1, files={}), files=[]), "CheckpointPart.files"),
        (_frame(CheckpointPart(rank=0, steps_done=1, files={}), files={"a": 1}), "CheckpointPart.files"),
        (_frame(CheckpointPart(rank=0, steps_done=1, files={}), files={"a": [1]}), "CheckpointPart.files"),
        (_frame(CheckpointPart(rank=0, steps_done=1, files={}), files={"a": ["x", "1"]}), "CheckpointPart.files"),
    ],
)
def test_what_no_honest_peer_sends_is_refused(frame, fact):
    with pytest.raises(ProtocolError, match=fact) as refusal:
        decode(frame)
    assert len(str(refusal.value)) < 1000


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_and_nothing_else_is_raised(data):
    with pytest.raises(ProtocolError):
        decode(data)


@given(MESSAGES, st.data())
def test_a_message_with_one_byte_changed_is_a_message_or_refused(message, data):
    frame = bytearray(encode(message))
    place = data.draw(st.integers(0, len(frame) - 1))
    frame[place] ^= data.draw(st.integers(1, 255))
    try:
        decoded = decode(bytes(frame))
    except ProtocolError:
        return
    assert isinstance(decoded, CLASSES)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5) | st.binary(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    )
)
def test_any_value_under_a_right_name_is_a_message_or_refused(value):
    for key in ("rank", "files", "steps_done", "t", "v"):
        try:
            decoded = decode(_frame(CheckpointPart(rank=0, steps_done=1, files={"a": (1, "b")}), **{key: value}))
        except ProtocolError:
            continue
        assert isinstance(decoded, CheckpointPart)
        hash(tuple(decoded.files.items()))
