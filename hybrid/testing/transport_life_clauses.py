"""The clauses of the transport contract about the life of nodes and edges: loss, close, threads, meeting.

As in `transport_clauses.py`, where the table of all clauses is. May import only `errors` and `transports`.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from hybrid.errors import CommTimeout, PeerLost, ProtocolError
from hybrid.testing.transport_rig import (
    TOKEN,
    Broken,
    Landing,
    Rig,
    at_once,
    demand,
    expect,
    random_message,
    transfer,
)
from hybrid.transports.base import Pending, Transport, TransportNode

_SHORT_S = 0.1
_SLACK_S = 0.5


def loss_is_told(rig: Rig) -> None:
    """Check that after an orderly close what was sent comes, then PeerLost; after a kill, PeerLost."""
    chance = random.Random(3)
    for leaver_is_low in (True, False):
        with rig.open_pair() as (low, high):
            leaver, stayer = (low, high) if leaver_is_low else (high, low)
            messages = [random_message(chance, sizes) for sizes in ((10,), (rig.window_bytes // 3, 5), ())]
            never = stayer.recv("never", [])
            for message in messages:
                leaver.send("last words", message).wait(rig.patience_s)
            leaver.close()
            _demand_lost(never, rig.loss_s, "a receive whose peer has closed")
            for message in messages:
                landing = Landing([len(buffer) for buffer in message])
                stayer.recv("last words", landing.views).wait(rig.patience_s)
                landing.check(message, "what was sent before the close")
            _demand_lost(stayer.recv("last words", []), rig.loss_s, "a receive posted after the peer closed")
            with expect(PeerLost, otherwise="a send to a peer that has closed went well"):
                stayer.send("too late", [b"x"]).wait(rig.loss_s)
    if rig.processes:
        at_once(rig, lambda: _kill_peer(rig, 0), lambda: _kill_peer(rig, 2))


def _demand_lost(pending: Pending, within_s: float, what: str) -> None:
    with expect(PeerLost, otherwise=f"{what} went well"):
        try:
            pending.wait(within_s)
        except CommTimeout:
            raise Broken(f"{what} was not told so within {within_s} s") from None


def _kill_peer(rig: Rig, rank: int) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    node = rig.node(1)
    child = context.Process(target=_live_until_killed, args=(rig.open_node, rank, rig.window_bytes, there), daemon=True)
    try:
        child.start()
        here.send(node.address)
        demand(here.poll(30.0), "the peer's process did not start")
        edge = rig.wrap(node.open(rank, here.recv(), timeout_s=30.0))
        edge.recv("alive", []).wait(30.0)
        waiting, sending = edge.recv("never", []), edge.send("unread", [bytes(3 * rig.window_bytes)])
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        _demand_lost(waiting, rig.loss_s, "a receive whose peer was killed")
        _demand_lost(sending, rig.loss_s, "a send whose peer was killed")
    finally:
        child.kill()
        child.join()
        here.close()
        there.close()
        node.close()


def _live_until_killed(
    open_node: Callable[..., TransportNode], rank: int, window_bytes: int, pipe: multiprocessing.connection.Connection
) -> None:
    """Greet, then wait; run in the process that is killed."""
    node = open_node(rank, token=TOKEN, window_bytes=window_bytes)
    pipe.send(node.address)
    edge = node.open(1, pipe.recv(), timeout_s=30.0)
    edge.send("alive", []).wait(30.0)
    edge.recv("never", []).wait(60.0)


def close(rig: Rig) -> None:
    """Check that closing twice is closing once, ends what is pending, and gives back what the medium took."""
    with rig.open_pair() as (low, high):  # What a library opens once and keeps is open after this.
        transfer(rig, low, high, "warm", [bytes(300_000)])
    before = _resources()
    with rig.open_pair() as (low, _high):
        idle = low.recv("idle", [])
        waited_for = low.recv("waited for", [])
        blocked = low.send("blocked", [bytes(4 * rig.window_bytes)])
        told = threading.Event()

        def wait() -> None:
            try:
                waited_for.wait(rig.patience_s)
            except PeerLost:
                told.set()
            except CommTimeout:
                pass

        waiter = threading.Thread(target=wait, daemon=True)
        waiter.start()
        low.close()
        low.close()
        for pending, name in ((idle, "receive"), (blocked, "send")):
            _demand_lost(pending, rig.patience_s, f"a {name} that was pending when its end closed")
        demand(told.wait(rig.patience_s), "a wait in another thread was not ended by the close")
        waiter.join()
        with expect(PeerLost, otherwise="a send over a closed edge went well"):
            low.send("closed", []).wait(rig.patience_s)
        _demand_lost(low.recv("closed", []), rig.patience_s, "a receive over a closed edge")
    deadline_s = time.monotonic() + rig.patience_s
    while _resources() > before and time.monotonic() < deadline_s:
        threading.Event().wait(0.01)
    for kind, (now, then) in {kind: (_resources()[kind], before[kind]) for kind in before}.items():
        demand(now <= then, f"close left {now - then} more {kind} than there were")


class _Counts(dict[str, int]):
    def __gt__(self, other: dict[str, int]) -> bool:
        return any(self[kind] > other[kind] for kind in self)


def _resources() -> _Counts:
    """Count what a transport could leave behind (Linux)."""
    folders = {"open files": "/proc/self/fd", "threads": "/proc/self/task", "shared-memory segments": "/dev/shm"}
    return _Counts({kind: sum(1 for _ in Path(folder).iterdir()) for kind, folder in folders.items()})


def threads(rig: Rig) -> None:
    """Check that threads that send and threads that wait at the same end do not disturb each other."""
    with rig.open_pair() as (low, high):
        last = low.recv("last", [])

        def work(end: Transport, tag: str, sending: bool) -> None:
            for number in range(60):
                body = number.to_bytes(4, "big") * (1 if number % 10 else 20_000)
                if sending:
                    end.send(tag, [body]).wait(rig.patience_s)
                else:
                    landing = Landing([len(body)])
                    end.recv(tag, landing.views).wait(rig.patience_s)
                    landing.check([body], f"message {number} of one of several threads")

        jobs = [
            (end, tag, sending)
            for tag, sender in (("a", low), ("b", low), ("c", high))
            for end, sending in ((sender, True), (high if sender is low else low, False))
        ]
        at_once(
            rig,
            lambda: last.wait(3 * rig.patience_s),
            lambda: (
                at_once(rig, *[lambda job=job: work(*job) for job in jobs]),
                high.send("last", []).wait(rig.patience_s),
            )[1],
        )


def meets(rig: Rig) -> None:
    """Check that ends open in any order, round a ring too, and again after a close, or time out."""
    gone = rig.node(8)
    gone.close()
    with rig.open_nodes(3) as nodes:
        began_s = time.monotonic()
        for node, absent in ((nodes[0], 8), (nodes[1], 0)):
            with expect(CommTimeout, otherwise="an edge was opened to a peer that never opened its end"):
                _ = node.open(absent, gone.address, timeout_s=_SHORT_S)
        demand(time.monotonic() - began_s < 4 * _SHORT_S + 2 * _SLACK_S, "open did not keep its time-out")

        def round_the_ring(node: TransportNode) -> list[Transport]:
            peers = [nodes[(node.rank + step) % 3] for step in (1, 2)]
            return [node.open(peer.rank, peer.address, timeout_s=rig.patience_s) for peer in peers]

        for turn in range(2):
            edges = at_once(rig, *[lambda node=node: round_the_ring(node) for node in nodes])
            for rank in range(3):
                following, before = edges[rank][0], edges[(rank + 1) % 3][1]
                transfer(rig, following, before, f"turn {turn}", [b"round"])
            for edge in (edge for ends in edges for edge in ends):
                edge.close()


def strangers(rig: Rig) -> None:
    """Check that another job's rank and a wrong rank are refused and listed, and the honest peer gets in."""
    with rig.open_nodes(3) as (low, high, other):
        stranger = rig.node(0, token=b"another job's token")
        try:
            landed: list[Transport] = []

            def knock() -> None:
                for knocker, target in ((stranger, high), (low, other)):
                    with expect(ProtocolError, otherwise="a stranger was let in"):
                        knocker.open(1, target.address, timeout_s=rig.patience_s)
                landed.append(low.open(1, high.address, timeout_s=rig.patience_s))

            def wait_for_one() -> None:
                with expect(CommTimeout, otherwise="rank 2 met a rank that never asked for it"):
                    other.open(0, low.address, timeout_s=_SHORT_S)

            at_once(
                rig,
                knock,
                lambda: landed.append(high.open(0, low.address, timeout_s=rig.patience_s)),
                wait_for_one,
            )
            demand(len(high.refused) == 1, f"one stranger was refused and these are listed: {high.refused}")
            transfer(rig, landed[0], landed[1], "honest", [b"welcome"])
        finally:
            stranger.close()


def leaves(rig: Rig) -> None:
    """Check that closing a node, from two threads at once, ends the opens under way."""
    gone = rig.node(2)
    gone.close()
    with rig.open_nodes(2) as (low, high):
        outcomes: list[str] = []

        def open_in_vain(peer: int, address: str) -> None:
            try:
                high.open(peer, address, timeout_s=6 * rig.patience_s)
                outcomes.append("an edge to nobody")
            except PeerLost:
                outcomes.append("PeerLost")

        absent = ((0, low.address), (2, gone.address))
        opening = [threading.Thread(target=open_in_vain, args=peer, daemon=True) for peer in absent]
        for thread in opening:
            thread.start()
        threading.Event().wait(0.05)  # for both to be inside their opens; the clause holds if they are not, too
        at_once(rig, high.close, high.close)
        for thread in opening:
            thread.join(rig.patience_s)
        demand(not any(thread.is_alive() for thread in opening), "an open went on after its node was closed")
        demand(outcomes == ["PeerLost"] * 2, f"closing a node ended two opens with {outcomes}")
