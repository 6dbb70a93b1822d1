import json
from pathlib import Path

import pytest

from hybrid.cli import main
from hybrid.scheduler.search.formats import read_profile, write_profile

ROOT = Path(__file__).parents[2]
TINY = """
name: tiny-profile
model: {num_blocks: 2, hidden_size: 16, num_heads: 2, num_kv_heads: 1, intermediate_size: 32, vocab_size: 300,
        sequence_length: 16}
batch: {global_batch: 4, microbatch: 2}
steps: 2
fleet:
  islands:
    - {name: a, device: trn2, count: 1}
    - {name: b, device: h100, count: 1}
"""


@pytest.fixture
def job(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(TINY)
    return path


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    return ended.value.code, capsys.readouterr()


@pytest.fixture
def plan(job, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    assert run(capsys, "plan", job, "--out", path)[0] == 0
    return path


def test_a_plan_is_simulated_as_it_predicts(plan, capsys):
    code, told = run(capsys, "simulate", plan, "--json", "--sequence-length", 16)
    answer = json.loads(told.out)
    assert code == 0
    from hybrid.scheduler.plan import Plan

    assert answer["summary"]["step_s"] == pytest.approx(Plan.from_yaml(plan.read_text()).step_s)
    assert answer["summary"]["tokens_per_s"] == pytest.approx(4 * 16 / answer["summary"]["step_s"])
    assert answer["summary"]["usd_per_hour"] > 1
    assert len(answer["rows"]) == 2


def test_the_terminal_shows_the_gantt_and_the_trace_opens_as_json(plan, tmp_path, capsys):
    trace = tmp_path / "trace.json"
    code, told = run(capsys, "simulate", plan, "--trace", trace)
    assert code == 0
    assert "rank 1" in told.out
    assert "uncalibrated" in told.out
    assert json.loads(trace.read_text())["traceEvents"]


def test_an_availability_trace_gives_goodput(plan, tmp_path, capsys):
    availability = tmp_path / "spot.csv"
    availability.write_text("at_s,chip,num_chips,usd_per_hour\n0,trn2,1,1.0\n0,h100,1,2.0\n50,h100,0,\n100,end,0,\n")
    words = ("simulate", plan, "--json", "--availability", availability, "--recovery-s", 10)
    summary = json.loads(run(capsys, *words)[1].out)["summary"]
    assert summary["useful_share"] == pytest.approx(0.4, abs=0.01)
    assert summary["usd"] == pytest.approx((50 * 3 + 50 * 1) / 3600)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("simulate", "nowhere.yaml"), "plan file cannot be read"),
        (("simulate", "PLAN", "--availability", "nowhere.csv"), "availability trace cannot be read"),
        (("simulate", "PLAN", "--trace", "nowhere/t.json"), "trace cannot be written"),
    ],
)
def test_what_cannot_be_read_or_written_is_one_line_and_exit_2(words, told, plan, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = run(capsys, *(plan if word == "PLAN" else word for word in words))
    assert code == 2
    assert output.err.count("\n") == 1
    assert told in output.err


def test_a_profile_has_a_row_a_layer_and_says_what_was_measured(job, tmp_path, capsys):
    out = tmp_path / "profile.json"
    code, told = run(capsys, "profile", job, "--out", out, "--rounds", 1)
    assert code == 0
    assert "emulated" in told.out
    profile = json.loads(out.read_text())
    assert (profile["format"], profile["version"], profile["source"]) == ("hybrid-profile", 1, "measured")
    assert [cell["chip"] for cell in profile["cells"]] == ["trn2", "h100"]
    for cell in profile["cells"]:
        assert cell["update_s"] > 0
        for name in ("forward_s", "input_gradient_s", "weight_gradient_s"):
            assert len(cell[name]) == len(profile["layers"]) == 4
            assert min(cell[name]) > 0
    assert write_profile(read_profile(profile)) == profile


def test_a_measured_profile_holds_the_bytes_that_the_formulas_say(job, tmp_path, capsys):
    from hybrid.job_file import load_job
    from hybrid.models.profile import build_profile

    run(capsys, "profile", job, "--out", tmp_path / "p.json", "--rounds", 1)
    measured = json.loads((tmp_path / "p.json").read_text())["sizes"][0]
    loaded = load_job(job)
    formulas = build_profile(loaded.model, microbatch=2, precision="fp32").layers
    assert measured["saved_bytes"] == [layer.saved_activation_bytes // 2 for layer in formulas]
    assert measured["num_parameters"] == [layer.num_parameters for layer in formulas]
