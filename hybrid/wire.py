"""Bytes on the wire: the msgpack codec, the protocol version and the limits.

The only file that imports msgpack. Nothing is ever unpickled: a frame is a msgpack array of a kind number and
plain fields, decoded under limits, and whatever is not exactly that is a ProtocolError. Pure: no sockets, no clock,
no torch. May import only `errors`.

Sections: the codec (both planes), then the data plane's records (what two transports say to each other).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NoReturn, TypeAlias

import msgpack

from hybrid.errors import ProtocolError

PROTOCOL_VERSION = 1
"""Both ends must have the same; there is no negotiation."""

MAX_RECORD_BYTES = 64 * 1024
"""Of one encoded record; a longer frame is refused before it is parsed."""


# The codec ------------------------------------------------------------------------------------------------


def pack(value: object) -> bytes:
    """Return `value` (None, bool, int, float, str, bytes, lists and str-keyed dicts of them) as msgpack."""
    packed: bytes = msgpack.packb(value, use_bin_type=True)
    return packed


def unpack(frame: bytes, *, max_bytes: int = MAX_RECORD_BYTES) -> Any:
    """Return the plain value in a msgpack frame; arrays come back as tuples.

    Raises:
        ProtocolError: longer than `max_bytes`, not msgpack, bytes left over, or an extension type.
    """
    if len(frame) > max_bytes:
        raise ProtocolError(
            "frame is longer than its kind allows", value=len(frame), valid=f"at most {max_bytes} bytes"
        )
    try:
        # Lengths inside the frame can promise no more than the frame itself holds.
        return msgpack.unpackb(frame, raw=False, use_list=False, strict_map_key=True, max_ext_len=0, ext_hook=_refuse)
    except ProtocolError:
        raise
    except Exception as error:  # msgpack raises ValueError, its own classes, UnicodeDecodeError, RecursionError …
        raise ProtocolError(f"frame is not msgpack: {type(error).__name__}", value=bytes(frame[:16])) from None


def _refuse(code: int, _data: bytes) -> NoReturn:
    raise ProtocolError("frame holds a msgpack extension", value=code)


# The data plane -------------------------------------------------------------------------------------------

MAX_TAG_BYTES = 256
MAX_BUFFERS = 1024
MAX_MESSAGE_BYTES = 1 << 40
MAX_FRAME_BYTES = 16 << 20
"""Of one payload frame; longer messages travel in several."""


@dataclass(frozen=True, slots=True)
class MessageHeader:
    """A message begins. Its payload rides along as one frame, or follows in chunks."""

    seq: int
    """Messages sent before it on this edge, in this direction."""
    tag: str
    sizes: tuple[int, ...]
    """Bytes of each buffer."""
    frame_bytes: int
    """No payload frame is longer. A chunk ends at the buffer's end or after this many bytes of it."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next payload frame of message `seq`, which starts at byte `offset` of the message."""

    seq: int
    offset: int


@dataclass(frozen=True, slots=True)
class Credit:
    """The receiver has taken `size_bytes`: as many more may be sent."""

    size_bytes: int


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The sender closes in good order; nothing follows."""


@dataclass(frozen=True, slots=True)
class Hello:
    """Who knocks at a node's door; the token is the job's secret."""

    version: int
    rank: int
    to_rank: int
    token: bytes


@dataclass(frozen=True, slots=True)
class Welcome:
    """Where the edge's own socket listens, and the word to say there first."""

    endpoint: str
    secret: bytes


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the door stays shut."""

    reason: str


@dataclass(frozen=True, slots=True)
class Attach:
    """First word on an edge's own socket, from both ends; `window_bytes` is what this end will hold unreceived."""

    secret: bytes
    window_bytes: int


@dataclass(frozen=True, slots=True)
class Approach:
    """First word on a plain socket, from the end that dials; nothing of it is secret, and nothing of it is proven."""

    version: int
    rank: int
    to_rank: int
    edge: bytes
    """A random name of the edge, the same on each of its streams."""
    stream: int
    num_streams: int
    window_bytes: int
    frame_bytes: int
    must_seal: int
    """1 where this end demands encryption."""
    host: bytes
    """A name of this host that only who knows the job's token can make."""
    public: bytes
    """This end's half of a fresh secret (X25519)."""
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Challenge:
    """Second word, from the end that listens: its own half, and what the two will speak."""

    window_bytes: int
    frame_bytes: int
    sealed: int
    """1 where all that follows the proofs is encrypted."""
    host: bytes
    public: bytes
    nonce: bytes


@dataclass(frozen=True, slots=True)
class Proof:
    """Third word, and, from the other end, the fourth: that the sender knows the token, over all that was said."""

    mac: bytes


Header: TypeAlias = (
    MessageHeader | Chunk | Credit | Goodbye | Hello | Welcome | Refusal | Attach | Approach | Challenge | Proof
)

_CLASS_OF_KIND: dict[int, type[Header]] = {
    1: MessageHeader,
    2: Chunk,
    3: Credit,
    4: Goodbye,
    5: Hello,
    6: Welcome,
    7: Refusal,
    8: Attach,
    9: Approach,
    10: Challenge,
    11: Proof,
}
_KIND_OF_CLASS = {cls: kind for kind, cls in _CLASS_OF_KIND.items()}
_FIELDS_OF_CLASS = {cls: tuple(field.name for field in fields(cls)) for cls in _KIND_OF_CLASS}


def encode_header(header: Header) -> bytes:
    """Return the record as one frame.

    Raises:
        ProtocolError: a message that the protocol cannot carry: too many buffers, too long a tag.
    """
    if type(header) is MessageHeader:
        _check_message(header)
        return pack((1, header.seq, header.tag, header.sizes, header.frame_bytes))
    cls = type(header)
    return pack((_KIND_OF_CLASS[cls], *[getattr(header, name) for name in _FIELDS_OF_CLASS[cls]]))


def decode_header(frame: bytes) -> Header:
    """Return the record in a frame.

    Raises:
        ProtocolError: not a record of this protocol, or one beyond the limits.
    """
    value: Any = unpack(frame)
    if not isinstance(value, tuple) or not value or type(value[0]) is not int or value[0] not in _CLASS_OF_KIND:
        raise ProtocolError("frame is no record of this protocol", value=bytes(frame[:16]), valid=_CLASS_OF_KIND)
    cls = _CLASS_OF_KIND[value[0]]
    given: tuple[Any, ...] = value[1:]
    if tuple(map(type, given)) != _TYPES_OF_CLASS[cls]:
        wanted = ", ".join(f"{name}: {kind.__name__}" for name, kind in _named_types(cls))
        raise ProtocolError(f"{cls.__name__} has other fields", value=_short(given), valid=f"({wanted})")
    for item in given:
        if type(item) is int and item < 0:
            raise ProtocolError(f"{cls.__name__} has a number below zero", value=_short(given))
    header = cls(*given)
    if type(header) is MessageHeader:
        for size in header.sizes:
            if type(size) is not int or size < 0:
                raise ProtocolError("message has a buffer of no size", value=_short(header.sizes))
        _check_message(header)
    return header


_TYPES_OF_CLASS: dict[type[Header], tuple[type, ...]] = {
    MessageHeader: (int, str, tuple, int),
    Chunk: (int, int),
    Credit: (int,),
    Goodbye: (),
    Hello: (int, int, int, bytes),
    Welcome: (str, bytes),
    Refusal: (str,),
    Attach: (bytes, int),
    Approach: (int, int, int, bytes, int, int, int, int, int, bytes, bytes, bytes),
    Challenge: (int, int, int, bytes, bytes, bytes),
    Proof: (bytes,),
}


def _named_types(cls: type[Header]) -> zip[tuple[str, type]]:
    return zip(_FIELDS_OF_CLASS[cls], _TYPES_OF_CLASS[cls], strict=True)


def _check_message(header: MessageHeader) -> None:
    tag, sizes = header.tag, header.sizes
    if len(tag) > MAX_TAG_BYTES or (len(tag) > MAX_TAG_BYTES // 4 and len(tag.encode()) > MAX_TAG_BYTES):
        raise ProtocolError("tag is too long", value=tag[:64], valid=f"at most {MAX_TAG_BYTES} bytes of UTF-8")
    if len(sizes) > MAX_BUFFERS:
        raise ProtocolError("message has too many buffers", value=len(sizes), valid=f"at most {MAX_BUFFERS}")
    if sum(sizes) > MAX_MESSAGE_BYTES:
        raise ProtocolError("message is too long", value=sum(sizes), valid=f"at most {MAX_MESSAGE_BYTES} bytes")
    if not 1 <= header.frame_bytes <= MAX_FRAME_BYTES:
        raise ProtocolError("frame length is out of range", value=header.frame_bytes, valid=f"1 to {MAX_FRAME_BYTES}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 64 else text[:61] + "..."
