"""Two namespaces joined by shaped links: bytes cross at the rate, nothing is left, leftovers are removed."""

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from hybrid.bench import netns
from hybrid.bench.processes import Team

REASON = netns.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no network namespaces: {REASON}")
SIZE_BYTES = 4 << 20
BITS_PER_S = 400e6


def make_receiver(namespace: str, address: str):
    import socket

    netns.enter(namespace)
    server = socket.create_server((address, 0))
    server.settimeout(20)

    def receive(message: str):
        if message == "port":
            return server.getsockname()[1]
        connection, _ = server.accept()
        connection.settimeout(20)
        received, start_s = len(connection.recv(1 << 16)), time.monotonic()
        while chunk := connection.recv(1 << 18):
            received += len(chunk)
        return received, time.monotonic() - start_s

    return receive


def make_sender(namespace: str, address: str):
    import socket

    netns.enter(namespace)

    def send(port: int):
        with socket.create_connection((address, port), timeout=20) as connection:
            connection.sendall(bytes(SIZE_BYTES))

    return send


def test_bytes_cross_between_islands_at_the_rate_of_the_link():
    with netns.open_islands(num_links=2, bits_per_s=BITS_PER_S) as islands:
        there = islands.addresses[1][1]
        makers = {
            "receiver": partial(make_receiver, islands.namespaces[1], there),
            "sender": partial(make_sender, islands.namespaces[0], there),
        }
        with Team(makers, timeout_s=30) as team:
            port = team.ask({"receiver": "port"})["receiver"]
            received, seconds = team.ask({"receiver": "receive", "sender": port})["receiver"]
    assert received == SIZE_BYTES
    assert 0.6 < SIZE_BYTES / seconds / islands.payload_bytes_per_s < 1.15  # the bucket's first burst is free


def test_nothing_of_the_islands_is_left_after_they_close_even_by_an_error():
    seen = []

    def fail_inside():
        with netns.open_islands() as islands:
            seen.extend(islands.namespaces)
            assert all(Path(f"/run/netns/{name}").exists() for name in seen)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_inside()
    assert len(seen) == 2
    assert not any(Path(f"/run/netns/{name}").exists() for name in seen)


def test_islands_of_a_killed_owner_are_removed_by_the_next_one():
    code = (
        "from hybrid.bench import netns; import os, signal\n"
        "with netns.open_islands() as islands:\n"
        "    print(*islands.namespaces, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    names = done.stdout.split()
    assert len(names) == 2
    assert all(Path(f"/run/netns/{name}").exists() for name in names)
    assert set(names) <= set(netns.remove_leftovers())
    assert not any(Path(f"/run/netns/{name}").exists() for name in names)
    assert os.getpid() != int(names[0].split("-")[1])
