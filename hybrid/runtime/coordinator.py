"""The coordinator: an asyncio loop over one ROUTER socket that feeds the ledger and carries out its effects.

Lives in the driver. No tensor passes here. The socket is encrypted (CURVE) and a worker must show the job's token
in its first message; strangers are ignored and counted.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable

import zmq
import zmq.asyncio

from hybrid.errors import HybridError, MachineError, ProtocolError
from hybrid.observe.events import Sink
from hybrid.runtime.ledger import Commit, Effect, Emit, End, Ledger, Send
from hybrid.runtime.messages import MAX_CONTROL_BYTES, Abort, Alive, ControlAddress, Hello, Message, decode, encode

CommitHandler = Callable[[Commit], None]


class Coordinator:
    """Runs one job's control plane until it ends.

    Args:
        host: address of this machine that workers reach; `127.0.0.1` keeps the socket on this machine.
        port: 0 takes a free one.

    Raises:
        MachineError: the port is taken.
    """

    def __init__(self, *, host: str, port: int) -> None:
        public, secret = zmq.curve_keypair()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_CONTROL_BYTES)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 0)
        self._socket.curve_secretkey, self._socket.curve_publickey = secret, public
        self._socket.curve_server = True
        try:
            bound = self._socket.bind_to_random_port(f"tcp://{host}") if port == 0 else self._bind(host, port)
        except zmq.ZMQError as error:
            self.close()
            raise MachineError(
                f"coordinator can't listen: {error}",
                value=f"{host}:{port}",
                fix="free the port, or set runtime.coordinator_port to another (0 takes a free one)",
            ) from None
        self.address = ControlAddress(
            endpoint=f"tcp://{host}:{bound}", server_key=public, token=secrets.token_bytes(16)
        )
        self._identity_of_rank: dict[int, bytes] = {}
        self.num_strangers = 0

    async def run(
        self,
        ledger: Ledger,
        *,
        sink: Sink,
        on_commit: CommitHandler,
        tick_s: float,
        gone: asyncio.Queue[tuple[int, str]],
    ) -> None:
        """Serve until the ledger ends the job.

        Args:
            gone: filled by whoever watches the workers' processes: (rank, why).

        Raises:
            HybridError: what ended the job, when it was not success.
        """
        receiving = asyncio.ensure_future(self._socket.recv_multipart())
        leaving = asyncio.ensure_future(gone.get())
        last_tick_s = time.monotonic()
        try:
            while True:
                await asyncio.wait({receiving, leaving}, timeout=tick_s, return_when=asyncio.FIRST_COMPLETED)
                effects: list[Effect] = []
                if receiving.done():
                    effects += self._on_frames(receiving.result(), ledger)
                    receiving = asyncio.ensure_future(self._socket.recv_multipart())
                if leaving.done():
                    rank, why = leaving.result()
                    effects += ledger.on_worker_gone(rank, why, time.monotonic())
                    leaving = asyncio.ensure_future(gone.get())
                if time.monotonic() - last_tick_s >= tick_s:
                    last_tick_s = time.monotonic()
                    effects += ledger.on_tick(last_tick_s)
                    if not ledger.ended:
                        effects.append(Send(rank=None, message=Alive()))
                ended = await self._carry_out(effects, sink, on_commit)
                if ended is not None:
                    if ended.error is not None:
                        raise ended.error
                    return
        finally:
            receiving.cancel()
            leaving.cancel()

    async def broadcast(self, message: Message) -> None:
        """Send to every rank that has joined; a rank that is gone is skipped."""
        for rank in list(self._identity_of_rank):
            await self._send(rank, message)

    async def abort_all(self, reason: str, *, num_ranks: int, timeout_s: float) -> None:
        """Abort every rank, also those that have yet to say hello, which are waited for up to `timeout_s`."""
        message = Abort(reason=reason)
        await self.broadcast(message)
        deadline_s = time.monotonic() + timeout_s
        while len(self._identity_of_rank) < num_ranks and (left_s := deadline_s - time.monotonic()) > 0:
            try:
                identity, data = await asyncio.wait_for(self._socket.recv_multipart(), left_s)
                hello = decode(data)
            except (TimeoutError, ProtocolError, ValueError):
                continue
            if isinstance(hello, Hello) and hello.token == self.address.token:
                self._identity_of_rank[hello.rank] = identity
                await self._send(hello.rank, message)

    def close(self) -> None:
        """Close the socket; idempotent."""
        self._socket.close()
        self._context.term()

    def _bind(self, host: str, port: int) -> int:
        self._socket.bind(f"tcp://{host}:{port}")
        return port

    def _on_frames(self, frames: list[bytes], ledger: Ledger) -> list[Effect]:
        try:
            identity, data = frames
            message = decode(data)
        except (ProtocolError, ValueError):
            self.num_strangers += 1
            return []
        rank = getattr(message, "rank", -1)
        effects = ledger.on_message(message, time.monotonic()) if self._may_speak(identity, rank, message) else []
        if isinstance(message, Hello) and message.token == self.address.token:
            self._identity_of_rank.setdefault(rank, identity)
        return effects

    def _may_speak(self, identity: bytes, rank: int, message: Message) -> bool:
        """Whether this connection may speak for the rank: by its first Hello's token, later by being the same one."""
        if isinstance(message, Hello):
            return message.token == self.address.token
        known = self._identity_of_rank.get(rank) == identity
        self.num_strangers += not known
        return known

    async def _carry_out(self, effects: list[Effect], sink: Sink, on_commit: CommitHandler) -> End | None:
        end: End | None = None
        for effect in effects:
            match effect:
                case Send(rank=None, message=message):
                    await self.broadcast(message)
                case Send(rank=rank, message=message) if rank is not None:
                    await self._send(rank, message)
                case Emit(event=event):
                    sink(event)
                case Commit():
                    on_commit(effect)
                case End():
                    end = effect
                case _:
                    raise AssertionError(effect)
        return end

    async def _send(self, rank: int, message: Message) -> None:
        identity = self._identity_of_rank.get(rank)
        if identity is None:
            return
        try:
            await asyncio.wait_for(self._socket.send_multipart([identity, encode(message)]), timeout=5.0)
        except (TimeoutError, zmq.ZMQError):
            # A worker that is gone is noticed by its silence and by its process's end.
            return


async def until_done(awaitable: Awaitable[None], *, timeout_s: float) -> None:
    """Await something that may not outlast `timeout_s`; its failure is not ours to report."""
    try:
        await asyncio.wait_for(awaitable, timeout_s)
    except (TimeoutError, HybridError):
        return
