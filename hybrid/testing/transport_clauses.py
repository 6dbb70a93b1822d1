"""The clauses of the transport contract about messages, one function each; each raises where a variant breaks it.

Sleeps nowhere: each wait is for something, with a time-out. May import only `errors` and `transports`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from hybrid.errors import CommTimeout, ProtocolError
from hybrid.testing.transport_life_clauses import close, leaves, loss_is_told, meets, strangers, threads
from hybrid.testing.transport_rig import (
    Broken,
    Landing,
    Rig,
    at_once,
    demand,
    expect,
    random_message,
    transfer,
)
from hybrid.transports.base import MESSAGE_OVERHEAD_BYTES, Pending, Transport

_SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (0,),
    (1,),
    (3, 0, 5),
    (4096,),
    (65_537,),
    (70_000, 1, 0, 300_000),
    (1, 262_145, 2),
    (1_048_589,),
    (3_000_001, 7),
)
_SHORT_S = 0.1
_SLACK_S = 0.5


def whole(rig: Rig) -> None:
    """Check that messages arrive byte by byte as sent, also when the sender has used its buffers again."""
    chance = random.Random(1)
    with rig.open_pair() as (low, high):
        for sender, receiver in ((low, high), (high, low)):
            for sizes in _SHAPES:
                transfer(rig, sender, receiver, "posted first", random_message(chance, sizes))
            for sizes in _SHAPES[:-2]:
                message = random_message(chance, sizes)
                reused = [bytearray(buffer) for buffer in message]
                sender.send("sent first", reused).wait(rig.patience_s)
                for buffer in reused:
                    buffer[:] = bytes(len(buffer))
                landing = Landing(sizes)
                receiver.recv("sent first", landing.views).wait(rig.patience_s)
                landing.check(message, f"a message of {sizes} bytes")


def once(rig: Rig) -> None:
    """Check that of random traffic in both directions at once each message arrives, and none besides."""
    with rig.open_pair() as (low, high):
        traffic(rig, low, high, seed=2)
        for end in (low, high):
            landing = Landing([1])
            extra = [end.recv(tag, landing.views) for tag in "abc"]
            for pending in extra:
                with expect(CommTimeout, otherwise="a message arrived that was not sent, or arrived twice"):
                    try:
                        pending.wait(_SHORT_S)
                    except ProtocolError as error:
                        raise Broken(f"a message arrived that was not sent, or arrived twice: {error}") from None


def traffic(rig: Rig, low: Transport, high: Transport, *, seed: int, num_messages: int = 60) -> None:
    """Exchange random messages over three tags in both directions at once, receives posted at random distances."""

    def script(chance: random.Random) -> list[tuple[str, list[bytes]]]:
        sizes = [0, 1, 100, 5000, 70_000, 400_000]
        return [
            (chance.choice("abc"), random_message(chance, chance.choices(sizes, k=chance.choice([0, 1, 1, 2]))))
            for _ in range(num_messages)
        ]

    upward, downward = script(random.Random(seed)), script(random.Random(seed + 1))

    def send(end: Transport, messages: list[tuple[str, list[bytes]]]) -> None:
        for pending in [end.send(tag, message) for tag, message in messages]:
            pending.wait(rig.patience_s)

    def receive(end: Transport, messages: list[tuple[str, list[bytes]]], chance: random.Random) -> None:
        posted: list[tuple[Pending, Landing, list[bytes]]] = []
        for tag, message in messages:
            landing = Landing([len(buffer) for buffer in message])
            posted.append((end.recv(tag, landing.views), landing, message))
            while posted and chance.random() < 0.5:
                _finish(rig, posted.pop(chance.randrange(len(posted))), tag)
        for item in posted:
            _finish(rig, item, "the last ones")

    at_once(
        rig,
        lambda: send(low, upward),
        lambda: send(high, downward),
        lambda: receive(high, upward, random.Random(seed + 2)),
        lambda: receive(low, downward, random.Random(seed + 3)),
    )


def _finish(rig: Rig, item: tuple[Pending, Landing, list[bytes]], name: str) -> None:
    pending, landing, message = item
    try:
        pending.wait(rig.patience_s)
    except CommTimeout:
        raise Broken(f"a message was lost: {name}") from None
    landing.check(message, name)


def ordered(rig: Rig) -> None:
    """Check that messages of one tag come in the order of sending, the small not before the large."""
    messages = [number.to_bytes(4, "big") + bytes(1 if number % 3 else 100_000) for number in range(40)]
    with rig.open_pair() as (low, high):

        def receive() -> None:
            for message in messages:
                landing = Landing([len(message)])
                high.recv("one", landing.views).wait(rig.patience_s)
                landing.check([message], f"message {int.from_bytes(message[:4], 'big')} in order")

        def send() -> None:
            for pending in [low.send("one", [message]) for message in messages]:
                pending.wait(rig.patience_s)

        at_once(rig, send, receive)


def tagged(rig: Rig) -> None:
    """Check that a receive takes only its tag, in whatever order receives are posted and waited for."""
    tags = [f"tag {number}" for number in range(8)]
    with rig.open_pair() as (low, high):
        for posted_first in (True, False):
            landings = {tag: Landing([len(tag)]) for tag in tags}
            received: dict[str, Pending] = {}
            if posted_first:
                received = {tag: high.recv(tag, landings[tag].views) for tag in reversed(tags)}
            for tag in tags:
                low.send(tag, [tag.encode()]).wait(rig.patience_s)
            if not posted_first:
                received = {tag: high.recv(tag, landings[tag].views) for tag in reversed(tags)}
            for tag in (*tags[::2], *tags[1::2]):
                received[tag].wait(rig.patience_s)
                landings[tag].check([tag.encode()], tag)
        absent = high.recv("absent", Landing([5]).views)
        low.send("other", [b"other"]).wait(rig.patience_s)
        with expect(CommTimeout, otherwise="a receive took a message of another tag"):
            absent.wait(_SHORT_S)
        two = [Landing([1]), Landing([1])]
        first, second = (high.recv("twice", landing.views) for landing in two)
        for body in (b"1", b"2"):
            low.send("twice", [body]).wait(rig.patience_s)
        second.wait(rig.patience_s)
        first.wait(rig.patience_s)
        for landing, body in zip(two, (b"1", b"2"), strict=True):
            landing.check([body], "receives of one tag in the order of posting")


def posted_ahead(rig: Rig) -> None:
    """Check that a receive is posted before its message exists, and filled whatever this rank waits for meanwhile."""
    with rig.open_nodes(3) as (low, middle, high):
        below, middle_to_low = rig.join(low, middle)
        middle_to_high, above = rig.join(middle, high)
        landings = [Landing([1000]) for _ in range(4)]
        ahead: list[Pending] = []
        for number, landing in enumerate(landings):
            began_s = time.monotonic()
            ahead.append(middle_to_low.recv(f"{number}", landing.views))
            demand(time.monotonic() - began_s < _SLACK_S, "recv does not return before the message was sent")
        demand(not any(pending.done() for pending in ahead), "a receive is done before its message was sent")
        for number in reversed(range(4)):
            below.send(f"{number}", [bytes([number]) * 1000]).wait(rig.patience_s)
        for number, pending in enumerate(ahead):
            pending.wait(rig.patience_s)
            demand(pending.done(), "a receive that was waited for is not done")
            landings[number].check([bytes([number]) * 1000], f"receive {number} that was posted ahead")
        # Rank 1 waits for rank 0 alone; rank 2's message is larger than the window and must get through meanwhile.
        large = bytes(3 * rig.window_bytes)
        landing = Landing([len(large)])
        from_high, from_low = middle_to_high.recv("large", landing.views), middle_to_low.recv("go on", [])

        def push() -> None:
            try:
                above.send("large", [large]).wait(rig.patience_s)
            except CommTimeout:
                raise Broken("a posted receive is not filled while its rank waits for another") from None
            finally:
                below.send("go on", []).wait(rig.patience_s)

        at_once(rig, push, lambda: from_low.wait(3 * rig.patience_s))
        from_high.wait(rig.patience_s)
        landing.check([large], "a message larger than the window")


def window(rig: Rig) -> None:
    """Check that sends end at once up to the window and block beyond it; nobody blocks for ever."""
    with rig.open_pair() as (low, high):
        for body_bytes in (rig.window_bytes // 16, 0, rig.window_bytes // 3):
            _fill_and_drain(rig, low, high, body_bytes)
        transfer(rig, low, high, "larger than the window", [bytes(range(256)) * (rig.window_bytes // 64)])
        large = bytes(3 * rig.window_bytes)
        landings = [Landing([len(large)]), Landing([len(large)])]
        received = [end.recv("across", landing.views) for end, landing in zip((low, high), landings, strict=True)]

        def exchange(end: Transport, arrival: Pending) -> None:
            end.send("across", [large]).wait(rig.patience_s)
            arrival.wait(rig.patience_s)

        at_once(rig, lambda: exchange(low, received[0]), lambda: exchange(high, received[1]))


def _fill_and_drain(rig: Rig, sender: Transport, receiver: Transport, body_bytes: int) -> None:
    weight = body_bytes + MESSAGE_OVERHEAD_BYTES
    sent: list[Pending] = []

    def body(number: int) -> list[bytes]:
        return [number.to_bytes(4, "big").ljust(body_bytes, b"\x07")] if body_bytes else []

    try:
        for number in range(rig.window_bytes // weight):
            sent.append(sender.send("fill", body(number)))
            sent[-1].wait(rig.patience_s)
    except CommTimeout:
        raise Broken(f"a send waits for the receiver after {len(sent)} messages, well inside the window") from None
    try:
        while len(sent) * weight < 4 * rig.window_bytes:
            sent.append(sender.send("fill", body(len(sent))))
            sent[-1].wait(_SHORT_S)
        raise Broken(f"{len(sent)} messages of {body_bytes} bytes, four windows, were taken and nobody received one")
    except CommTimeout:
        demand(not sent[-1].done(), "a send that timed out calls itself done")

    def drain() -> None:
        landing = Landing([body_bytes] if body_bytes else [])
        for number in range(len(sent)):
            receiver.recv("fill", landing.views).wait(rig.patience_s)
            landing.check(body(number), f"message {number} behind a full window")

    at_once(rig, drain, lambda: sent[-1].wait(rig.patience_s))


def fits(rig: Rig) -> None:
    """Check that a message of other sizes than posted is refused at its receive alone and hurts nothing."""
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]] = [
        ((10,), (9,)),
        ((9,), (10,)),
        ((10,), (5, 5)),
        ((5, 5), (10,)),
        ((), (1,)),
        ((1,), ()),
        ((0,), ()),
        ((300_000,), (299_999,)),
        ((100_000, 200_000), (100_000, 199_999)),
    ]
    with rig.open_pair() as (low, high):
        for posted_first in (True, False):
            for sizes, room in pairs:
                landing = Landing(room)
                message = [b"\x5a" * size for size in sizes]
                if posted_first:
                    received = high.recv("misfit", landing.views)
                    low.send("misfit", message).wait(rig.patience_s)
                else:
                    low.send("misfit", message).wait(rig.patience_s)
                    received = high.recv("misfit", landing.views)
                with expect(ProtocolError, otherwise=f"a message of {sizes} bytes was taken for one of {room}"):
                    received.wait(rig.patience_s)
                landing.check_guards()
                transfer(rig, low, high, "misfit", [b"goes on"])


def bounded_waits(rig: Rig) -> None:
    """Check that a wait ends within its time-out, and may be repeated until the message is there."""
    with rig.open_pair() as (low, high):
        landing = Landing([4])
        received = high.recv("late", landing.views)
        for timeout_s in (0.0, _SHORT_S, _SHORT_S):
            began_s = time.monotonic()
            with expect(CommTimeout, otherwise="a wait for a message that was never sent returned"):
                received.wait(timeout_s)
            took_s = time.monotonic() - began_s
            demand(timeout_s - 0.01 <= took_s <= timeout_s + _SLACK_S, f"a wait of {timeout_s} s took {took_s:.2f} s")
            demand(not received.done(), "a receive that timed out calls itself done")
        low.send("late", [b"here"]).wait(rig.patience_s)
        for _ in range(2):
            received.wait(rig.patience_s)
        landing.check([b"here"], "the message that was waited for again")


CHECK_OF_CLAUSE: dict[str, Callable[[Rig], None]] = {
    "whole": whole,
    "once": once,
    "ordered": ordered,
    "tagged": tagged,
    "posted ahead": posted_ahead,
    "window": window,
    "fits": fits,
    "bounded waits": bounded_waits,
    "loss is told": loss_is_told,
    "close": close,
    "threads": threads,
    "meets": meets,
    "strangers": strangers,
    "leaves": leaves,
}
"""By name, in the contract's order."""
