"""Which sample comes when, and every random choice about it: pure functions of seed, epoch and index.

Nothing here has state or knows ranks, so any number of ranks sees the same samples in the same order, and a run
resumes from one integer (samples consumed). Vectorised over the samples of a batch; NumPy only.
"""

import numpy as np

_ROUNDS = 6


def mix64(x):
    """The splitmix64 finaliser (Steele, Lea, Flood 2014) on an array of uint64: a good hash of 64 bits to 64."""
    x = np.asarray(x, dtype=np.uint64)
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def key(*words):
    """Hash integers, one after another, to one uint64 (arrays broadcast)."""
    state = np.uint64(0)
    for word in words:
        state = mix64(state ^ np.asarray(word).astype(np.uint64))
    return state


def shuffle(index, count, seed, epoch):
    """The sample at each `index` (int64 array, 0 <= index < count) of the epoch's order: a bijection of range(count).

    seed, epoch: integers, or arrays broadcastable to `index`. A balanced Feistel network on the smallest
    power of four that holds `count`, walked until the value falls below count (Black and Rogaway 2002), so no
    permutation is ever stored.
    """
    index = np.asarray(index, dtype=np.int64)
    half = max(1, (max(count - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    shift = np.uint64(half)
    keys = [np.broadcast_to(key(seed, epoch, 0xF0 + turn), index.shape) for turn in range(_ROUNDS)]
    value = index.astype(np.uint64)
    walking = np.ones(index.shape, dtype=bool)
    while walking.any():
        left, right = value[walking] >> shift, value[walking] & mask
        for turn_keys in keys:
            left, right = right, left ^ (mix64(right ^ turn_keys[walking]) & mask)
        value[walking] = (left << shift) | right
        walking = value >= np.uint64(count)
    return value.astype(np.int64)


def samples(position, length, count, seed):
    """Sample and epoch of `length` consecutive positions of the endless stream of samples that a run consumes.

    position: samples consumed before (int); count: samples in the data set. Returns two int64 arrays [length].
    """
    consumed = np.arange(position, position + length, dtype=np.int64)
    epoch, index = np.divmod(consumed, count)
    return shuffle(index, count, seed, epoch), epoch


def uniform(keys, length):
    """For each uint64 of `keys` [B] its own `length` random numbers in [0, 1): float64 [B, length]."""
    keys = np.asarray(keys, dtype=np.uint64)
    counter = np.arange(length, dtype=np.uint64)
    return (mix64(keys[:, None] ^ mix64(counter)[None, :]) >> np.uint64(11)) * 2.0**-53
