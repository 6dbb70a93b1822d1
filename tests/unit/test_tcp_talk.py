"""What two ends of a TCP connection say first, and the seals that come of it: no socket."""

import pytest

from hybrid.errors import ProtocolError
from hybrid.transports.tcp_secret import TAG_BYTES, Seal
from hybrid.transports.tcp_socket import TcpOptions, parse_address
from hybrid.transports.tcp_talk import LENGTH_BYTES, Bond, Dialing, Listening, word_of
from hybrid.wire import Approach, Challenge, Proof, Refusal, decode_header

TOKEN = b"the job's token!"


def _options(token: bytes = TOKEN, **changes: object) -> TcpOptions:
    return TcpOptions(token=token, **changes)  # type: ignore[arg-type]


def _dialing(options: TcpOptions, *, near: bool = False, rank: int = 0, peer: int = 1) -> Dialing:
    return Dialing(options, rank=rank, peer=peer, edge=bytes(16), stream=0, num_streams=1, near=near)


def _talk(dialer: TcpOptions, listener: TcpOptions, *, near: bool) -> tuple[Bond, Bond, list[bytes]]:
    """Return both ends' bonds and the four words."""
    dialing, listening = _dialing(dialer, near=near), Listening(listener, rank=1, near=near)
    challenge = listening.challenge(dialing.approach[LENGTH_BYTES:])
    proof = dialing.answer(challenge[LENGTH_BYTES:])
    listened, answer = listening.end(proof[LENGTH_BYTES:])
    return dialing.end(answer[LENGTH_BYTES:]), listened, [dialing.approach, challenge, proof, answer]


def _closed(seal: Seal, plain: bytes, beside: bytes = b"") -> bytearray:
    sealed = bytearray(len(plain) + TAG_BYTES)
    seal.close_into(memoryview(sealed), plain, beside)
    return sealed


def _opened(seal: Seal, sealed: bytes | bytearray, beside: bytes = b"") -> bytes:
    plain = bytearray(len(sealed) - TAG_BYTES)
    seal.open_into(memoryview(plain), memoryview(sealed), beside)
    return bytes(plain)


def test_between_hosts_both_ends_get_keys_that_open_each_others_frames():
    dialed, listened, _ = _talk(_options(), _options(), near=False)
    assert dialed.seals is not None
    assert listened.seals is not None
    for sender, receiver in ((dialed.seals[0], listened.seals[1]), (listened.seals[0], dialed.seals[1])):
        for text in (b"one", b"two", bytes(100_000)):
            sealed = _closed(sender, text, b"prefix")
            assert text[:50] not in sealed
            assert _opened(receiver, sealed, b"prefix") == text


@pytest.mark.parametrize("who", ["dialer", "listener"])
def test_inside_one_host_frames_are_plain_unless_either_end_demands_seals(who: str):
    plain, plain_too, _ = _talk(_options(), _options(), near=True)
    assert plain.seals is None is plain_too.seals
    strict = _options(must_seal=True)
    dialed, listened, _ = _talk(*((strict, _options()) if who == "dialer" else (_options(), strict)), near=True)
    assert dialed.seals is not None
    assert listened.seals is not None


def test_the_smaller_window_and_frame_hold():
    small, large = _options(window_bytes=1 << 20, frame_bytes=1 << 20), _options(frame_bytes=1 << 17)
    for dialer, listener in ((small, large), (large, small)):
        for bond in _talk(dialer, listener, near=False)[:2]:
            assert (bond.window_bytes, bond.frame_bytes) == (1 << 20, 1 << 17)


def test_the_token_is_in_no_word_and_no_two_talks_are_alike():
    *_, words = _talk(_options(), _options(), near=False)
    *_, others = _talk(_options(), _options(), near=False)
    assert not any(TOKEN in word for word in words)
    assert not set(words) & set(others)


def test_a_peer_without_the_token_is_refused_by_either_end():
    dialing, listening = _dialing(_options(b"another")), Listening(_options(), rank=1, near=False)
    proof = dialing.answer(listening.challenge(dialing.approach[LENGTH_BYTES:])[LENGTH_BYTES:])
    with pytest.raises(ProtocolError, match="another job's token"):
        listening.end(proof[LENGTH_BYTES:])
    dialing = _dialing(_options())
    dialing.answer(Listening(_options(b"another"), rank=1, near=False).challenge(dialing.approach[LENGTH_BYTES:])[2:])
    with pytest.raises(ProtocolError, match="does not know the job's token"):
        dialing.end(word_of(Proof(bytes(32)))[LENGTH_BYTES:])


def test_a_recorded_talk_is_of_no_use_a_second_time():
    *_, (approach, challenge, proof, answer) = _talk(_options(), _options(), near=False)
    listening = Listening(_options(), rank=1, near=False)
    listening.challenge(approach[LENGTH_BYTES:])
    with pytest.raises(ProtocolError):
        listening.end(proof[LENGTH_BYTES:])
    dialing = _dialing(_options())
    dialing.answer(challenge[LENGTH_BYTES:])
    with pytest.raises(ProtocolError):
        dialing.end(answer[LENGTH_BYTES:])


def test_a_proof_reflected_to_who_gave_it_proves_nothing():
    dialing, listening = _dialing(_options()), Listening(_options(), rank=1, near=False)
    proof = dialing.answer(listening.challenge(dialing.approach[LENGTH_BYTES:])[LENGTH_BYTES:])
    with pytest.raises(ProtocolError):
        dialing.end(proof[LENGTH_BYTES:])


def test_who_changes_a_word_between_two_honest_ends_is_noticed():
    for field in ("window_bytes", "sealed"):
        dialing, listening = _dialing(_options(), near=True), Listening(_options(must_seal=True), rank=1, near=True)
        challenge = decode_header(listening.challenge(dialing.approach[LENGTH_BYTES:])[LENGTH_BYTES:])
        assert isinstance(challenge, Challenge)
        values = {name: getattr(challenge, name) for name in Challenge.__slots__} | {field: 0}
        with pytest.raises(ProtocolError):
            listening.end(dialing.answer(word_of(Challenge(**values))[LENGTH_BYTES:])[LENGTH_BYTES:])


def test_a_dialer_never_agrees_to_leave_in_the_clear_what_leaves_its_host():
    far, near = _dialing(_options(), near=False), Listening(_options(), rank=1, near=True)
    with pytest.raises(ProtocolError, match="in the clear"):
        far.answer(word_of(Challenge(1 << 20, 1 << 18, 0, bytes(32), bytes(32), bytes(32)))[LENGTH_BYTES:])
    sealed = decode_header(near.challenge(far.approach[LENGTH_BYTES:])[LENGTH_BYTES:])
    assert isinstance(sealed, Challenge)
    elsewhere = word_of(Challenge(1 << 20, 1 << 18, 0, b"another host".ljust(32), bytes(32), bytes(32)))
    with pytest.raises(ProtocolError, match="in the clear"):
        _dialing(_options(), near=True).answer(elsewhere[LENGTH_BYTES:])


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99},
        {"to_rank": 2},
        {"rank": 1},
        {"stream": 1},
        {"num_streams": 1000, "stream": 999},
        {"edge": b"short"},
        {"nonce": b""},
        {"public": b"x" * 31},
        {"window_bytes": 1},
        {"frame_bytes": 0},
    ],
)
def test_an_approach_that_no_honest_peer_makes_is_refused(change: dict[str, object]):
    honest = decode_header(_dialing(_options()).approach[LENGTH_BYTES:])
    assert isinstance(honest, Approach)
    values = {name: getattr(honest, name) for name in Approach.__slots__} | change
    with pytest.raises(ProtocolError):
        Listening(_options(), rank=1, near=False).challenge(word_of(Approach(**values))[LENGTH_BYTES:])


def test_a_refusal_is_told_with_its_reason():
    with pytest.raises(ProtocolError, match="refuses: because"):
        _dialing(_options()).answer(word_of(Refusal("because"))[LENGTH_BYTES:])


def test_a_sealed_piece_opens_once_in_its_turn_unaltered_and_whole():
    dialed, listened, _ = _talk(_options(), _options(), near=False)
    assert dialed.seals is not None
    assert listened.seals is not None
    sender = dialed.seals[0]
    pieces = [_closed(sender, bytes([number]) * 20, b"beside") for number in range(3)]
    flipped = bytes([pieces[0][0] ^ 1]) + bytes(pieces[0][1:])
    wrong = [(pieces[1], b"beside"), (flipped, b"beside"), (pieces[0][:-1], b"beside"), (pieces[0], b"other")]
    for sealed, beside in wrong:
        fresh = Seal.__new__(Seal)
        fresh._cipher, fresh._next = listened.seals[1]._cipher, listened.seals[1]._next
        with pytest.raises(ProtocolError, match="not the peer's next"):
            _opened(fresh, sealed, beside)
    assert _opened(listened.seals[1], pieces[0], b"beside") == bytes(20)
    with pytest.raises(ProtocolError):
        _opened(listened.seals[1], pieces[0], b"beside")


@pytest.mark.parametrize(
    "address", ["", "inproc://0", "tcp://", "tcp://h", "tcp://h:x", "tcp://:1", "tcp://h:0", "ipc://x"]
)
def test_an_address_of_another_medium_is_refused(address: str):
    with pytest.raises(ProtocolError, match="no address"):
        parse_address(address)


def test_addresses_name_a_host_and_a_port():
    assert parse_address("tcp://10.0.0.1:80") == ("10.0.0.1", 80)
    assert parse_address("tcp://[::1]:65535") == ("::1", 65535)
