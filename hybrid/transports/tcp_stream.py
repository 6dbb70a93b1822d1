"""One connection of an edge: frames out of it and into it, sealed or plain. Knows no messages and no windows.

A frame is a prefix (the lengths of what follows), a record, and a payload or none; sealed, record and payload are
each `TAG_BYTES` longer, and the prefix is sealed with the record. Everything runs under the engine's lock, which is
let go of around the system calls and the ciphers. May import only `errors`, `wire`'s limits and this folder.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, final

from hybrid.errors import ProtocolError
from hybrid.transports.message import Payload
from hybrid.transports.tcp_engine import READABLE, WRITABLE, Engine
from hybrid.transports.tcp_secret import TAG_BYTES, Seal

MAX_RECORD_BYTES = 12 << 10
"""Of one record on the wire: a header of 1024 buffers needs 10 KiB."""
_PREFIX = struct.Struct("!HHI")
_STAGE_BYTES = 32 << 10
"""How much is read at once where a frame may begin; what belongs to a payload is copied out of it."""
_MOVES_A_TURN = 4
"""System calls for one stream before the others get their turn."""


@dataclass(slots=True, eq=False)
class Frame:
    """What is to be written as one."""

    record: bytes
    payload: Payload | None = None
    sending: object = None
    """Whose it is; the stream only carries it."""


class Owner(Protocol):
    """The edge, as its streams see it; everything is called under the lock."""

    frame_bytes: int

    def next_frame(self, stream: Stream) -> Frame | None:
        """Return what this stream is to write next."""

    def written(self, frame: Frame) -> None:
        """Take note that the kernel has all of it."""

    def place_of(self, stream: Stream, record: bytes, size_bytes: int) -> memoryview | None:
        """Return where a frame's payload goes; None: not yet known, and the frame is asked for again by `go_on`.

        Raises:
            ProtocolError: no honest peer sends this.
        """

    def arrived(self, stream: Stream) -> None:
        """Take note that the frame's payload is in its place."""

    def broken(self, stream: Stream, failure: ProtocolError | None) -> None:
        """Take note that nothing more comes: the peer has ended the stream, or sent what no honest peer sends."""

    def settle(self) -> None:
        """Take note that no system call is under way any more."""


@final
class Stream:
    """See the module."""

    def __init__(
        self, engine: Engine, opened: socket.socket, owner: Owner, *, index: int, seals: tuple[Seal, Seal] | None
    ) -> None:
        self.index = index
        self.reading = self.writing = False
        """A system call for it is under way, without the lock."""
        self.ended = self.parked = False
        self._deaf = self._finished = False
        self._engine, self._socket, self._owner = engine, opened, owner
        self._sealer: Seal | None = seals[0] if seals is not None else None
        self._opener: Seal | None = seals[1] if seals is not None else None
        self._events = READABLE
        self._extra_bytes = TAG_BYTES if seals is not None else 0
        # Reading: the stage, then straight to where the payload goes.
        self._stage = memoryview(bytearray(_STAGE_BYTES))
        self._begin = self._end = 0
        self._record: bytes | None = None
        self._size_bytes = 0
        self._place = self._rest = memoryview(b"")
        self._sealed_in = self._sealed_out = memoryview(b"")
        # Writing.
        self.frame: Frame | None = None
        self._unsent: list[memoryview] = []
        engine.watch(opened.fileno(), self, self._events)

    # What the engine calls -------------------------------------------------------------------------------

    def ready(self, events: int) -> None:
        if events & WRITABLE:
            self.write(_MOVES_A_TURN)
        if self.ended:
            return
        if self.parked:
            if events & ~(READABLE | WRITABLE):
                self._owner.broken(self, None)
                self._owner.settle()
        elif events & ~WRITABLE:
            self._read()

    def write(self, num_moves: int) -> None:
        """Write what the edge has for this stream, until the kernel takes no more or the moves are used up."""
        if self.writing or self.ended:
            return
        blocked = False
        self.writing = True
        while num_moves and not blocked and not self.ended:
            if not self._unsent and not self._load():
                break
            num_moves -= 1
            blocked = not self._flush()
        self.writing = False
        self._look_for(WRITABLE, bool(self._unsent) or not num_moves)
        self._owner.settle()

    @property
    def idle(self) -> bool:
        """Whether nothing of it is on its way to the kernel."""
        return self.frame is None or self.ended

    def turn_deaf(self) -> None:
        """Read and forget what still comes."""
        self._deaf, self._rest, self._begin, self._end = True, memoryview(b""), 0, 0
        if self.parked:
            self.parked = False
            self._look_for(READABLE, True)

    def end_writing(self) -> None:
        """Tell the peer that nothing more comes; once."""
        if not self._finished and not self.ended:
            self._finished = True
            self._quietly(socket.SHUT_WR)

    def break_off(self) -> None:
        """End both directions; a system call under way returns at once."""
        if not self.ended:
            self.ended = True
            self._engine.forget(self._socket.fileno())
            self._quietly(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give back the descriptor; after `break_off`, and with nothing under way."""
        self._socket.close()

    def park(self) -> None:
        """Read no more until `go_on`."""
        self.parked = True
        self._look_for(READABLE, False)

    def go_on(self) -> None:
        """Ask again for the place of the frame that waits."""
        if self.parked and not self.ended:
            self.parked = False
            self._look_for(READABLE, True)
            self._guard(self._parse)

    # Writing ---------------------------------------------------------------------------------------------

    def _load(self) -> bool:
        """Make the next frame what is unsent; return whether there was one."""
        frame = self._owner.next_frame(self)
        if frame is None:
            return False
        self.frame = frame
        payload = frame.payload
        prefix = _PREFIX.pack(len(frame.record), 0, 0 if payload is None else len(payload))
        if self._sealer is None:
            self._unsent = [memoryview(prefix + frame.record)]
            if payload is not None:
                self._unsent.append(memoryview(payload))
        else:
            self._unsent = [self._sealed(self._sealer, prefix, frame.record, payload)]
        return True

    def _sealed(self, sealer: Seal, prefix: bytes, record: bytes, payload: Payload | None) -> memoryview:
        begin = _PREFIX.size + len(record) + TAG_BYTES
        end = begin if payload is None else begin + len(payload) + TAG_BYTES
        if self._sealed_out.nbytes < end:
            self._sealed_out = memoryview(bytearray(max(end, 4096)))
        out = self._sealed_out[:end]
        out[: _PREFIX.size] = prefix
        self._engine.lock.release()
        try:
            sealer.close_into(out[_PREFIX.size : begin], record, prefix)
            if payload is not None:
                sealer.close_into(out[begin:], payload)
        finally:
            self._engine.lock.acquire()
        return out

    def _flush(self) -> bool:
        """Give the kernel what is unsent; return whether it may take more."""
        self._engine.lock.release()
        try:
            sent = self._socket.sendmsg(self._unsent)
        except BlockingIOError:
            sent = -1
        except OSError:
            sent = -2
        finally:
            self._engine.lock.acquire()
        if sent < 0:
            # A broken connection is told by the reading side, after what came before it broke.
            if sent == -2:
                self._unsent = []
            return False
        while self._unsent and sent >= self._unsent[0].nbytes:
            sent -= self._unsent.pop(0).nbytes
        if self._unsent:
            self._unsent[0] = self._unsent[0][sent:]
            return True
        frame, self.frame = self.frame, None
        if frame is not None:
            self._owner.written(frame)
        return True

    # Reading ---------------------------------------------------------------------------------------------

    def _read(self) -> None:
        for _ in range(_MOVES_A_TURN):
            place = self._rest if self._rest.nbytes else self._stage[self._end :]
            self.reading = True
            self._engine.lock.release()
            try:
                got = self._socket.recv_into(place)
            except BlockingIOError:
                got = -1
            except OSError:
                got = 0
            finally:
                self._engine.lock.acquire()
                self.reading = False
            if self.ended or got < 0:
                break
            if got == 0:
                self._owner.broken(self, None)
                break
            if not self._deaf:
                self._guard(self._took, got)
            if self.ended or self.parked or got < place.nbytes:
                break
        self._owner.settle()

    def _guard(self, step: Callable[..., None], *arguments: int) -> None:
        try:
            step(*arguments)
        except ProtocolError as failure:
            self._owner.broken(self, failure)

    def _took(self, got: int) -> None:
        if self._rest.nbytes:
            self._rest = self._rest[got:]
            if not self._rest.nbytes:
                self._finish()
        else:
            self._end += got
            self._parse()

    def _parse(self) -> None:
        """Take every frame that the stage holds, as far as it holds it."""
        while not self.ended and not self.parked and (self._record is not None or self._open_record()):
            assert self._record is not None
            place = self._owner.place_of(self, self._record, self._size_bytes)
            if place is None:
                self.park()
                return
            self._record = None
            if not self._size_bytes:
                continue
            wanted = self._size_bytes + self._extra_bytes
            self._place = place
            target = place if self._opener is None else self._sealed_room(wanted)
            here = min(wanted, self._end - self._begin)
            target[:here] = self._stage[self._begin : self._begin + here]
            self._begin += here
            self._rest = target[here:]
            if self._rest.nbytes:
                break
            self._finish()
        if self._begin == self._end:
            self._begin = self._end = 0
        elif self._begin and not self.parked:
            kept = bytes(self._stage[self._begin : self._end])
            self._begin, self._end = 0, len(kept)
            self._stage[: len(kept)] = kept

    def _open_record(self) -> bool:
        """Read the next prefix and record where the stage holds both."""
        here = self._end - self._begin
        if here < _PREFIX.size:
            return False
        record_bytes, reserved, size_bytes = _PREFIX.unpack_from(self._stage, self._begin)
        if not 0 < record_bytes <= MAX_RECORD_BYTES or reserved or size_bytes > self._owner.frame_bytes:
            raise ProtocolError(
                "a frame begins with lengths that no honest peer sends", value=(record_bytes, reserved, size_bytes)
            )
        begin = self._begin + _PREFIX.size
        end = begin + record_bytes + self._extra_bytes
        if end > self._end:
            return False
        record = bytearray(record_bytes)
        if self._opener is None:
            record[:] = self._stage[begin:end]
        else:
            prefix = bytes(self._stage[self._begin : begin])
            self._opener.open_into(memoryview(record), self._stage[begin:end], prefix)
        self._record, self._size_bytes, self._begin = bytes(record), size_bytes, end
        return True

    def _sealed_room(self, wanted: int) -> memoryview:
        if self._sealed_in.nbytes < wanted:
            self._sealed_in = memoryview(bytearray(wanted))
        return self._sealed_in[:wanted]

    def _finish(self) -> None:
        """Take note that the payload is whole; open it into its place."""
        if self._opener is not None:
            self.reading = True
            self._engine.lock.release()
            try:
                self._opener.open_into(self._place, self._sealed_in[: self._place.nbytes + TAG_BYTES])
            finally:
                self._engine.lock.acquire()
                self.reading = False
        self._place = memoryview(b"")
        if not self.ended:
            self._owner.arrived(self)

    # Both ------------------------------------------------------------------------------------------------

    def _look_for(self, event: int, wanted: bool) -> None:
        events = self._events | event if wanted else self._events & ~event
        if events != self._events and not self.ended:
            self._events = events
            self._engine.watch(self._socket.fileno(), self, events)

    def _quietly(self, how: int) -> None:
        try:
            self._socket.shutdown(how)
        except OSError:
            return
