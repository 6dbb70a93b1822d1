"""A worker's line to the coordinator: one thread that owns the socket, sends heartbeats and hears the orders.

The compute thread puts messages in and takes orders out; it never touches the socket. When the coordinator orders an
abort or falls silent, `on_abort` is called from this thread: it closes the transports, which ends every wait.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from hybrid.errors import CommTimeout, PeerLost
from hybrid.runtime.messages import (
    MAX_CONTROL_BYTES,
    Abort,
    Alive,
    ControlAddress,
    Heartbeat,
    Message,
    Shutdown,
    decode,
    encode,
)


@dataclass(frozen=True, slots=True)
class _Stop:
    """Ends the control thread once the queue before it is sent."""


class ControlLine:
    """The worker's end of the control plane.

    Args:
        on_abort: called once, with the reason, on an abort or when the coordinator has been silent for `silence_s`.
    """

    def __init__(
        self,
        address: ControlAddress,
        rank: int,
        *,
        heartbeat_s: float,
        silence_s: float,
        on_abort: Callable[[str], None],
    ) -> None:
        self._address, self._rank = address, rank
        self._heartbeat_s, self._silence_s = heartbeat_s, silence_s
        self._on_abort = on_abort
        self._outbox: queue.SimpleQueue[Message | _Stop] = queue.SimpleQueue()
        self._orders: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.step = -1
        """The step under way; told with each heartbeat."""
        self.aborted: str | None = None
        self._context = zmq.Context()
        self._bell = self._context.socket(zmq.PAIR)
        self._bell.bind("inproc://bell")
        self._bell_lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name=f"control-{rank}", daemon=True)
        self._thread.start()

    def tell(self, message: Message) -> None:
        """Queue a message to the coordinator; never blocks."""
        self._outbox.put(message)
        self._ring()

    def await_order(self, kind: type[Message], *, timeout_s: float) -> Message:
        """Return the next order of this kind.

        Raises:
            CommTimeout: it did not come in time.
            PeerLost: the job was aborted meanwhile.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            if self.aborted is not None:
                raise PeerLost(f"job aborted: {self.aborted}")
            try:
                order = self._orders.get(timeout=min(0.5, max(0.0, deadline - time.monotonic())))
            except queue.Empty:
                if time.monotonic() >= deadline:
                    raise CommTimeout(f"no {kind.__name__} from the coordinator within {timeout_s:.0f} s") from None
                continue
            if isinstance(order, kind):
                return order

    def close(self) -> None:
        """Send what is queued and end the thread; idempotent."""
        if self._thread.is_alive():
            self._outbox.put(_Stop())
            self._ring()
            self._thread.join(timeout=5.0)
        with self._bell_lock:
            self._bell.close(0)
        self._context.term()

    def _ring(self) -> None:
        with self._bell_lock:
            if self._bell.closed:
                return
            # A full bell rings already.
            with contextlib.suppress(zmq.Again):
                self._bell.send(b"", zmq.NOBLOCK)

    def _serve(self) -> None:
        line = self._context.socket(zmq.DEALER)
        bell = self._context.socket(zmq.PAIR)
        try:
            line.setsockopt(zmq.LINGER, 2000)
            line.setsockopt(zmq.MAXMSGSIZE, MAX_CONTROL_BYTES)
            public, secret = zmq.curve_keypair()
            line.curve_secretkey, line.curve_publickey, line.curve_serverkey = (
                secret,
                public,
                self._address.server_key,
            )
            line.connect(self._address.endpoint)
            bell.connect("inproc://bell")
            self._loop(line, bell)
        finally:
            line.close()
            bell.close(0)

    def _loop(self, line: zmq.Socket[bytes], bell: zmq.Socket[bytes]) -> None:
        poller = zmq.Poller()
        poller.register(line, zmq.POLLIN)
        poller.register(bell, zmq.POLLIN)
        heard_s = beat_s = time.monotonic()
        while True:
            ready = dict(poller.poll(int(self._heartbeat_s * 1000)))
            now_s = time.monotonic()
            if bell in ready:
                bell.recv()
            while line in ready:
                try:
                    data = line.recv(zmq.NOBLOCK)
                except zmq.Again:
                    break
                heard_s = now_s
                self._hear(decode(data))
            while True:
                try:
                    message = self._outbox.get_nowait()
                except queue.Empty:
                    break
                if isinstance(message, _Stop):
                    return
                line.send(encode(message))
            if now_s - beat_s >= self._heartbeat_s:
                beat_s = now_s
                line.send(encode(Heartbeat(rank=self._rank, step=self.step)))
            if now_s - heard_s > self._silence_s:
                self._abort(f"the coordinator has been silent for {now_s - heard_s:.0f} s")
                heard_s = float("inf")

    def _hear(self, order: Message) -> None:
        match order:
            case Alive():
                pass
            case Abort(reason=reason):
                self._abort(reason)
            case _:
                self._orders.put(order)
        if isinstance(order, Shutdown):
            self._silence_s = float("inf")

    def _abort(self, reason: str) -> None:
        if self.aborted is None:
            self.aborted = reason
            self._on_abort(reason)
