"""Text to train on: the Python standard library's source, or a user's own files.

No torch, no network; the corpus stays where it is and only the token file is written, by `tokens`.
The same files always give the same corpus: they are read in the order of their names, cut at
`max_bytes` at a file's end, and the held-out part is chosen by a hash of the names.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hybrid.config import DataConfig
from hybrid.errors import DataError

MIN_BYTES = 4096
"""Less text than this is refused: no tokenizer of 300 words can be trained on it."""

# Not what a programmer wrote: other packages, test data in odd encodings, generated tables of code points.
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One file of the corpus, or a part of one."""

    name: str
    """Path relative to the corpus, with forward slashes."""
    text: str
    size_bytes: int
    """Of the text in UTF-8."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Corpus:
    """A corpus in memory, parted into training and held-out documents."""

    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    description: str
    sha256: str
    """Of the names, the bytes and the parting."""

    @property
    def train_bytes(self) -> int:
        """Size of the training text in UTF-8."""
        return sum(document.size_bytes for document in self.train)

    @property
    def held_out_bytes(self) -> int:
        """Size of the held-out text in UTF-8."""
        return sum(document.size_bytes for document in self.held_out)


def open_corpus(config: DataConfig) -> Corpus:
    """Return the corpus that the job asks for.

    Raises:
        DataError: nothing there, nothing matches, not UTF-8, or too little text.
    """
    if config.source == "python-stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        documents = _read(_stdlib_files(root), root, config.max_bytes, skip_undecodable=True)
        title = "Python standard library"
    else:
        assert config.path is not None, "checked by DataConfig"
        root = config.path if config.path.is_dir() else config.path.parent
        documents = _read(_user_files(config.path, config.pattern), root, config.max_bytes, skip_undecodable=False)
        title = str(config.path)
    total = sum(document.size_bytes for document in documents)
    if total < MIN_BYTES:
        raise DataError(
            "the corpus is too small",
            value=f"{total} bytes in {len(documents)} files",
            valid=f"at least {MIN_BYTES} bytes",
            where=f"data: {title}",
            fix="give more text with `source: text` and `path`",
        )
    train, held_out = part_documents(documents, config.held_out_share)
    description = f"{title}: {len(documents)} files, {total / 1e6:.2f} MB"
    return Corpus(train=train, held_out=held_out, description=description, sha256=_digest(train, held_out))


def part_documents(documents: Sequence[Document], share: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Return (training, held-out) documents; about `share` of the bytes, never more, is held out.

    Whole files are held out, in the order of a hash of their names, so that no held-out line stands beside
    a training line of the same file. Where every file is larger than the share, it is the end of the largest.
    """
    budget = int(share * sum(document.size_bytes for document in documents))
    chosen: set[str] = set()
    for document in sorted(documents, key=lambda d: hashlib.sha256(d.name.encode()).digest()):
        if 0 < document.size_bytes <= budget:
            chosen.add(document.name)
            budget -= document.size_bytes
    if chosen:
        train = tuple(d for d in documents if d.name not in chosen)
        return train, tuple(d for d in documents if d.name in chosen)
    largest = max(documents, key=lambda d: d.size_bytes)
    head, tail = _cut(largest, largest.size_bytes - budget)
    return tuple(head if d is largest else d for d in documents), (tail,)


def _stdlib_files(root: Path) -> Iterator[Path]:
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        # _sysconfigdata describes the machine that built Python, not the library.
        yield from (
            Path(folder, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        )


def _user_files(path: Path, pattern: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.exists():
        fix = "give the path of a text file or of a folder of text files"
        raise DataError("no such file or folder", value=str(path), where="data.path", fix=fix)
    try:
        found = [file for file in path.glob(pattern) if file.is_file()]
    except (ValueError, NotImplementedError) as error:
        fix = "give a relative pattern such as **/*.txt"
        raise DataError(f"no pattern: {error}", value=pattern, where="data.pattern", fix=fix) from None
    if not found:
        fix = "give the pattern of the files to read, such as **/*.md"
        raise DataError(f"no file in {path} matches", value=pattern, where="data.pattern", fix=fix)
    return found


def _read(files: Iterator[Path] | list[Path], root: Path, max_bytes: int, *, skip_undecodable: bool) -> list[Document]:
    """Read files in the order of their names until the next would go past `max_bytes`."""
    documents: list[Document] = []
    room = max_bytes
    for name, file in sorted((file.relative_to(root).as_posix(), file) for file in files):
        try:
            data = file.read_bytes()
            document = Document(name=name, text=data.decode("utf-8"), size_bytes=len(data))
        except UnicodeDecodeError as error:
            if skip_undecodable:
                continue
            fix = "convert the file to UTF-8, or leave it out by `pattern`"
            raise DataError(f"not UTF-8 at byte {error.start}", where=str(file), fix=fix) from None
        except OSError as error:
            fix = "make the file readable"
            raise DataError(f"cannot be read: {error.strerror}", where=str(file), fix=fix) from None
        if document.size_bytes > room:
            # A first file that is larger than the cap is cut rather than refused.
            return documents or [_cut(document, room)[0]]
        room -= document.size_bytes
        documents.append(document)
    return documents


def _cut(document: Document, size_bytes: int) -> tuple[Document, Document]:
    """Part a document after the last line that ends in its first `size_bytes`, or there if none does."""
    data = document.text.encode("utf-8")
    place = data.rfind(b"\n", 0, size_bytes) + 1 or size_bytes
    while place < len(data) and data[place] & 0xC0 == 0x80:  # inside a character: go back to its start
        place -= 1
    parts = (data[:place], data[place:])
    head, tail = (Document(name=document.name, text=part.decode("utf-8"), size_bytes=len(part)) for part in parts)
    return head, tail


def _digest(train: Sequence[Document], held_out: Sequence[Document]) -> str:
    digest = hashlib.sha256()
    for title, documents in (("train", train), ("held_out", held_out)):
        for document in documents:
            digest.update(f"{title}\0{document.name}\0{document.size_bytes}\0".encode())
            digest.update(document.text.encode("utf-8"))
    return digest.hexdigest()
