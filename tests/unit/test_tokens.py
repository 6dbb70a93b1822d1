"""The token file: what it holds, who may make it at once, and what damage it notices. No torch."""

import json
import math
import multiprocessing
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer

from hybrid.config import DataConfig, ModelConfig
from hybrid.errors import DataError
from hybrid.models import tokens as tokens_module
from hybrid.models.corpus import open_corpus
from hybrid.models.tokens import END_OF_FILE, open_tokens, prepare_data, unigram_entropy_nats

TEXT = "the stage holds its layers and sends what they say to the next stage which holds more layers"
MODEL = ModelConfig(vocab_size=400, sequence_length=16)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A job's data: forty small files, and a cache of their own."""
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    words = TEXT.split()
    for number in range(40):
        text = "\n".join(" ".join(rng.choice(words, 8)) for _ in range(20)) + f"\nnaïve {number} ☃\n"
        (tmp_path / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    return DataConfig(source="text", path=tmp_path, pattern="*.txt", held_out_share=0.1)


def test_both_parts_decode_to_the_corpus(data):
    tokens = prepare_data(data, MODEL)
    corpus = open_corpus(data)
    tokenizer = Tokenizer.from_file(str(tokens.tokenizer_path))
    for ids, documents in ((tokens.train_tokens, corpus.train), (tokens.held_out_tokens, corpus.held_out)):
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert text == "".join(document.text + END_OF_FILE for document in documents)
    assert tokens.decode(tokens.train_tokens[:50].tolist()) in corpus.train[0].text


def test_ids_are_below_the_models_vocabulary_and_small(data):
    tokens = prepare_data(data, MODEL)
    assert tokens.train_tokens.dtype == np.dtype("<u2")
    assert tokens.train_tokens.max() < tokens.vocab_used <= tokens.vocab_size == 400
    assert np.count_nonzero(tokens.train_tokens == 0) == len(open_corpus(data).train)


def test_a_vocabulary_that_sixteen_bits_cannot_hold_takes_thirty_two(data):
    tokens = prepare_data(data, ModelConfig(vocab_size=70_000, sequence_length=16))
    assert tokens.train_tokens.dtype == np.dtype("<u4")
    assert tokens.vocab_used < 2000  # forty small files have no more words than that
    assert tokens.vocab_size == 70_000


def test_a_worker_reads_what_the_driver_prepared(data):
    made = prepare_data(data, MODEL)
    opened = open_tokens(made.path)
    assert np.array_equal(opened.train_tokens, made.train_tokens)
    assert (opened.sha256, opened.unigram_entropy_nats) == (made.sha256, made.unigram_entropy_nats)
    assert opened.bytes_per_token == open_corpus(data).train_bytes / len(opened.train_tokens)


def test_a_worker_needs_neither_tokenizers_nor_torch(data):
    path = prepare_data(data, MODEL).path
    program = (
        "import sys, pathlib; from hybrid.models.tokens import open_tokens;"
        f"from hybrid.models import sampler, profile; open_tokens(pathlib.Path({str(path)!r}));"
        "print(sorted({'torch', 'tokenizers', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr


def test_a_second_call_makes_nothing(data, monkeypatch):
    first = prepare_data(data, MODEL)
    monkeypatch.setattr(tokens_module, "_build", lambda *_: pytest.fail("made again"))
    assert prepare_data(data, MODEL).sha256 == first.sha256


def test_what_changes_the_tokens_changes_the_folder(data):
    first = prepare_data(data, MODEL)
    assert prepare_data(data, MODEL.model_copy(update={"vocab_size": 350})).path != first.path
    assert prepare_data(data, MODEL.model_copy(update={"sequence_length": 8})).path == first.path
    (data.path / "00.txt").write_text("the stage holds its layers\n" * 20)
    assert prepare_data(data, MODEL).path != first.path


def test_the_same_bytes_are_made_every_time(data, tmp_path, monkeypatch):
    first = prepare_data(data, MODEL)
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "elsewhere"))
    second = prepare_data(data, MODEL)
    assert second.path != first.path
    assert second.sha256 == first.sha256
    assert second.tokenizer_path.read_bytes() == first.tokenizer_path.read_bytes()


def _prepare(data, gate, answers):
    gate.wait(timeout=30)
    answers.put(prepare_data(data, MODEL).sha256)


def test_two_processes_may_prepare_the_same_file_at_once(data, tmp_path):
    context = multiprocessing.get_context("spawn")
    gate, answers = context.Barrier(2), context.Queue()
    both = [context.Process(target=_prepare, args=(data, gate, answers)) for _ in range(2)]
    for process in both:
        process.start()
    found = {answers.get(timeout=60) for _ in both}
    for process in both:
        process.join(timeout=30)
    assert len(found) == 1
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_one_who_comes_second_keeps_the_firsts_folder(data, monkeypatch):
    corpus = open_corpus(data)
    first = prepare_data(data, MODEL)
    inode = first.path.stat().st_ino
    tokens_module._build(first.path, corpus, MODEL.vocab_size)
    assert first.path.stat().st_ino == inode
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


def damage(path, how):
    file = path / "train.bin"
    if how == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    elif how == "altered":
        content = bytearray(file.read_bytes())
        content[100] ^= 1
        file.write_bytes(content)
    elif how == "missing":
        file.unlink()
    elif how == "manifest":
        (path / "manifest.json").write_text('{"format": 1, "dty')
    elif how == "keys":
        (path / "manifest.json").write_text('{"format": 1}')
    else:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


DAMAGES = ["cut", "altered", "missing", "manifest", "keys", "version"]


@pytest.mark.parametrize("how", DAMAGES)
def test_the_driver_makes_a_damaged_file_again(data, how):
    first = prepare_data(data, MODEL)
    whole = np.array(first.train_tokens)
    damage(first.path, how)
    second = prepare_data(data, MODEL)
    assert np.array_equal(second.train_tokens, whole)
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]


@pytest.mark.parametrize("how", [how for how in DAMAGES if how != "altered"])
def test_a_worker_refuses_a_damaged_file(data, how):
    path = prepare_data(data, MODEL).path
    damage(path, how)
    with pytest.raises(DataError, match=r"cut short|no such token file|cannot be read|another version"):
        open_tokens(path)


def test_a_worker_refuses_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="no such token file"):
        open_tokens(tmp_path / "nowhere")


def test_nothing_is_left_behind_when_making_fails(data, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokens_module, "_encode", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare_data(data, MODEL)
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_refused(data, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYBRID_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be written: Not a directory.*HYBRID_CACHE"):
        prepare_data(data, MODEL)


def test_a_text_shorter_than_one_sample_is_refused_with_both_numbers(data):
    with pytest.raises(DataError, match=r"held-out text is shorter .*got '\d+ tokens'.*at least 2001 tokens"):
        prepare_data(data, MODEL.model_copy(update={"sequence_length": 2000}))


def test_unigram_entropy_is_that_of_the_smoothed_counts():
    train = np.array([0, 0, 0, 1], dtype=np.uint16)
    held_out = np.array([0, 1, 2], dtype=np.uint16)
    # (3+1)/7, (1+1)/7, (0+1)/7 over a vocabulary of three.
    expected = -(math.log(4 / 7) + math.log(2 / 7) + math.log(1 / 7)) / 3
    assert unigram_entropy_nats(train, held_out, 3) == pytest.approx(expected, rel=1e-12)


def test_one_long_file_is_sampled_from_end_to_end(data, tmp_path, monkeypatch):
    # Only the second half says "zebra": a tokenizer trained on the beginning would not know the word.
    path = tmp_path / "long.txt"
    path.write_text("the stage holds its layers\n" * 4000 + "a zebra crossed the stage\n" * 4000)
    monkeypatch.setattr(tokens_module, "SAMPLE_BYTES", 60_000)
    tokens = prepare_data(DataConfig(source="text", path=path), MODEL)
    assert Tokenizer.from_file(str(tokens.tokenizer_path)).token_to_id("Ġzebra") is not None
