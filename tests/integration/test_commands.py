"""Commands that need no Ray, run whole in this process."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from hybrid.cli import main

JOB = """
name: small
model: {num_blocks: 2, hidden_size: 32, num_heads: 4, num_kv_heads: 2, intermediate_size: 64,
        vocab_size: 320, sequence_length: 16}
data: {source: text, path: text, held_out_share: 0.1}
batch: {global_batch: 8, microbatch: 2}
steps: 3
fleet: {islands: [{name: trainium, device: trn2, count: 2}, {name: nvidia, device: h100, count: 1}]}
evaluate: {num_microbatches: 2}
runtime: {placement: threads, transport: inproc}
runs_dir: RUNS
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "text"
    texts.mkdir()
    for name in "abcdefghij":
        (texts / f"{name}.txt").write_text("\n".join(f"{name} {i} of {i * i % 97}" for i in range(500)))
    path = tmp_path / "job.yaml"
    path.write_text(JOB.replace("RUNS", str(tmp_path / "runs")))
    return path


def _hybrid(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["hybrid", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_doctor_passes_what_this_machine_has_and_says_what_is_absent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = _hybrid(capsys, monkeypatch, "doctor", "--json")
    report = json.loads(out)
    status = {finding["name"]: finding["status"] for finding in report["findings"]}
    assert code == 0, err
    assert status["backend cpu"] == status["backend emulated trn2"] == status["transport zmq-tcp"] == "PASS"
    assert status["real Trainium device"] in ("ABSENT", "PASS")


def test_plan_prints_the_placement_and_the_simulated_step(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = _hybrid(capsys, monkeypatch, "plan", str(job), "--json")
    plan = json.loads(out)
    assert code == 0
    assert [row["chip"] for row in plan["rows"]] == ["trn2", "trn2", "h100"]
    assert plan["summary"]["step_s"] > 0
    code, out, _ = _hybrid(capsys, monkeypatch, "plan", str(job))
    assert "predicted step" in out
    assert "rank 2" in out


def test_a_plan_that_was_saved_runs_and_is_the_one_that_was_run(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = tmp_path / "plan.yaml"
    assert _hybrid(capsys, monkeypatch, "plan", str(job), "--out", str(saved))[0] == 0
    code, out, err = _hybrid(capsys, monkeypatch, "train", str(job), "--plan", str(saved), "--json")
    assert code == 0, err
    assert (Path(json.loads(out)["run"]) / "plan.yaml").read_text() == saved.read_text()


def test_a_paced_run_prints_predicted_against_measured(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = _hybrid(capsys, monkeypatch, "train", str(job))
    assert code == 0, err
    assert "predicted" in out
    assert "measured" in out
    assert "unigram entropy" in out


def test_an_exported_run_holds_the_models_weights_its_config_and_its_tokenizer(
    job: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, err = _hybrid(capsys, monkeypatch, "train", str(job), "--json")
    assert code == 0, err
    to = tmp_path / "exported"
    code, _, err = _hybrid(capsys, monkeypatch, "export", json.loads(out)["run"], "--to", str(to))
    assert code == 0, err
    weights = load_file(to / "model.safetensors")
    assert weights["embedding.weight"].shape == (320, 32)
    assert "block.01.attention.query.weight" in weights
    assert "head.weight" not in weights, "tied: one weight in the model, one tensor in the file"
    config = json.loads((to / "config.json").read_text())
    assert config["steps_done"] == 3
    assert config["model"]["num_blocks"] == 2
    assert (to / "tokenizer.json").is_file()


def test_the_summary_under_json_is_one_line_and_all_of_standard_output(
    job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = _hybrid(capsys, monkeypatch, "train", str(job), "--reference", "--json")
    summary = json.loads(out)
    assert code == 0
    assert out.count("\n") == 1
    for key in ("final_loss", "held_out_loss", "steps", "tokens_per_s", "first_step_s", "run"):
        assert summary[key] is not None
