"""What two ends say to each other before their first frame: four words, after which each knows that the other is of
the job, and whether and with which keys the connection is sealed.

    the end that dials                       the end that listens
    Approach: who, for whom, random      →
                                         ←   Challenge: random, sealed or not     (or Refusal)
    Proof: of the token, over all said   →
                                         ←   Proof, over all said                 (or Refusal)

Pure but for random numbers: bytes in, bytes out. May import only `errors`, `wire` and this folder's pure files.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import final

from hybrid.errors import ProtocolError
from hybrid.transports.base import MIN_WINDOW_BYTES
from hybrid.transports.tcp_secret import DIALER, LISTENER, NONCE_BYTES, Half, Seal, host_name, proof, proves, seal_of
from hybrid.transports.tcp_socket import MAX_STREAMS, TcpOptions
from hybrid.wire import PROTOCOL_VERSION, Approach, Challenge, Header, Proof, Refusal, decode_header, encode_header

MAX_WORD_BYTES = 1024
SEALED_FRAME_BYTES = 1 << 20
"""Longest frame that is sealed: what stays in a core's cache between the cipher and the kernel."""
_LENGTH = struct.Struct("!H")
LENGTH_BYTES = _LENGTH.size


@dataclass(frozen=True, slots=True)
class Bond:
    """What a talk ends in."""

    window_bytes: int
    frame_bytes: int
    seals: tuple[Seal, Seal] | None
    """What closes what this end writes, and opens what it reads; None where both ends are on one host."""


def word_of(record: Header) -> bytes:
    """Return a record as a word on the wire."""
    body = encode_header(record)
    return _LENGTH.pack(len(body)) + body


def length_of(head: bytes) -> int:
    """Return how long the word is that begins so.

    Raises:
        ProtocolError: longer than any word.
    """
    (length,) = _LENGTH.unpack(head)
    if not 0 < length <= MAX_WORD_BYTES:
        raise ProtocolError("a word at the door is too long", value=length, valid=f"1 to {MAX_WORD_BYTES} bytes")
    return int(length)


def _terms(ours: TcpOptions, theirs: Approach | Challenge, *, sealed: bool) -> tuple[int, int]:
    window_bytes = min(ours.window_bytes, theirs.window_bytes)
    if window_bytes < MIN_WINDOW_BYTES or not theirs.frame_bytes:
        raise ProtocolError("the peer has too small a window", value=theirs.window_bytes)
    frame_bytes = min(ours.frame_bytes, theirs.frame_bytes, window_bytes // 4)
    return window_bytes, min(frame_bytes, SEALED_FRAME_BYTES) if sealed else frame_bytes


@final
class Dialing:
    """One talk, seen from the end that dials."""

    def __init__(
        self, options: TcpOptions, *, rank: int, peer: int, edge: bytes, stream: int, num_streams: int, near: bool
    ) -> None:
        self._options, self._near, self._half = options, near, Half()
        approach = Approach(
            version=PROTOCOL_VERSION,
            rank=rank,
            to_rank=peer,
            edge=edge,
            stream=stream,
            num_streams=num_streams,
            window_bytes=options.window_bytes,
            frame_bytes=options.frame_bytes,
            must_seal=int(options.must_seal),
            host=host_name(options.token),
            public=self._half.public,
            nonce=self._half.nonce,
        )
        self.approach = word_of(approach)
        self._said = self.approach
        self._challenge: Challenge | None = None

    def answer(self, word: bytes) -> bytes:
        """Return the proof that answers the challenge.

        Raises:
            ProtocolError: refused; or no challenge; or one that would leave in the clear what leaves the host.
        """
        match decode_header(word):
            case Challenge() as challenge:
                pass
            case Refusal(reason):
                raise ProtocolError(f"the peer refuses: {reason}", fix="start every rank from the same job and release")
            case other:
                raise ProtocolError(f"a {type(other).__name__} where a Challenge belongs")
        plain_is_safe = self._near and not self._options.must_seal and challenge.host == host_name(self._options.token)
        if challenge.sealed != 1 and not (challenge.sealed == 0 and plain_is_safe):
            raise ProtocolError("the peer would send in the clear what leaves this host", value=challenge.sealed)
        self._challenge = challenge
        self._said += word
        return word_of(Proof(proof(self._options.token, DIALER, self._said)))

    def end(self, word: bytes) -> Bond:
        """Return what the talk ends in.

        Raises:
            ProtocolError: refused, or the peer has not proven that it knows the token.
        """
        assert self._challenge is not None, "a talk ends after its challenge"
        match decode_header(word):
            case Proof(mac) if proves(mac, self._options.token, LISTENER, self._said):
                pass
            case Refusal(reason):
                raise ProtocolError(f"the peer refuses: {reason}", fix="start every rank from the same job and release")
            case _:
                raise ProtocolError("the peer does not know the job's token")
        window_bytes, frame_bytes = _terms(self._options, self._challenge, sealed=bool(self._challenge.sealed))
        if not self._challenge.sealed:
            return Bond(window_bytes, frame_bytes, None)
        shared, token = self._half.join(self._challenge.public), self._options.token
        ours, theirs = (seal_of(role, token, shared, self._said) for role in (DIALER, LISTENER))
        return Bond(window_bytes, frame_bytes, (ours, theirs))


@final
class Listening:
    """One talk, seen from the end that listens."""

    def __init__(self, options: TcpOptions, *, rank: int, near: bool) -> None:
        self._options, self._rank, self._near = options, rank, near
        self.approach: Approach | None = None
        self._said = b""
        self._sealed = True
        self._half = Half()

    def challenge(self, word: bytes) -> bytes:
        """Return the challenge to whoever approaches.

        Raises:
            ProtocolError: another version or rank, or no approach at all; nothing was done for it yet.
        """
        approach, token = decode_header(word), self._options.token
        if not isinstance(approach, Approach):
            raise ProtocolError(f"a {type(approach).__name__} where an Approach belongs")
        if approach.version != PROTOCOL_VERSION:
            raise ProtocolError(f"protocol version {approach.version} where {PROTOCOL_VERSION} is spoken")
        if approach.to_rank != self._rank or approach.rank >= self._rank:
            raise ProtocolError(f"rank {approach.rank} asks for rank {approach.to_rank} and this is rank {self._rank}")
        if not 0 <= approach.stream < approach.num_streams <= MAX_STREAMS or len(approach.edge) != 16:
            raise ProtocolError("a stream of no edge", value=(approach.stream, approach.num_streams))
        if len(approach.nonce) != NONCE_BYTES or len(approach.public) != NONCE_BYTES:
            raise ProtocolError("an approach without its random numbers")
        _terms(self._options, approach, sealed=True)
        ours = host_name(token)
        plain_is_safe = self._near and approach.host == ours
        self._sealed = bool(approach.must_seal or self._options.must_seal or not plain_is_safe)
        challenge = Challenge(
            window_bytes=self._options.window_bytes,
            frame_bytes=self._options.frame_bytes,
            sealed=int(self._sealed),
            host=ours,
            public=self._half.public,
            nonce=self._half.nonce,
        )
        answer = word_of(challenge)
        self.approach, self._said = approach, _LENGTH.pack(len(word)) + word + answer[LENGTH_BYTES:]
        return answer

    def end(self, word: bytes) -> tuple[Bond, bytes]:
        """Return what the talk ends in, and this end's proof, for the peer.

        Raises:
            ProtocolError: whoever approached has not proven that it knows the token.
        """
        assert self.approach is not None, "a talk ends after its challenge"
        said, token, record = self._said, self._options.token, decode_header(word)
        if not isinstance(record, Proof) or not proves(record.mac, token, DIALER, said):
            raise ProtocolError("another job's token")
        window_bytes, frame_bytes = _terms(self._options, self.approach, sealed=self._sealed)
        answer = word_of(Proof(proof(token, LISTENER, said)))
        if not self._sealed:
            return Bond(window_bytes, frame_bytes, None), answer
        shared = self._half.join(self.approach.public)
        ours, theirs = (seal_of(role, token, shared, said) for role in (LISTENER, DIALER))
        return Bond(window_bytes, frame_bytes, (ours, theirs)), answer
