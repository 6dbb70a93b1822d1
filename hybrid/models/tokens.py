"""The token file: a corpus as numbers, memory-mapped, made once and shared by every rank.

`prepare_data` (driver) trains a byte-level BPE on the training text and writes a folder of the cache;
`open_tokens` (workers) maps it. No torch here, and `tokenizers` is imported only when a file has to be made.

    <cache>/tokens/<digest>/train.bin, held_out.bin    token ids, uint16 or uint32, little-endian
                            tokenizer.json             readable by `tokenizers` and Transformers
                            manifest.json              counts, checksums, versions, entropy
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hybrid.config import DataConfig, ModelConfig, cache_dir
from hybrid.errors import DataError
from hybrid.models.corpus import Corpus, Document, open_corpus
from hybrid.models.sampler import Tokens, num_windows

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FORMAT = 1
END_OF_FILE = "<|end|>"
"""The token after each document; its id is 0."""
SAMPLE_BYTES = 2_000_000
"""About this much trains the tokenizer, spread over the corpus; all 8 MB cost 2 s and save 1.5% of tokens."""
_PIECE = 1 << 14

_PARTS = ("train", "held_out")
_FILES = ("train.bin", "held_out.bin", "tokenizer.json")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenData:
    """A token file that is open."""

    path: Path
    """Its folder; what a worker is told."""
    train_tokens: Tokens
    """(N,) memory-mapped."""
    held_out_tokens: Tokens
    """(M,) memory-mapped."""
    vocab_size: int
    """Of the model; every id is below it."""
    vocab_used: int
    """Words that the tokenizer has; fewer than `vocab_size` where the text is small."""
    bytes_per_token: float
    """Of the training text."""
    unigram_entropy_nats: float
    """Held-out loss of a model that knows only how frequent each token is in the training text."""
    description: str
    sha256: str
    """Of both parts; the same on two machines exactly when their tokens are."""

    @property
    def tokenizer_path(self) -> Path:
        """The tokenizer, as `tokenizers.Tokenizer.from_file` reads it."""
        return self.path / "tokenizer.json"

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        from tokenizers import Tokenizer

        text: str = Tokenizer.from_file(str(self.tokenizer_path)).decode(list(ids))
        return text


def prepare_data(data: DataConfig, model: ModelConfig) -> TokenData:
    """Return the job's token file, made first if the cache doesn't hold it or holds it damaged.

    Two processes may prepare the same file at once: each writes its own folder, and the first to rename wins.

    Raises:
        DataError: no corpus, too little text for one window of each part, or a cache that cannot be written.
    """
    return prepare_tokens(open_corpus(data), model)


def prepare_tokens(corpus: Corpus, model: ModelConfig) -> TokenData:
    """Return the token file of a corpus that is open; see `prepare_data`."""
    _check_bytes(corpus, model.sequence_length)
    path = cache_dir() / "tokens" / _digest(corpus, model.vocab_size)
    if not _is_whole(path):
        _build(path, corpus, model.vocab_size)
    tokens = open_tokens(path)
    _check_windows(tokens, model.sequence_length)
    return tokens


def open_tokens(path: Path) -> TokenData:
    """Return a token file that `prepare_data` made; reads the manifest and maps the parts.

    Raises:
        DataError: no such file, one of another version, or one whose parts are cut short.
    """
    fix = "delete the folder; the next run makes it again"
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise DataError(
                "token file of another version",
                value=manifest["format"],
                valid=str(FORMAT),
                where=str(path),
                fix=fix,
            )
        dtype = np.dtype(manifest["dtype"])
        for name in _FILES:
            size = (path / name).stat().st_size
            if size != manifest["size_bytes"][name]:
                valid = f"{manifest['size_bytes'][name]} bytes"
                raise DataError(
                    "token file is cut short",
                    value=f"{size} bytes",
                    valid=valid,
                    where=str(path / name),
                    fix=fix,
                )
        parts: dict[str, Tokens] = {part: np.memmap(path / f"{part}.bin", dtype=dtype, mode="r") for part in _PARTS}
        return TokenData(
            path=path,
            train_tokens=parts["train"],
            held_out_tokens=parts["held_out"],
            **{key: manifest[key] for key in _FACTS},
        )
    except FileNotFoundError as error:
        raise DataError("no such token file", value=error.filename, fix="prepare the data first") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"token file cannot be read: {error}", where=str(path), fix=fix) from None


_FACTS = ("vocab_size", "vocab_used", "bytes_per_token", "unigram_entropy_nats", "description", "sha256")


def unigram_entropy_nats(train: Tokens, held_out: Tokens, vocab_size: int) -> float:
    """Return the mean -log p of the held-out tokens; p is counted on the training tokens, plus one a word."""
    counts = np.bincount(train, minlength=vocab_size) + 1.0
    log_p = np.log(counts / counts.sum())
    return float(-np.dot(np.bincount(held_out, minlength=vocab_size), log_p) / len(held_out))


def _digest(corpus: Corpus, vocab_size: int) -> str:
    """Name the folder by everything that its bytes depend on."""
    version = importlib.metadata.version("tokenizers")
    facts = (FORMAT, corpus.sha256, vocab_size, SAMPLE_BYTES, END_OF_FILE, version)
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:24]


def _check_content(path: Path) -> None:
    """Compare each file with its checksum.

    Raises:
        DataError: a file has changed since it was written.
    """
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    for name in _FILES:
        if _sha256(path / name) != manifest["sha256_of"][name]:
            raise DataError("token file has been altered", where=str(path / name), fix="delete its folder")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _check_bytes(corpus: Corpus, sequence_length: int) -> None:
    """Refuse a text that is too short whatever its tokenizer, before anything is written: a token is a byte or more."""
    for part, documents in (("training", corpus.train), ("held-out", corpus.held_out)):
        most = sum(document.size_bytes + 1 for document in documents)
        if num_windows(most, sequence_length) < 1:
            raise _too_short(part, f"at most {most} tokens", corpus.description, sequence_length)


def _check_windows(tokens: TokenData, sequence_length: int) -> None:
    for part, ids in (("training", tokens.train_tokens), ("held-out", tokens.held_out_tokens)):
        if num_windows(len(ids), sequence_length) < 1:
            raise _too_short(part, f"{len(ids)} tokens", tokens.description, sequence_length)


def _too_short(part: str, value: str, description: str, sequence_length: int) -> DataError:
    return DataError(
        f"the {part} text is shorter than one sample",
        value=value,
        valid=f"at least {sequence_length + 1} tokens (sequence_length + 1)",
        where=f"data: {description}",
        fix="give more text, a larger held_out_share, or a smaller model.sequence_length",
    )


def _build(path: Path, corpus: Corpus, vocab_size: int) -> None:
    """Make the folder under another name and rename it, so that nobody sees half of it."""
    building: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=path.parent))
        _write(building, corpus, vocab_size)
        _publish(building, path)
    except OSError as error:
        fix = "free space there, or set HYBRID_CACHE to a folder that can be written"
        raise DataError(f"token file cannot be written: {error.strerror}", where=str(path), fix=fix) from None
    finally:
        if building is not None:
            shutil.rmtree(building, ignore_errors=True)


def _publish(building: Path, path: Path) -> None:
    """Rename `building` to `path`, unless a whole folder is there already; a damaged one goes."""
    damaged = building.with_name(f"{building.name}-damaged")
    try:
        if path.exists() and not _is_whole(path):
            path.rename(damaged)  # ranks that have its parts mapped keep them
        building.rename(path)
    except OSError:
        if not _is_whole(path):  # else another process was first, with the same bytes
            raise
    finally:
        shutil.rmtree(damaged, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    try:
        open_tokens(path)
        _check_content(path)
    except DataError:
        return False
    return True


def _write(folder: Path, corpus: Corpus, vocab_size: int) -> None:
    tokenizer = _train_tokenizer(corpus.train, vocab_size)
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    train = _encode(tokenizer, corpus.train, dtype)
    held_out = _encode(tokenizer, corpus.held_out, dtype)
    train.tofile(folder / "train.bin")
    held_out.tofile(folder / "held_out.bin")
    tokenizer.save(str(folder / "tokenizer.json"))
    sha256_of = {name: _sha256(folder / name) for name in _FILES}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "dtype": dtype.str,
        "num_tokens": {"train": len(train), "held_out": len(held_out)},
        "size_bytes": {name: (folder / name).stat().st_size for name in _FILES},
        "sha256_of": sha256_of,
        "sha256": hashlib.sha256((sha256_of["train.bin"] + sha256_of["held_out.bin"]).encode()).hexdigest(),
        "corpus_sha256": corpus.sha256,
        "description": corpus.description,
        "tokenizers": importlib.metadata.version("tokenizers"),
        "vocab_size": vocab_size,
        "vocab_used": tokenizer.get_vocab_size(),
        "bytes_per_token": corpus.train_bytes / len(train),
        "unigram_entropy_nats": unigram_entropy_nats(train, held_out, vocab_size),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _train_tokenizer(documents: Sequence[Document], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on every k-th piece, so that the sample is spread over the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_FILE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    total = sum(document.size_bytes for document in documents)
    stride = max(1, round(total / SAMPLE_BYTES))
    pieces = (
        document.text[first : first + _PIECE]
        for document in documents
        for first in range(0, len(document.text), _PIECE)
    )
    tokenizer.train_from_iterator(itertools.islice(pieces, 0, None, stride), trainer=trainer)
    return tokenizer


def _encode(tokenizer: Tokenizer, documents: Sequence[Document], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Return the ids of all documents, each followed by the end-of-file token."""
    end = tokenizer.token_to_id(END_OF_FILE)
    rows: list[NDArray[Any]] = []
    for batch in _batches(documents):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            rows.append(np.array([*encoding.ids, end], dtype=dtype))
    return np.concatenate(rows) if rows else np.empty(0, dtype)


def _batches(documents: Sequence[Document], batch_bytes: int = 1 << 20) -> Iterator[list[str]]:
    """Group texts to about a mebibyte: enough for every core, without all encodings in memory at once."""
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document.text)
        size += document.size_bytes
        if size >= batch_bytes:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
