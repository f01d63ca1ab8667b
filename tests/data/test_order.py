"""Sample order and random numbers: pure functions with the properties that training relies on."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from hpcllm.data import order

SEEDS = st.integers(0, 2**63 - 1)


@settings(deadline=None)
@given(count=st.integers(1, 3000), seed=SEEDS, epoch=st.integers(0, 1000))
def test_an_epoch_shows_every_sample_once(count, seed, epoch):
    assert sorted(order.shuffle(np.arange(count), count, seed, epoch)) == list(range(count))


@settings(deadline=None)
@given(count=st.integers(1, 10**12), seed=SEEDS, cuts=st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_the_stream_does_not_depend_on_how_it_is_cut(count, seed, cuts):
    position = max(0, count - 20)  # so that the pieces cross the end of an epoch
    whole = order.samples(position, sum(cuts), count, seed)
    starts = np.cumsum([position, *cuts])
    parts = [order.samples(start, length, count, seed) for start, length in zip(starts, cuts, strict=False)]
    for i in range(2):
        np.testing.assert_array_equal(whole[i], np.concatenate([part[i] for part in parts]))


def test_seeds_and_epochs_give_different_orders():
    orders = {tuple(order.shuffle(np.arange(50), 50, seed, epoch)) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_the_order_is_what_it_was_when_it_was_first_written():
    # Runs that resume with a newer version must continue in the same order.
    assert order.shuffle(np.arange(10), 10, 7, 0).tolist() == [4, 7, 1, 5, 3, 0, 8, 9, 6, 2]
    assert order.shuffle(np.arange(10), 10, 7, 1).tolist() == [0, 5, 1, 2, 8, 6, 7, 9, 3, 4]


def test_every_place_is_equally_likely():
    counts = np.zeros((8, 8))
    for seed in range(4000):
        counts[np.arange(8), order.shuffle(np.arange(8), 8, seed, 0)] += 1
    chi_squared = ((counts - 500) ** 2 / 500).sum()
    assert chi_squared < 85  # 49 degrees of freedom: mean 49, this is beyond 3.6 standard deviations


def test_random_numbers_are_uniform_and_belong_to_their_key():
    numbers = order.uniform(order.key(3, 0, np.arange(2000)), 200)
    assert abs(numbers.mean() - 0.5) < 0.002 and abs(numbers.var() - 1 / 12) < 0.001
    assert np.abs(np.corrcoef(numbers[:40]) - np.eye(40)).max() < 0.35
    np.testing.assert_array_equal(numbers[7:9], order.uniform(order.key(3, 0, np.array([7, 8])), 200))
    assert numbers.min() >= 0 and numbers.max() < 1
