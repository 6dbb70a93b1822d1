"""Run the `neuron` backend's code on the fake device in this process, and count which of its lines ran.

    python -m hybrid.testing.neuron_report          prints the table
    python -m hybrid.testing.neuron_report --json   for tests

Needs the package `coverage` (the extra `dev`) and a process of its own. A line that did not run must carry its reason
in a comment `only on hardware: ...`. May import all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parents[1] / "backends"
FILES = tuple(_FOLDER / name for name in ("neuron.py", "accelerator.py", "static_shapes.py"))
LEAST_SHARE = 0.95
_REASON = "only on hardware:"


def main(words: list[str]) -> int:
    """Run all and print; 1 where a clause failed, a file is covered too little, or a line lacks its reason."""
    import coverage

    watch = coverage.Coverage(include=[str(path) for path in FILES], data_file=None)
    watch.start()
    try:
        outcome = run_clauses()
    finally:
        watch.stop()
    files = {path.name: _coverage_of(watch, path) for path in FILES}
    report = {"clauses": outcome, "files": files}
    good = not any(outcome.values()) and all(
        row["share"] >= LEAST_SHARE and all(line["reason"] for line in row["missing"]) for row in files.values()
    )
    print(json.dumps(report) if "--json" in words else _table(outcome, files))
    return 0 if good else 1


def run_clauses() -> dict[str, str]:
    """Return each clause's name and what it found wrong, empty where all was right."""
    import torch

    torch.set_num_threads(1)
    from hybrid.backends.base import Backend, BackendOptions
    from hybrid.backends.neuron import NeuronBackend, neuron_module
    from hybrid.errors import MachineError
    from hybrid.hardware import load_catalog
    from hybrid.runtime.capabilities import capabilities_of
    from hybrid.testing import backend_kit, fake_neuron, neuron_clauses

    outcome: dict[str, str] = {}

    def attempt(name: str, fn: Callable[[], object]) -> None:
        try:
            fn()
        except Exception as error:
            outcome[name] = f"{type(error).__name__}: {error}"
        else:
            outcome[name] = ""

    def absent() -> None:
        try:
            neuron_module()
        except MachineError:
            return
        raise AssertionError("a device was found where none is")

    attempt("without the device the backend says why", absent)
    fake_neuron.install()
    chip = load_catalog().chip("trn2")

    def make(options: BackendOptions | None = None, *, compiler: Callable[[Any], Any] | None = None) -> NeuronBackend:
        return NeuronBackend(capabilities_of(chip, None), options, compiler=compiler)

    def open_backend(memory_bytes: int | None) -> Backend:
        return NeuronBackend(capabilities_of(chip, memory_bytes))

    for clause in backend_kit.CLAUSES:
        attempt(clause.__name__, lambda clause=clause: clause(open_backend))  # type: ignore[misc]
    for own in neuron_clauses.CLAUSES:
        attempt(own.__name__, lambda own=own: own(make))  # type: ignore[misc]
    module: Any = torch.neuron  # type: ignore[attr-defined]
    there, module.is_available = module.is_available, lambda: False
    attempt("without a core the backend says why", absent)
    module.is_available = there
    return outcome


def _coverage_of(watch: Any, path: Path) -> dict[str, Any]:
    _, statements, _, missing, _ = watch.analysis2(str(path))
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number in missing:
        text = lines[number - 1]
        rows.append({"line": number, "text": text.strip(), "reason": text.partition(_REASON)[2].strip()})
    share = 1 - len(missing) / len(statements)
    return {"share": share, "statements": len(statements), "missing": rows}


def _table(outcome: dict[str, str], files: dict[str, dict[str, Any]]) -> str:
    rows = [f"{'ok  ' if not wrong else 'FAIL'} {name} {wrong}".rstrip() for name, wrong in outcome.items()]
    for name, row in files.items():
        rows.append(f"{name}: {row['share']:.1%} of {row['statements']} statements ran on the fake device")
        rows += [f"  line {line['line']}: {line['text']} - {line['reason'] or 'NO REASON'}" for line in row["missing"]]
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
