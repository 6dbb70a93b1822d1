"""The sampler: what it promises about order, splits and resumption. No torch."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hybrid.models.sampler import batch_at, held_out_batch, num_windows, permute, sample_windows

# A shared machine may stall in the middle of an example.
few = settings(max_examples=25, deadline=None)
sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**63 - 1)


@few
@given(size=sizes, seed=seeds)
def test_a_keyed_permutation_visits_every_place_once(size, seed):
    moved = permute(np.arange(size), size, key=str(seed))
    assert np.array_equal(np.sort(moved), np.arange(size))


def test_another_key_gives_another_order():
    orders = {tuple(permute(np.arange(50), 50, key=f"1/{epoch}")) for epoch in range(200)}
    assert len(orders) == 200


def test_every_window_is_as_likely_as_any_other_to_come_first():
    firsts = [int(permute(np.array([0]), 13, key=str(key))[0]) for key in range(1300)]
    counts = np.bincount(firsts, minlength=13)
    # 100 expected each, standard deviation 10.
    assert counts.min() > 50
    assert counts.max() < 150


def test_neighbouring_places_land_far_apart():
    moved = permute(np.arange(10_000), 10_000, key="7/0")
    assert abs(np.corrcoef(np.arange(10_000), moved)[0, 1]) < 0.05
    assert np.mean(np.abs(np.diff(moved)) == 1) < 0.002


@few
@given(size=st.integers(1, 200), global_batch=st.integers(5, 70), seed=seeds)
def test_an_epoch_visits_every_window_once_whatever_the_batch(size, global_batch, seed):
    steps = -(-size // global_batch)
    seen = np.concatenate(
        [
            sample_windows(
                seed=seed,
                step=step,
                global_batch=global_batch,
                first_sample=0,
                num_samples=global_batch,
                num_windows=size,
            )
            for step in range(steps)
        ]
    )
    assert np.array_equal(np.sort(seen[:size]), np.arange(size))


@few
@given(
    seed=seeds,
    step=st.integers(0, 1000),
    cuts=st.sets(st.integers(1, 23), max_size=8),
    num_tokens=st.integers(12, 600),
)
def test_a_step_is_the_same_data_however_it_is_cut_into_microbatches(seed, step, cuts, num_tokens):
    tokens = np.arange(num_tokens, dtype=np.uint16)

    def read(first: int, end: int) -> np.ndarray:
        inputs, targets = batch_at(
            tokens,
            seed=seed,
            step=step,
            global_batch=24,
            first_sample=first,
            num_samples=end - first,
            sequence_length=11,
        )
        return np.concatenate((inputs, targets), axis=1)

    bounds = [0, *sorted(cuts), 24]
    parts = [read(first, end) for first, end in itertools.pairwise(bounds)]
    assert np.array_equal(np.concatenate(parts), read(0, 24))


@few
@given(
    seed=seeds,
    batches=st.tuples(st.integers(4, 40), st.integers(4, 40)),
    size=st.integers(1, 45),
)
def test_the_run_of_samples_does_not_depend_on_the_global_batch(seed, batches, size):
    def run(global_batch: int) -> np.ndarray:
        return np.concatenate(
            [
                sample_windows(
                    seed=seed,
                    step=step,
                    global_batch=global_batch,
                    first_sample=0,
                    num_samples=global_batch,
                    num_windows=size,
                )
                for step in range(-(-60 // global_batch))
            ]
        )[:60]

    assert np.array_equal(run(batches[0]), run(batches[1]))


@few
@given(num_tokens=st.integers(2, 400), sequence_length=st.integers(1, 50))
def test_windows_do_not_overlap_and_end_inside_the_text(num_tokens, sequence_length):
    count = num_windows(num_tokens, sequence_length)
    assert count * sequence_length + 1 <= num_tokens or count == 0
    assert (count + 1) * sequence_length + 1 > num_tokens
    if count:
        tokens = np.arange(num_tokens, dtype=np.uint32)
        inputs, targets = held_out_batch(tokens, first_sample=0, num_samples=count, sequence_length=sequence_length)
        assert np.array_equal(inputs.ravel(), np.arange(count * sequence_length))
        assert np.array_equal(targets, inputs + 1)


def test_targets_are_the_inputs_one_token_later():
    tokens = np.arange(1000, dtype=np.uint16)
    inputs, targets = batch_at(
        tokens, seed=3, step=5, global_batch=8, first_sample=2, num_samples=4, sequence_length=10
    )
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.dtype == targets.dtype == np.int64
    assert np.array_equal(targets, inputs + 1)
    assert np.all(inputs[:, 0] % 10 == 0)
    assert inputs.flags["C_CONTIGUOUS"]
    assert targets.flags["C_CONTIGUOUS"]


def test_the_order_is_the_one_that_older_runs_had():
    # A change here makes a resumed run see other data: raise the checkpoint's version with it.
    windows = sample_windows(seed=1234, step=3, global_batch=8, first_sample=0, num_samples=8, num_windows=1000)
    assert windows.tolist() == [640, 367, 54, 5, 456, 830, 982, 690]


def test_the_second_epoch_has_another_order_than_the_first():
    first, second = (
        sample_windows(seed=1, step=epoch, global_batch=40, first_sample=0, num_samples=40, num_windows=40).tolist()
        for epoch in range(2)
    )
    assert sorted(first) == sorted(second)
    assert first != second


def test_held_out_windows_come_round_again_after_the_last():
    tokens = np.arange(31, dtype=np.uint16)
    inputs, _ = held_out_batch(tokens, first_sample=2, num_samples=3, sequence_length=10)
    assert inputs[:, 0].tolist() == [20, 0, 10]


def test_a_million_samples_of_a_huge_text_need_no_table():
    windows = sample_windows(
        seed=1, step=10**6, global_batch=10**6, first_sample=0, num_samples=10**5, num_windows=10**12
    )
    assert len(np.unique(windows)) == 10**5
    assert windows.max() < 10**12


@pytest.mark.parametrize("first", [-1, 6])
def test_samples_outside_the_step_are_our_own_mistake(first):
    with pytest.raises(AssertionError):
        sample_windows(seed=1, step=0, global_batch=8, first_sample=first, num_samples=3, num_windows=9)
