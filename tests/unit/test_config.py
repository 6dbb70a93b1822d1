"""The job: what is written comes back, what is left out has its default, what is relative is anchored."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hybrid.commands.job import read_job
from hybrid.config import JobConfig, cache_dir, dump_job, environment, parse_job
from hybrid.errors import ConfigError
from hybrid.job_file import load_job

FLEET = {"islands": [{"name": "a", "device": "trn2"}]}
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def _write(folder: Path, raw: object) -> Path:
    path = folder / "job.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return path


def test_a_job_needs_only_a_fleet_and_takes_the_documented_defaults():
    job = parse_job({"fleet": FLEET})
    assert (job.name, job.seed, job.steps, job.precision, job.schedule) == ("job", 1234, 100, "fp32", "1f1b")
    assert job.data.source == "python-stdlib"
    assert job.data.path is None
    assert job.model.num_layers == job.model.num_blocks + 2 == 10
    assert job.model.head_size == 32
    assert job.batch.num_microbatches == 8
    assert job.runtime.placement == "ray"
    assert job.fleet != "ray"
    assert job.fleet.islands[0].count == 1
    assert job.runs_dir == Path("runs")


def test_a_job_that_is_dumped_is_read_back_equal(tmp_path):
    job = parse_job(
        {
            "name": "x.1",
            "fleet": FLEET | {"links": [{"between": ["a", "a"], "bandwidth_bytes_per_s": 2.5e9}]},
            "optimizer": {"clip_norm": None, "learning_rate": 1},
            "emulation": {"time_scale": 12.5},
            "data": {"source": "text", "path": "/some/text"},
            "checkpoint": {"every_steps": 3},
        }
    )
    assert load_job(_write(tmp_path, dump_job(job))) == job


@given(
    seed=st.integers(0, 2**63 - 1),
    blocks=st.integers(1, 1024),
    heads=st.integers(1, 32),
    size=st.integers(1, 64),
    micro=st.integers(1, 64),
    count=st.integers(1, 64),
    rate=st.floats(1e-12, 1e6),
    tied=st.booleans(),
    stages=st.integers(1, 1026) | st.none(),
)
def test_any_right_job_survives_the_way_to_yaml_and_back(seed, blocks, heads, size, micro, count, rate, tied, stages):
    raw = {
        "seed": seed,
        "model": {
            "num_blocks": blocks,
            "hidden_size": 2 * heads * size,
            "num_heads": heads,
            "num_kv_heads": 1,
            "tied_embeddings": tied,
        },
        "batch": {"global_batch": micro * count, "microbatch": micro},
        "optimizer": {"learning_rate": rate},
        "num_stages": None if stages is None else min(stages, blocks + 2),
        "fleet": FLEET,
    }
    job = parse_job(raw)
    assert parse_job(yaml.safe_load(dump_job(job))) == job
    assert job.batch.num_microbatches == count


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_a_right_job(path):
    assert isinstance(load_job(path), JobConfig)


def test_there_are_examples():
    assert EXAMPLES


def test_input_paths_are_taken_from_the_files_folder_and_output_from_where_one_stands(tmp_path):
    raw = {
        "data": {"source": "text", "path": "corpus"},
        "fleet": FLEET | {"catalog": "mine.yaml"},
        "runs_dir": "out",
    }
    job = load_job(_write(tmp_path, raw))
    assert job.data.path == tmp_path / "corpus"
    assert job.fleet != "ray"
    assert job.fleet.catalog == tmp_path / "mine.yaml"
    assert job.runs_dir == Path("out")


def test_absolute_paths_stay(tmp_path):
    job = load_job(_write(tmp_path, {"data": {"source": "text", "path": "/corpus"}, "fleet": "ray"}))
    assert job.data.path == Path("/corpus")


def test_overrides_are_laid_over_the_file_and_their_paths_are_taken_from_here(tmp_path):
    path = _write(tmp_path, {"fleet": FLEET, "data": {"source": "text", "path": "corpus"}})
    job = read_job(
        path, ["steps=7", "batch.microbatch=2", "optimizer.clip_norm=null", "data.path=here", "name=a=b"[:6]]
    )
    assert (job.steps, job.batch.microbatch, job.optimizer.clip_norm, job.name) == (7, 2, None, "a")
    assert job.data.path == Path("here")


def test_a_whole_fleet_can_be_given_on_the_command_line(tmp_path):
    path = _write(tmp_path, {"fleet": "ray"})
    job = read_job(path, ["fleet={islands: [{name: x, device: h100, count: 3}]}"])
    assert job.fleet != "ray"
    assert job.fleet.islands[0].count == 3


def test_an_override_of_an_override_wins_in_the_order_given(tmp_path):
    assert read_job(_write(tmp_path, {"fleet": "ray"}), ["steps=7", "steps=8"]).steps == 8


def test_the_first_complaint_is_told_with_the_number_of_others():
    with pytest.raises(ConfigError, match=r"^job: seed: not a whole number \(and 2 more after it\)"):
        parse_job({"fleet": FLEET, "steps": "x", "seed": "y", "batch": {"global_batch": "z"}})


def test_a_number_with_an_exponent_may_be_written_as_people_do(tmp_path):
    # YAML 1.1 reads 1e-3 as text.
    assert load_job(_write(tmp_path, "fleet: ray\noptimizer: {learning_rate: 1e-3}\n")).optimizer.learning_rate == 1e-3


def test_the_line_of_the_complaint_is_the_line_of_the_key(tmp_path):
    islands = "    - name: a\n      device: trn2\n    - name: b\n      device: h100\n      count: 0\n"
    text = f"name: x\nfleet:\n  islands:\n{islands}"
    with pytest.raises(ConfigError, match=r"job.yaml, line 8: fleet.islands.1.count: out of range \(got 0\)"):
        load_job(_write(tmp_path, text))


def test_the_job_cannot_be_changed_once_it_is_read():
    job = parse_job({"fleet": FLEET})
    with pytest.raises(Exception, match="frozen"):
        job.steps = 5  # type: ignore[misc]


def test_the_cache_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("HYBRID_CACHE", "/a")
    assert cache_dir() == Path("/a")
    monkeypatch.delenv("HYBRID_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_dir() == Path("/b/hybrid")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "hybrid"
    assert environment("NO_SUCH_NAME", "else") == "else"
