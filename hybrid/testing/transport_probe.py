"""A small clock on a transport: round trip and stream, between two threads or two processes.

`python -m hybrid.testing.transport_probe --medium zmq-tcp` prints one table; `hybrid doctor` calls
`measure_round_trip`. Measures, decides nothing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from hybrid.transports import VARIANTS, Transport, open_node

TIMEOUT_S = 30.0
_WAVES = 5


def measure_round_trip(
    medium: str, *, size_bytes: int = 4096, num_trips: int = 200, processes: bool = False, timeout_s: float = TIMEOUT_S
) -> float:
    """Return the median seconds that a message of `size_bytes` takes to another rank of this host and back.

    Args:
        medium: a key of `hybrid.transports.VARIANTS`.
        processes: the other rank is a process of its own, not a thread of this one; not with `inproc`.

    Raises:
        CommError: the medium does not work here.
    """
    message, echo = bytes(size_bytes), memoryview(bytearray(size_bytes))
    with _peer(medium, "echo", size_bytes, num_trips + 10, processes) as edge:
        times_s = []
        for _ in range(num_trips + 10):
            began_s = time.perf_counter()
            answer = edge.recv("echo", [echo])
            edge.send("there", [message]).wait(timeout_s)
            answer.wait(timeout_s)
            times_s.append(time.perf_counter() - began_s)
    return median(times_s[10:])


def measure_stream(
    medium: str, *, size_bytes: int, total_bytes: int = 256 << 20, processes: bool = True, timeout_s: float = TIMEOUT_S
) -> float:
    """Return the median bytes per second of a one-way stream, four messages under way, received into reused buffers."""
    num_messages = max(total_bytes // size_bytes // _WAVES, 4)
    message, ack = memoryview(bytearray(b"\x01" * size_bytes)), memoryview(bytearray(1))
    rates = []
    with _peer(medium, "drain", size_bytes, num_messages, processes) as edge:
        for _ in range(_WAVES + 1):
            drained = edge.recv("drained", [ack])
            began_s = time.perf_counter()
            for pending in [edge.send("there", [message]) for _ in range(num_messages)]:
                pending.wait(timeout_s)
            drained.wait(timeout_s)
            rates.append(num_messages * size_bytes / (time.perf_counter() - began_s))
    return median(rates[1:])


@contextmanager
def _peer(medium: str, duty: str, size_bytes: int, count: int, processes: bool) -> Iterator[Transport]:
    """Yield the edge to a rank 1 that does its duty."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    arguments = (medium, duty, size_bytes, count, there)
    worker: threading.Thread | multiprocessing.process.BaseProcess
    if processes:
        worker = multiprocessing.get_context("spawn").Process(target=_serve, args=arguments, daemon=True)
    else:
        worker = threading.Thread(target=_serve, args=arguments, daemon=True)
    node = open_node(medium, 0)
    try:
        worker.start()
        here.send(node.address)
        yield node.open(1, here.recv(), timeout_s=TIMEOUT_S)
    finally:
        node.close()
        worker.join(TIMEOUT_S)
        here.close()


def _serve(medium: str, duty: str, size_bytes: int, count: int, pipe: multiprocessing.connection.Connection) -> None:
    node = open_node(medium, 1)
    try:
        pipe.send(node.address)
        edge = node.open(0, pipe.recv(), timeout_s=TIMEOUT_S)
        targets = [memoryview(bytearray(size_bytes)) for _ in range(4)]
        if duty == "echo":
            for _ in range(count):
                edge.recv("there", targets[:1]).wait(TIMEOUT_S)
                edge.send("echo", targets[:1]).wait(TIMEOUT_S)
        else:
            for _ in range(_WAVES + 1):
                posted = [edge.recv("there", [target]) for target in targets]
                for index in range(count):
                    posted[index % 4].wait(TIMEOUT_S)
                    if index + 4 < count:
                        posted[index % 4] = edge.recv("there", [targets[index % 4]])
                edge.send("drained", [b"!"]).wait(TIMEOUT_S)
    finally:
        node.close()
        pipe.close()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--medium", choices=[name for name in VARIANTS if name != "inproc"], default="zmq-tcp")
    medium: str = parser.parse_args().medium
    for size_bytes in (64, 4 << 10, 64 << 10, 256 << 10):
        trip_s = measure_round_trip(medium, size_bytes=size_bytes, processes=True)
        print(f"{medium}  round trip {size_bytes:>9} B  {trip_s * 1e6:9.1f} us", flush=True)
    for size_bytes in (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20):
        rate = measure_stream(medium, size_bytes=size_bytes)
        print(f"{medium}  stream     {size_bytes:>9} B  {rate / 1e9:9.2f} GB/s", flush=True)


if __name__ == "__main__":
    main()
