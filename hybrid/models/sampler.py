"""Which text a sample is: a pure function of (seed, step, sample), with no state to save.

Pure: numpy, no torch, no clock, no files. A corpus is cut into windows of `sequence_length` tokens that do
not overlap; each epoch visits every window once, in an order keyed by (seed, epoch). Any rank can therefore
read its own samples, a global batch may be split into microbatches in any way, and a resumed run sees the
same data.
"""

from __future__ import annotations

import hashlib
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Tokens: TypeAlias = "NDArray[np.unsignedinteger[Any]]"
Ids: TypeAlias = "NDArray[np.int64]"

_ROUNDS = 6


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """Return how many windows a text has; the last one needs one token more, for its last target."""
    return max(0, (num_tokens - 1) // sequence_length)


def batch_at(
    tokens: Tokens,
    *,
    seed: int,
    step: int,
    global_batch: int,
    first_sample: int,
    num_samples: int,
    sequence_length: int,
) -> tuple[Ids, Ids]:
    """Return inputs and targets of samples `[first_sample, first_sample + num_samples)` of a step.

    Args:
        tokens: the training text; at least `sequence_length + 1` tokens.
        seed: of the job.
        step: counted from 0.
        global_batch: samples in one step, over all microbatches and replicas.
        first_sample: within the step, from 0.
        num_samples: in this microbatch.
        sequence_length: tokens in one sample.

    Shapes:
        tokens: (N,).  returns: (num_samples, sequence_length) twice; targets are the inputs one token later.
    """
    windows = sample_windows(
        seed=seed,
        step=step,
        global_batch=global_batch,
        first_sample=first_sample,
        num_samples=num_samples,
        num_windows=num_windows(len(tokens), sequence_length),
    )
    return _read_windows(tokens, windows, sequence_length)


def held_out_batch(tokens: Tokens, *, first_sample: int, num_samples: int, sequence_length: int) -> tuple[Ids, Ids]:
    """Return held-out windows in order, the same for every seed and step; after the last comes the first.

    Shapes:
        tokens: (N,).  returns: (num_samples, sequence_length) twice.
    """
    count = num_windows(len(tokens), sequence_length)
    windows = np.arange(first_sample, first_sample + num_samples, dtype=np.int64) % count
    return _read_windows(tokens, windows, sequence_length)


def sample_windows(
    *, seed: int, step: int, global_batch: int, first_sample: int, num_samples: int, num_windows: int
) -> Ids:
    """Return which window each sample of a step reads.

    Samples are numbered through the run: sample i of step s is s * global_batch + i. Numbers
    [e * num_windows, (e + 1) * num_windows) are epoch e and visit each window once.

    Shapes:
        returns: (num_samples,), each in [0, num_windows).
    """
    assert 0 <= first_sample <= first_sample + num_samples <= global_batch, "samples outside the step"
    assert num_windows > 0, "the text is shorter than one window"
    first = step * global_batch + first_sample
    numbers = np.arange(first, first + num_samples, dtype=np.int64)
    epochs, places = np.divmod(numbers, num_windows)
    windows = np.empty_like(places)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        windows[chosen] = permute(places[chosen], num_windows, key=f"{seed}/{epoch}")
    return windows


def permute(places: Ids, size: int, *, key: str) -> Ids:
    """Return where a keyed permutation of `range(size)` sends each of `places`.

    A Feistel network permutes the next power of four; what falls outside `range(size)` is sent round again
    until it falls inside. No table is kept, so a corpus of any size costs the same.

    Shapes:
        places: (N,), each in [0, size).  returns: (N,), distinct where `places` are.

    Source:
        Black and Rogaway 2002, "Ciphers with arbitrary finite domains" (cycle walking).
    """
    # At least two bits a half: with one bit the network reaches few of the possible orders.
    half_bits = max(2, ((size - 1).bit_length() + 1) // 2)
    keys = np.frombuffer(hashlib.blake2b(key.encode(), digest_size=8 * _ROUNDS).digest(), dtype="<u8")
    moved = _feistel(places.astype(np.uint64), half_bits, keys)
    outside = moved >= size
    while outside.any():
        moved[outside] = _feistel(moved[outside], half_bits, keys)
        outside = moved >= size
    return moved.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half_bits: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Permute numbers of 2 * `half_bits` bits, one round a key."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits (the finalizer of splitmix64: Steele, Lea and Flood 2014)."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _read_windows(tokens: Tokens, windows: Ids, sequence_length: int) -> tuple[Ids, Ids]:
    rows = np.asarray(tokens[windows[:, None] * sequence_length + np.arange(sequence_length + 1)])
    ids = rows.astype(np.int64)
    return np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])
