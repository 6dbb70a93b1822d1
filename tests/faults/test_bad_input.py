"""Wrong jobs, fleets, plans, checkpoints and words: each ends at once in one line that helps, and leaves nothing."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from hybrid.runtime import preflight

WRONG_JOBS: dict[str, tuple[str, object, tuple[str, ...]]] = {
    # what is wrong: (key, value, what the line must say)
    "unknown key": ("stepps", 5, ("job.yaml, line", "stepps: unknown key", "valid: name, seed", "Did you mean steps?")),
    "unknown key of the model": (
        "model.hiden_size",
        64,
        ("line", "model.hiden_size: unknown key", "num_blocks", "Did you mean hidden_size?"),
    ),
    "unknown key of an island": (
        "fleet.islands.1.chips",
        2,
        ("line 26: fleet.islands.1.chips: unknown key", "valid: name, device, count"),
    ),
    "unknown key of a link": ("fleet.links.0.gbps", 10, ("fleet.links.0.gbps: unknown key", "bandwidth_bytes_per_s")),
    "text for a number": ("steps", "many", ("steps: not a whole number (got 'many')", "valid: a whole number")),
    "half a step": ("steps", 2.5, ("steps: not a whole number (got 2.5)",)),
    "flag for a number": ("optimizer.learning_rate", True, ("learning_rate: not a number (got True)",)),
    "number for a mapping": (
        "batch",
        5,
        ("batch: not a mapping (got 5)", "valid: a mapping of global_batch, microbatch"),
    ),
    "mapping for a list": ("fleet.islands", {"a": 1}, ("fleet.islands: not a list (got 'a mapping')",)),
    "infinite rate": ("optimizer.learning_rate", float("inf"), ("learning_rate: not a finite number (got inf)",)),
    "zero steps": ("steps", 0, ("steps: out of range (got 0)", "valid: a whole number more than 0")),
    "too many blocks": ("model.num_blocks", 10**9, ("model.num_blocks: out of range", "at most 1024")),
    "too many microbatches": ("batch.global_batch", 900_000, ("450000 microbatches", "at most 4096 microbatches")),
    "name of a file elsewhere": ("name", "../../x", ("name: not a usable name (got '../../x')", "letters, digits")),
    "unknown precision": ("precision", "fp23", ("precision: no such choice (got 'fp23')", "fp32 or bf16 or fp64")),
    "unknown schedule": ("schedule", "1f1", ("schedule: no such choice (got '1f1')", "Did you mean 1f1b?")),
    "batch not divisible": (
        "batch.microbatch",
        3,
        ("global_batch 4 is not a multiple of microbatch 3", "microbatch 1, 2, 4"),
    ),
    "heads that do not divide": ("model.num_heads", 5, ("hidden_size 32 is not a multiple of num_heads 5", "30 or 40")),
    "odd head size": ("model.hidden_size", 12, ("head size 3", "is odd", "valid: hidden_size 8 or 16")),
    "key heads that do not divide": (
        "model.num_kv_heads",
        3,
        ("num_heads 4 is not a multiple of num_kv_heads 3", "1, 2, 4"),
    ),
    "more stages than layers": ("num_stages", 5, ("num_stages 5 is more than the model's 4 layers", "valid: 1 to 4")),
    "more stages than chips": (
        "num_stages",
        3,
        ("num_stages must fit the fleet's 2 chips", "(got 3)", "valid: 1 to 2"),
    ),
    "more chips than layers": ("fleet.islands.0.count", 7, ("8 chips but only 4 layers", "num_stages 1 to 4")),
    "path without text": ("data.source", "python-stdlib", ("`path` goes with `source: text`",)),
    "text without path": ("data.path", ..., ("`path` goes with `source: text`",)),
    "no such text": ("data.path", "nowhere.txt", ("data.path: no such file or folder", "nowhere.txt")),
    "folder without such files": ("data.path", ".", ("matches (got '**/*.none')", "data.pattern")),
    "too long a sample": ("model.sequence_length", 4000, ("text is shorter than one sample", "at least 4001 tokens")),
    "fleet is a word": ("fleet", "cloud", ("fleet: not a fleet (got 'cloud')", "islands", "the word ray")),
    "fleet of a cluster that is not named": ("fleet", "ray", ("`fleet: ray` needs a cluster", "--address")),
    "no fleet": ("fleet", ..., ("fleet: the key is missing", "Add it")),
    "fleet without islands": (
        "fleet.islands",
        [],
        ("fleet.islands: a list with too few entries", "a list of 1 or more"),
    ),
    "island without device": ("fleet.islands.0.device", ..., ("line 20: fleet.islands.0.device: the key is missing",)),
    "unknown chip": (
        "fleet.islands.0.device",
        "trn22",
        ("islands.trainium.device", "no such chip or system (got 'trn22')", "valid: trn2"),
    ),
    "chip that is only announced": ("fleet.islands.0.device", "trn4", ("trn4 is announced", "has not told")),
    "unknown backend": (
        "fleet.islands.1.backend",
        "tpu",
        ("islands.1.backend: no such choice (got 'tpu')", "auto or cpu or emulated"),
    ),
    "backend that cannot play the chip": (
        "fleet.islands.0.backend",
        "cpu",
        ("the backend cpu cannot play the chip trn2", "emulated"),
    ),
    "island twice": ("fleet.islands.1.name", "trainium", ("island trainium is named twice",)),
    "link to no island": (
        "fleet.links.0.between",
        ["trainium", "amd"],
        ("link names unknown island amd", "trainium, nvidia"),
    ),
    "link with one end": ("fleet.links.0.between", ["trainium"], ("fleet.links.0.between.1", "the list is too short")),
    "link without bandwidth": (
        "fleet.links.0.bandwidth_bytes_per_s",
        0,
        ("out of range (got 0)", "a number more than 0"),
    ),
    "model over the fleet's memory": (
        "fleet.islands.1.memory_bytes",
        300_000,
        ("the model does not fit", "bytes more"),
    ),
    "precision that the chip lacks": ("precision", "fp64", ("chip trn2 of island trainium has no fp64", "bf16")),
    "runs_dir under a file": (
        "runs_dir",
        "text.txt/runs",
        ("runs_dir: nothing can be written there", "text.txt: Not a directory"),
    ),
    "runs_dir that cannot be made": (
        "runs_dir",
        "/proc/runs",
        ("runs_dir: nothing can be written there", "(got '/proc/runs')"),
    ),
    "inproc between processes": ("runtime.placement", "ray", ("inproc joins threads of one process", "transport tcp")),
    "catalog that is not there": ("fleet.catalog", "mine.yaml", ("catalog file cannot be read", "mine.yaml")),
}


@pytest.mark.parametrize("what", WRONG_JOBS)
def test_a_wrong_job_is_refused_in_one_line_and_nothing_is_written(bench, what):
    key, value, said = WRONG_JOBS[what]
    bench.set(key, value)
    if what == "folder without such files":
        bench.set("data.pattern", "**/*.none")
    if what == "model over the fleet's memory":
        bench.set("fleet.islands.0.memory_bytes", 300_000)
    bench.write_job()
    bench.refused_untouched("train job.yaml", *said)


WRONG_FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("job file holds nothing", "valid: a mapping of name, seed")),
    "a list": (b"- 1\n- 2\n", ("job file holds no mapping",)),
    "not YAML": (b"name: x\nsteps: [1\nfleet: ray\n", ("job.yaml, line 3: job file is not YAML", "Mend that line")),
    "binary": (bytes(range(256)), ("job file is not UTF-8 text at byte 128",)),
    "binary that is UTF-8": (b"name: \x00\x01", ("job file is not YAML", "special characters")),
    "a key twice": (
        b"steps: 1\nfleet: ray\nsteps: 2\n",
        ("job.yaml, line 3: job file is not YAML: steps is given twice",),
    ),
    "a date that is none": (b"name: 2026-13-45\nfleet: ray\n", ("job file is not YAML: month must be in 1..12",)),
    "a python object": (
        b"name: !!python/object/apply:os.system ['true']\n",
        ("line 1", "could not determine a constructor"),
    ),
    "a number for a key": (
        b"7: 8\nfleet: ray\n",
        ("job.yaml, line 1: 7: a key that is not a text", "a mapping of name, seed"),
    ),
    "nested too deep": (b"[" * 1000, ("job file is not YAML: nested too deep",)),
}


@pytest.mark.parametrize("what", WRONG_FILES)
def test_a_job_file_that_is_no_job_is_refused(bench, what):
    content, said = WRONG_FILES[what]
    (bench.folder / "job.yaml").write_bytes(content)
    bench.refused_untouched("train job.yaml", *said)


RAY = "(a job for Ray) "

WRONG_WORDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no such job": ("train nowhere.yaml", ("no such job file (got 'nowhere.yaml')", "examples/")),
    "folder for a job": ("train .", ("job file cannot be read: Is a directory (got '.')",)),
    "no job": ("train", ("Missing argument 'JOB'", "hybrid train --help")),
    "no such command": (
        "trian job.yaml",
        ("No such command 'trian'", "valid: doctor, plan, train", "Did you mean 'train'?"),
    ),
    "no such option": ("train job.yaml --bogus", ("No such option: --bogus", "valid: --address, --reference")),
    "no such bench": ("bench speed", ("No such command 'speed'", "kernels,")),
    "override without a value": ("plan job.yaml --set steps", ("an override is KEY=VALUE (got 'steps')",)),
    "override without a key": ("plan job.yaml --set =5", ("an override is KEY=VALUE (got '=5')",)),
    "override of no mapping": ("plan job.yaml --set modle.num_blocks=3", ("no mapping modle", "Did you mean model?")),
    "override of no key": (
        "plan job.yaml --set batch.micro=2",
        ("--set batch.micro=2: batch.micro: unknown key", "microbatch"),
    ),
    "override that is not YAML": ("plan job.yaml --set name={", ("--set name={", "an override's value is not YAML")),
    "override out of range": (
        "plan job.yaml --set seed=3 --set steps=-1",
        ("--set steps=-1: steps: out of range (got -1)", "more than 0"),
    ),
    "plan that is not there": (
        "train job.yaml --plan no.yaml",
        ("no such plan file (got 'no.yaml')", "--out plan.yaml"),
    ),
    "plan that is a folder": ("train job.yaml --plan .", ("plan file cannot be read: Is a directory",)),
    "plan that is a text": ("train job.yaml --plan text.txt", ("text.txt: not a mapping",)),
    "plan into no folder": ("plan job.yaml --out no/plan.yaml", ("the plan cannot be written", "no/plan.yaml")),
    "resume from nowhere": ("train job.yaml --resume no", ("no whole checkpoint there (got 'no')", "run folder")),
    "resume from a folder without checkpoints": ("train job.yaml --resume .", ("no whole checkpoint there (got '.')",)),
    "resume of the reference from nowhere": ("train job.yaml --reference --resume no", ("no whole checkpoint there",)),
    "export of nothing": ("export no --to out", ("no whole checkpoint there (got 'no')",)),
    "export to a folder that is there": ("export no --to .", ("--to: the export's folder is there already (got '.')",)),
    "address without a port": (
        RAY + "train job.yaml --address localhost",
        ("no address of a running Ray", "valid: HOST:PORT"),
    ),
    "address that is a URL": (RAY + "train job.yaml --address http://localhost:8265", ("no address of a running Ray",)),
    "dashboard that is no URL": ("submit job.yaml --address localhost:8265", ("no URL of a Ray dashboard", "http://")),
    "submit without an address": ("submit job.yaml", ("Missing option '--address'",)),
    "submit of a job that is not there": ("submit no.yaml --address http://localhost:1", ("no such job file",)),
}


@pytest.mark.parametrize("what", WRONG_WORDS)
def test_a_wrong_command_line_is_refused_in_one_line_and_nothing_is_written(bench, what):
    words, said = WRONG_WORDS[what]
    if words.startswith(RAY):
        bench.set("runtime", {"placement": "ray"})
        bench.write_job()
    bench.refused_untouched(words.removeprefix(RAY), *said)


@pytest.mark.parametrize("words", ["plan job.yaml --json", "train job.yaml --json --resume no"])
def test_standard_output_stays_empty_for_those_who_parse_it(bench, words):
    if "plan" in words:
        bench.set("steps", 0)
        bench.write_job()
    assert bench.refused_untouched(words).out == ""


WRONG_TEXTS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("the corpus is too small (got '0 bytes in 1 files')", "at least 4096 bytes")),
    "tiny": (b"a few words\n" * 10, ("the corpus is too small (got '120 bytes in 1 files')", "Give more text")),
    "undecodable": (b"text\n" * 2000 + b"\xff\xfe", ("text.txt: not UTF-8 at byte 10000", "Convert the file")),
}


@pytest.mark.parametrize("what", WRONG_TEXTS)
@pytest.mark.parametrize("words", ["train job.yaml", "train job.yaml --reference"])
def test_a_text_that_cannot_be_trained_on_is_refused(bench, what, words):
    content, said = WRONG_TEXTS[what]
    (bench.folder / "text.txt").write_bytes(content)
    bench.refused_untouched(words, *said)


def test_a_catalog_row_with_an_unknown_column_is_refused(bench):
    row = {"memory_gb": 40, "colour": "red", "source": "me", "date": "2026-11", "confidence": "assumed"}
    (bench.folder / "mine.yaml").write_text(yaml.safe_dump({"chips": {"h100": row}}))
    bench.set("fleet.catalog", "mine.yaml")
    bench.write_job()
    bench.refused_untouched("plan job.yaml", "mine.yaml: chips.h100: unknown column (got 'colour')", "memory_gb")


def test_more_than_this_machine_holds_is_refused_before_the_system_kills_the_job(bench):
    for key, value in (("hidden_size", 131_072), ("intermediate_size", 400_000), ("num_blocks", 60)):
        bench.set(f"model.{key}", value)
    bench.write_job()
    bench.refused_untouched("train job.yaml --reference", "the whole model in one process needs", "GiB")
    for island in (0, 1):
        bench.set(f"fleet.islands.{island}.memory_bytes", 10**15)
    bench.write_job()
    bench.refused_untouched("train job.yaml", "all on this machine, needs", "GiB")


# Plans ----------------------------------------------------------------------------------------------------


def _edit_plan(bench, edit: Callable[[dict], None]) -> None:
    assert bench.run("plan", "job.yaml", "--out", "plan.yaml").code == 0
    path = bench.folder / "plan.yaml"
    plan = yaml.safe_load(path.read_text())
    edit(plan)
    path.write_text(yaml.safe_dump(plan, sort_keys=False))


def _replica(plan: dict) -> dict:
    return plan["replicas"][0]


WRONG_PLANS: dict[str, tuple[Callable[[dict], object], tuple[str, ...]]] = {
    "of another version": (lambda p: p.update(version=9), ("unknown plan version (got 9)", "valid: 2")),
    "with an unknown key": (lambda p: p.update(colour="red"), ("unknown key (got 'colour')", "valid: job, model")),
    "that lost a key": (lambda p: _replica(p).pop("schedule"), ("key 'schedule' is missing",)),
    "with a text for a number": (lambda p: p.update(step_s="soon"), ("step_s: not a number (got 'soon')",)),
    "with a gap": (
        lambda p: _replica(p)["stages"][1].update(first_layer=3),
        ("first_layer must follow the stage before",),
    ),
    "of another precision": (lambda p: p.update(precision="bf16"), ("its precision is bf16, the job's is fp32",)),
    "of another schedule": (
        lambda p: _replica(p).update(schedule="gpipe"),
        ("its schedule is gpipe, the job's is 1f1b",),
    ),
    "of another model": (lambda p: p.update(model="decoder of 9 blocks of 9"), ("its model is decoder of 9",)),
    "of another island": (
        lambda p: _replica(p)["stages"][0].update(island="tpu"),
        ("no such island (got 'tpu')", "trainium, nvidia"),
    ),
    "of another chip": (
        lambda p: _replica(p)["stages"][0].update(chip="trn1"),
        ("chip", "(got 'trn1')", "valid: trn2"),
    ),
    "of another backend": (
        lambda p: _replica(p)["stages"][0].update(backend="cuda"),
        ("backend", "(got 'cuda')", "emulated"),
    ),
    "of more chips": (
        lambda p: _replica(p)["stages"][1].update(island="trainium", chip="trn2"),
        ("more chips of island trainium than it has (got 2)", "at most 1"),
    ),
    "of more memory": (
        lambda p: _replica(p)["stages"][0].update(memory_limit_bytes=10**15),
        ("holds less than the plan counts on", "at most 103079215104 bytes"),
    ),
    "of two ranks a stage": (
        lambda p: _replica(p)["stages"][0].update(ranks=[0, 2], width=2),
        ("more chips of island trainium than it has (got 2)",),
    ),
    "of ranks out of order": (
        lambda p: _replica(p)["stages"][0].update(ranks=[2]),
        ("rank 0 is missing", "(got 2)", "ranks 0 to 1"),
    ),
}


@pytest.mark.parametrize("what", WRONG_PLANS)
def test_a_plan_is_refused(bench, what):
    edit, said = WRONG_PLANS[what]
    _edit_plan(bench, edit)
    bench.refused_untouched("train job.yaml --plan plan.yaml", *said)


def test_a_plan_file_that_is_cut_is_refused(bench):
    assert bench.run("plan", "job.yaml", "--out", "plan.yaml").code == 0
    path = bench.folder / "plan.yaml"
    path.write_text(path.read_text()[:-40])
    bench.refused_untouched("train job.yaml --plan plan.yaml", "plan.yaml")


# Checkpoints ----------------------------------------------------------------------------------------------


@pytest.fixture
def trained(bench) -> Path:
    """The checkpoint of a run of two steps; the job is the one that made it, with four steps to do."""
    bench.set("runtime.transport", "inproc")
    bench.write_job()
    ended = bench.run("train", "job.yaml", "--json")
    assert ended.code == 0, ended.err
    bench.set("steps", 4)
    bench.write_job()
    return Path(json.loads(ended.out)["checkpoint"])


def test_a_checkpoint_is_refused_when_it_is_not_whole_or_not_of_this_job(bench, trained, tmp_path_factory):
    spare = tmp_path_factory.mktemp("spare") / "checkpoint"
    shutil.copytree(trained, spare)

    def refuse(what: str, spoil: Callable[[], object], *said: str, words: str = "train job.yaml") -> None:
        job = (bench.folder / "job.yaml").read_text()
        spoil()
        try:
            bench.refused_untouched(f"{words} --resume {trained}", *said)
        except AssertionError as error:
            raise AssertionError(f"{what}: {error}") from error
        finally:
            (bench.folder / "job.yaml").write_text(job)
            shutil.rmtree(trained.parent)
            shutil.copytree(spare, trained)

    def cut() -> None:
        os.truncate(trained / "layer-001.safetensors", 1000)

    def alter() -> None:
        path = trained / "layer-003.safetensors"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def manifest(edit: Callable[[dict], object]) -> Callable[[], None]:
        def spoil() -> None:
            path = trained / "manifest.json"
            raw = json.loads(path.read_text())
            edit(raw)
            path.write_text(json.dumps(raw))

        return spoil

    def job(key: str, value: object) -> Callable[[], None]:
        def spoil() -> None:
            raw = yaml.safe_load((bench.folder / "job.yaml").read_text())
            *parents, last = key.split(".")
            where = raw
            for parent in parents:
                where = where[parent]
            where[last] = value
            (bench.folder / "job.yaml").write_text(yaml.safe_dump(raw))

        return spoil

    refuse("truncated", cut, "layer-001.safetensors: checkpoint file is cut: 1000 bytes of")
    refuse("altered", alter, "layer-003.safetensors: checkpoint file is altered: its sha256 differs")
    refuse("altered, by the reference", alter, "altered", words="train job.yaml --reference")
    refuse("file lost", (trained / "layer-002.safetensors").unlink, "checkpoint file is missing", "layer-002")
    refuse(
        "layer lost",
        manifest(lambda raw: raw["files"].pop("layer-003.safetensors")),
        "checkpoint lacks a layer (got 'layer-003.safetensors')",
    )
    refuse("damaged", lambda: (trained / "manifest.json").write_text("{"), "manifest.json: manifest is damaged")
    refuse("no text", lambda: (trained / "manifest.json").write_bytes(b"\xff"), "manifest is damaged")
    refuse("a list", lambda: (trained / "manifest.json").write_text("[]"), "manifest is damaged")
    refuse("no facts", manifest(lambda raw: raw.pop("facts")), "manifest is damaged: it has no 'facts'")
    refuse("bad count", manifest(lambda raw: raw.update(steps_done="2")), "manifest is damaged: steps_done is '2'")
    refuse("format", manifest(lambda raw: raw.update(format=9)), "checkpoint of another format (got 9)", "valid: 1")
    refuse(
        "outside",
        manifest(lambda raw: raw["files"].update({"../x": {"size_bytes": 1, "sha256": ""}})),
        "manifest names a file outside its folder (got '../x')",
    )
    refuse("only partial", lambda: trained.rename(f"{trained}.partial"), "only the unfinished step-000002.partial")
    refuse("other model", job("model.hidden_size", 64), "model.hidden_size is 32 there and 64 in the job", "Set model")
    refuse("other seed", job("seed", 8), "seed is 7 there and 8 in the job", "Set seed to 7")
    refuse("other batch", job("batch.global_batch", 8), "global_batch is 4 there and 8", "Set batch.global_batch to 4")
    refuse("at the end", job("steps", 2), "checkpoint is at the job's end or beyond it (got 2)", "steps = 2")


def test_a_checkpoint_of_another_text_is_refused_before_a_run_folder_is_made(bench, trained):
    (bench.folder / "text.txt").write_text("quite another text, with other words in it\n" * 400)
    runs = sorted((bench.folder / "runs").iterdir())
    bench.refused(f"train job.yaml --resume {trained}", "checkpoint is of another job: data is", "same text")
    assert sorted((bench.folder / "runs").iterdir()) == runs
    assert not list((bench.folder / "cache" / "tokens").glob(".*"))


def test_an_export_that_fails_leaves_nothing(bench, trained):
    bench.refused_untouched(
        f"export {trained} --to text.txt/out", "--to: nothing can be written there", "Not a directory"
    )
    layer = trained / "layer-002.safetensors"
    layer.write_bytes(layer.read_bytes()[:-1] + b"x")
    bench.refused_untouched(f"export {trained} --to new/out", "layer-002.safetensors: checkpoint file is altered")
    assert not (bench.folder / "new").exists()


# The machine ----------------------------------------------------------------------------------------------


@pytest.fixture
def taken_port() -> Iterator[int]:
    """A port of this machine at which something listens and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_taken_coordinator_port_is_refused(bench, taken_port):
    bench.set("runtime.coordinator_port", taken_port)
    bench.write_job()
    bench.refused_untouched(
        "train job.yaml", "runtime.coordinator_port", "in use", f"127.0.0.1:{taken_port}", "0 for any"
    )


@pytest.mark.parametrize("words", ["train job.yaml --address ADDRESS", "plan job.yaml --address ADDRESS"])
def test_a_ray_address_at_which_nobody_listens_is_refused(bench, closed_port, words):
    bench.set("runtime", {"placement": "ray"})
    bench.write_job()
    address = f"127.0.0.1:{closed_port}"
    bench.refused_untouched(words.replace("ADDRESS", address), "no Ray answers there: Connection refused", address)


@pytest.mark.parametrize(
    "words", ["train job.yaml --address 127.0.0.1:", "submit job.yaml --address http://127.0.0.1:"]
)
def test_an_address_at_which_something_else_listens_is_refused(bench, taken_port, words, monkeypatch):
    monkeypatch.setattr(preflight, "_CONNECT_TIMEOUT_S", 0.2)
    bench.set("runtime", {"placement": "ray"})
    bench.write_job()
    bench.refused_untouched(f"{words}{taken_port}", "--address: no Ray answers there: silence", str(taken_port))


def test_a_dashboard_that_does_not_answer_is_refused(bench, closed_port):
    bench.refused_untouched(f"submit job.yaml --address http://127.0.0.1:{closed_port}", "no Ray answers there")


def test_a_cluster_fleet_at_an_address_that_does_not_answer_is_refused(bench, closed_port):
    bench.set("fleet", "ray")
    bench.set("runtime", {"placement": "ray"})
    bench.write_job()
    bench.refused_untouched(f"train job.yaml --address 127.0.0.1:{closed_port}", "no Ray answers there")


# Divergence -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["", " --reference"])
def test_a_loss_that_is_no_number_ends_the_job_with_the_step_and_the_last_checkpoint_unharmed(bench, reference):
    bench.set("steps", 6)
    bench.set("checkpoint", {"every_steps": 1})
    bench.set("optimizer", {"learning_rate": 1e30, "warmup_steps": 6})
    bench.write_job()
    ended = bench.refused(f"train job.yaml{reference}", "step 1 (from 0): the loss is", "nan", "Lower optimizer")
    (run,) = (bench.folder / "runs").iterdir()
    checkpoint = Path("runs") / run.name / "checkpoints" / "step-000001"
    assert f"go on with --resume {checkpoint}" in ended.err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000001"]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["event"] == "step"] == [0]
    # The same bytes as those of a job that ended before the step that diverged.
    short = bench.run("train", "job.yaml", "--json", "--set", "steps=1")
    whole = Path(json.loads(short.out)["checkpoint"])
    for layer in whole.glob("layer-*"):
        assert layer.read_bytes() == (bench.folder / checkpoint / layer.name).read_bytes()


def test_a_resumed_job_that_diverges_names_the_checkpoint_from_which_it_can_go_on(bench, trained):
    ended = bench.refused(f"train job.yaml --resume {trained} --set optimizer.learning_rate=1e30", "step 3 (from 0)")
    assert f"go on with --resume {trained}" in ended.err
    assert bench.run("train", "job.yaml", "--resume", str(trained)).code == 0


def test_a_job_that_diverges_in_its_first_step_leaves_no_run_folder(bench, monkeypatch):
    from hybrid.runtime import reference

    monkeypatch.setattr(reference, "global_norm", lambda squares: float("nan"))
    bench.refused("train job.yaml --reference", "step 0 (from 0)", "No checkpoint was written yet")
    assert not list((bench.folder / "runs").iterdir())


@pytest.mark.parametrize("backend", ["cuda", "neuron"])
def test_a_real_device_that_this_machine_lacks_is_refused_before_ray_is_started(bench, backend, tmp_path):
    if any(next(Path("/dev").glob(name), None) for name in ("nvidia[0-9]*", "dxg", "nv[gh]*", "neuron[0-9]*")):
        pytest.skip("this machine may have such a device")
    bench.set("runtime", {"placement": "ray"})
    bench.set("num_stages", 2)
    bench.set("fleet.islands.0.backend", backend)
    bench.set("fleet.islands.0.device", {"cuda": "h100", "neuron": "trn2"}[backend])
    bench.write_job()
    bench.refused_untouched("train job.yaml", f"no device for the backend {backend}", "backend: emulated")
    found = tmp_path / "dev"
    found.mkdir()
    for name in ("nvidia0", "neuron0"):
        (found / name).write_text("")
    preflight.check_devices([backend, "cpu"], found)


def test_a_real_device_that_this_machine_lacks_is_told_by_its_rank(bench):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    bench.set("fleet.islands.1.backend", "cuda")
    bench.write_job()
    bench.refused("train job.yaml", "rank 1: this torch sees no CUDA device", "backend: emulated")
    assert not list((bench.folder / "runs").iterdir())


# A real process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train job.yaml --set stepps=1", "stepps: unknown key"),
        ("plan job.yaml --set fleet={islands: [{name: a, device: trn22}]}", "no such chip or system (got 'trn22')"),
        ("train nowhere.yaml", "no such job file"),
        ("train job.yaml --resume nowhere", "no whole checkpoint there"),
    ],
)
def test_the_installed_command_refuses_with_exit_code_2_and_one_line(bench, words, said):
    before = bench.files()
    head, _, value = words.partition("--set ")
    ended = subprocess.run(
        [sys.executable, "-m", "hybrid.cli", *head.split(), *(["--set", value] if value else [])],
        cwd=bench.folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
    assert bench.files() == before
