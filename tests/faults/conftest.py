"""A small job and the command line run in this process, for the tests of what goes wrong."""

import copy
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from hybrid.cli import main

JOB: dict[str, Any] = {
    "name": "tiny",
    "seed": 7,
    "model": {
        "num_blocks": 2,
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 300,
        "sequence_length": 16,
    },
    "data": {"source": "text", "path": "text.txt"},
    "batch": {"global_batch": 4, "microbatch": 2},
    "steps": 2,
    "fleet": {
        "islands": [
            {"name": "trainium", "device": "trn2", "count": 1},
            {"name": "nvidia", "device": "h100", "count": 1},
        ],
        "links": [{"between": ["trainium", "nvidia"], "bandwidth_bytes_per_s": 1e9}],
    },
    "evaluate": {"num_microbatches": 1},
    "runtime": {"placement": "threads", "transport": "inproc", "heartbeat_s": 0.2},
    "emulation": {"pace": False},
}


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    seconds: float


class Bench:
    """A folder with a job, and the command line run in it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        self.raw = copy.deepcopy(JOB)

    def set(self, key: str, value: object) -> None:
        """Set `a.b.c` in the job; a number is an entry of a list; the value `...` removes the key."""
        where: Any = self.raw
        *parents, last = (int(part) if part.isdecimal() else part for part in key.split("."))
        for parent in parents:
            where = where.setdefault(parent, {}) if isinstance(where, dict) else where[parent]
        if value is ...:
            del where[last]
        else:
            where[last] = value

    def write_job(self) -> None:
        (self.folder / "job.yaml").write_text(yaml.safe_dump(self.raw, sort_keys=False))

    def run(self, *words: str) -> Ended:
        self._capsys.readouterr()
        started_s = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            main(words)
        seconds = time.monotonic() - started_s
        said = self._capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(ended.value.code, said.out, said.err, seconds)

    def files(self) -> dict[str, tuple[int, int]]:
        """Return every file and folder below, with size and time of change."""
        return {
            str(path.relative_to(self.folder)): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(self.folder.rglob("*"))
            if not path.is_dir()
        } | {f"{path.relative_to(self.folder)}/": (0, 0) for path in self.folder.rglob("*") if path.is_dir()}

    def refused(self, words: str, *fragments: str) -> Ended:
        """Run a command that must be refused as promised: exit code 2, soon, in one line that says all `fragments`."""
        ended = self.run(*words.split())
        assert ended.code == 2, ended
        lines = ended.err.splitlines()
        assert len(lines) == 1, ended.err
        assert lines[0].startswith("hybrid: "), ended.err
        assert "Traceback" not in ended.out + ended.err
        for fragment in fragments:
            assert fragment in lines[0]
        assert ended.seconds < 20
        return ended

    def refused_untouched(self, words: str, *fragments: str) -> Ended:
        """Like `refused`; nothing at all may have been written, not even to the cache."""
        before = self.files()
        ended = self.refused(words, *fragments)
        assert self.files() == before
        return ended


def write_text(folder: Path, seed: int = 0, lines: int = 400) -> Path:
    """Write some text of 200 words, the same for the same seed."""
    chance = random.Random(seed)
    words = ["".join(chance.choice("abcdefghij") for _ in range(chance.randint(2, 7))) for _ in range(200)]
    path = folder / "text.txt"
    path.write_text("\n".join(" ".join(chance.choice(words) for _ in range(10)) for _ in range(lines)))
    return path


@pytest.fixture
def bench(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, nothing_leaks: None
) -> Iterator[Bench]:
    """A folder with a text and a right job, which the test makes wrong; the command line runs in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")
    write_text(tmp_path)
    kept = signal.getsignal(signal.SIGTERM)
    made = Bench(tmp_path, capsys)
    made.write_job()
    yield made
    signal.signal(signal.SIGTERM, kept)


@pytest.fixture
def nothing_leaks() -> Iterator[None]:
    """Check after the test that it left no thread, no child process and no socket in this process."""
    # One run of zmq and torch starts threads that stay for the process's life; they are not a leak.
    import torch
    import zmq

    torch.set_num_threads(1)
    zmq.Context.instance()
    threads = set(threading.enumerate())
    children = set(psutil.Process().children(recursive=True))
    yield
    deadline_s = time.monotonic() + 5.0
    while (left := set(threading.enumerate()) - threads) and time.monotonic() < deadline_s:
        next(iter(left)).join(0.05)
    assert not left, f"threads are left: {sorted(thread.name for thread in left)}"
    assert not set(psutil.Process().children(recursive=True)) - children
    listening = [c for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    assert not listening, f"sockets are left: {listening}"
