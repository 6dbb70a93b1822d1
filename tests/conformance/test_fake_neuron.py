"""The `neuron` backend on the fake device, in a process of its own: every clause, and which lines of it ran."""

import json
import subprocess
import sys
from typing import Any

import pytest

from hybrid.testing import backend_kit, neuron_clauses

RULES = """
import torch
from hybrid.testing import fake_neuron
fake_neuron.install(); fake_neuron.install()
from hybrid.testing.fake_neuron_tensor import ledger
x = torch.ones(256).to("neuron")
def refused(fn, words):
    try: fn()
    except RuntimeError as error: assert words in str(error), error
    else: raise AssertionError(words)
refused(lambda: x + torch.ones(256), "expected all tensors to be on the same device")
refused(lambda: x.double(), "no torch.float64")
refused(lambda: torch.zeros(2, dtype=torch.float64).to("neuron"), "no torch.float64")
refused(lambda: torch.arange(4, device="neuron").add(1), "no arithmetic in int64")
refused(lambda: torch.neuron.set_device(1), "one device")
assert float((x + 1).sum()) == 512.0
before = ledger.live_bytes
held = torch.empty(1000, device="neuron"); view = held[10:]
assert ledger.live_bytes == before + 4000
del held
assert ledger.live_bytes == before + 4000
del view
assert ledger.live_bytes == before and ledger.peak_bytes >= before + 4000
ledger.reset()
x.cpu(); torch.ones(2).to("neuron")
assert (ledger.to_host_bytes, ledger.to_device_bytes) == (1024, 8)
ledger.limit_bytes = ledger.live_bytes + 100
try: torch.empty(1000, device="neuron")
except torch.OutOfMemoryError: pass
else: raise AssertionError("no limit")
ledger.limit_bytes = 2**30
with torch.autocast("neuron", dtype=torch.bfloat16):
    assert torch.nn.functional.linear(x.view(16, 16), x.view(16, 16)).dtype == torch.bfloat16
    assert torch.softmax(x.bfloat16(), 0).dtype == torch.float32
print("kept")
"""
BESIDE_THE_REAL = """
import sys, types
sys.modules["torch_neuronx"] = types.ModuleType("torch_neuronx")
from hybrid.errors import MachineError
from hybrid.testing import fake_neuron
try: fake_neuron.install()
except MachineError as error: print(error)
"""


def _python(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-W", "ignore", *words], capture_output=True, text=True, timeout=110)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    pytest.importorskip("coverage", reason="the extra dev brings coverage")
    done = _python("-m", "hybrid.testing.neuron_report", "--json")
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("clause", [*backend_kit.CLAUSES, *neuron_clauses.CLAUSES], ids=lambda clause: clause.__name__)
def test_the_neuron_backend_keeps_the_contract_on_the_fake_device(clause: Any, report: dict[str, Any]) -> None:
    assert report["clauses"][clause.__name__] == ""


def test_a_missing_device_is_told(report: dict[str, Any]) -> None:
    assert report["clauses"]["without the device the backend says why"] == ""
    assert report["clauses"]["without a core the backend says why"] == ""


@pytest.mark.parametrize("name", ["neuron.py", "accelerator.py", "static_shapes.py"])
def test_nearly_every_line_ran_and_the_rest_has_its_reason(name: str, report: dict[str, Any]) -> None:
    row = report["files"][name]
    print(f"{name}: {row['share']:.1%} of {row['statements']} statements")
    assert row["share"] >= 0.95
    assert [line for line in row["missing"] if not line["reason"]] == []


def test_the_fake_device_refuses_and_counts_what_the_real_one_does() -> None:
    done = _python("-c", RULES)
    assert done.stdout == "kept\n", done.stderr


def test_the_fake_and_the_real_package_are_not_loaded_together() -> None:
    done = _python("-c", BESIDE_THE_REAL)
    assert "cannot be loaded beside the real torch_neuronx" in done.stdout, done.stderr
