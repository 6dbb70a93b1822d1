"""The corpus: the same files give the same text, and what cannot be trained on is refused. No torch."""

import pytest

from hybrid.config import DataConfig
from hybrid.errors import DataError
from hybrid.models.corpus import MIN_BYTES, Document, open_corpus, part_documents

LINE = "All the world's a stage, and all the men and women merely players.\n"


def write(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder


def text_config(path, **more):
    return DataConfig(source="text", path=path, **more)


def many_files(folder, count=60):
    return write(folder, {f"part{number:03d}/a.txt": f"{number}\n" + LINE * 20 for number in range(count)})


def names(documents):
    return [document.name for document in documents]


def test_the_standard_library_is_read_without_tests_and_packages():
    corpus = open_corpus(DataConfig())
    parts = {part for document in corpus.train + corpus.held_out for part in document.name.split("/")}
    assert not parts & {"site-packages", "test", "tests", "encodings"}
    assert "argparse.py" in parts
    assert 3_000_000 < corpus.train_bytes + corpus.held_out_bytes <= 8_000_000
    assert "Python standard library" in corpus.description


def test_the_same_corpus_has_the_same_digest_and_another_has_another(tmp_path):
    many_files(tmp_path)
    first, again = open_corpus(text_config(tmp_path)), open_corpus(text_config(tmp_path))
    assert first == again
    other = open_corpus(text_config(tmp_path, held_out_share=0.2))
    assert other.sha256 != first.sha256
    (tmp_path / "part003" / "a.txt").write_text("Another line.\n" + LINE * 20)
    assert open_corpus(text_config(tmp_path)).sha256 != first.sha256


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    write(tmp_path, dict.fromkeys(("b.txt", "a/z.txt", "a.txt", "c.md"), LINE * 100))
    corpus = open_corpus(text_config(tmp_path, held_out_share=0.4))
    assert sorted(names(corpus.train + corpus.held_out)) == ["a.txt", "a/z.txt", "b.txt"]
    assert names(corpus.train) == sorted(names(corpus.train))
    assert len(corpus.train) == 2


def test_the_corpus_is_cut_at_a_files_end(tmp_path):
    many_files(tmp_path)
    one = (tmp_path / "part000" / "a.txt").stat().st_size
    corpus = open_corpus(text_config(tmp_path, max_bytes=10 * one + one // 2, held_out_share=0.2))
    assert len(corpus.train + corpus.held_out) == 10
    assert corpus.train_bytes + corpus.held_out_bytes <= 10 * one + one // 2


def test_a_first_file_that_is_larger_than_the_cap_is_cut_at_a_lines_end(tmp_path):
    write(tmp_path, {"a.txt": LINE * 1000})
    corpus = open_corpus(text_config(tmp_path, max_bytes=20_000))
    text = "".join(d.text for d in corpus.train + corpus.held_out)
    assert len(text) == 20_000 // len(LINE) * len(LINE)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3])
def test_whole_files_are_held_out_up_to_the_share(tmp_path, share):
    many_files(tmp_path)
    corpus = open_corpus(text_config(tmp_path, held_out_share=share))
    total = corpus.train_bytes + corpus.held_out_bytes
    assert share * 0.8 < corpus.held_out_bytes / total <= share
    assert not set(names(corpus.train)) & set(names(corpus.held_out))


def test_a_file_keeps_its_side_when_others_come_and_go(tmp_path):
    many_files(tmp_path, 60)
    before = set(names(open_corpus(text_config(tmp_path, held_out_share=0.2)).held_out))
    (tmp_path / "part059" / "a.txt").unlink()
    after = set(names(open_corpus(text_config(tmp_path, held_out_share=0.2)).held_out))
    assert len(before ^ after) <= 2


def test_the_end_of_a_single_file_is_held_out(tmp_path):
    path = tmp_path / "only.txt"
    path.write_text("".join(f"{number} {LINE}" for number in range(500)))
    corpus = open_corpus(text_config(path, held_out_share=0.1))
    assert corpus.train[0].text + corpus.held_out[0].text == path.read_text()
    assert corpus.train[0].text.endswith("\n")
    assert 0.09 < corpus.held_out_bytes / path.stat().st_size < 0.11


def test_a_cut_never_splits_a_character():
    document = Document(name="a", text="é" * 999, size_bytes=1998)
    for share in (0.1, 0.2003, 0.4, 0.45):
        (head,), (tail,) = part_documents([document], share)
        assert head.text + tail.text == document.text
        assert head.size_bytes == len(head.text.encode())


def test_text_that_is_not_utf8_is_refused_with_file_and_byte(tmp_path):
    write(tmp_path, {"a.txt": LINE * 100, "b.txt": b"caf\xe9 au lait\n" * 100})
    with pytest.raises(DataError, match=r"b\.txt: not UTF-8 at byte 3\. Convert the file"):
        open_corpus(text_config(tmp_path))


def test_a_path_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.path: no such file or folder .*missing") as caught:
        open_corpus(text_config(tmp_path / "missing"))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("pattern", ["*.rst", "sub/**/*.txt"])
def test_a_pattern_that_matches_nothing_is_refused(tmp_path, pattern):
    write(tmp_path, {"a.txt": LINE * 100})
    with pytest.raises(DataError, match=r"data\.pattern: no file in .* matches"):
        open_corpus(text_config(tmp_path, pattern=pattern))


@pytest.mark.parametrize("pattern", ["", "/etc/*"])
def test_what_is_no_pattern_is_refused(tmp_path, pattern):
    with pytest.raises(DataError, match=r"data\.pattern: no pattern"):
        open_corpus(text_config(tmp_path, pattern=pattern))


@pytest.mark.parametrize("size", [0, MIN_BYTES - 1])
def test_too_little_text_is_refused_with_both_numbers(tmp_path, size):
    write(tmp_path, {"a.txt": "x" * size})
    with pytest.raises(DataError, match=rf"too small \(got '{size} bytes.*at least {MIN_BYTES} bytes"):
        open_corpus(text_config(tmp_path))


def test_an_unreadable_file_is_refused(tmp_path):
    write(tmp_path, {"a.txt": LINE * 100})
    (tmp_path / "b.txt").symlink_to("/proc/self/mem")
    if not (tmp_path / "b.txt").is_file():
        pytest.skip("no /proc here")
    with pytest.raises(DataError, match=r"b\.txt: cannot be read"):
        open_corpus(text_config(tmp_path))
