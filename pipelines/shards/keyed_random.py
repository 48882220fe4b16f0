"""Random numbers as a pure function of a key.

They are the same on every rank, worker and machine, and with every version of NumPy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

UInts = NDArray[np.uint64]

# The constants of splitmix64. Every run's order and augmentations depend on them.
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def mix(values: UInts) -> UInts:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014), element by element."""
    z = np.atleast_1d(np.asarray(values, np.uint64)) + _GOLDEN  # arrays wrap, a scalar would warn
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return np.asarray(z ^ (z >> np.uint64(31)), np.uint64)


def chain(*parts: int | UInts) -> UInts:
    """Hashes integers in order. Arrays broadcast: chain(seed, epoch, ids) hashes each id."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        value = np.asarray(part)
        state = mix(
            state
            ^ mix(value.astype(np.int64).view(np.uint64) if value.dtype != np.uint64 else value)
        )
    return state


def noise_keys(seed: int, epoch: int, sample_ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """One non-negative key for each sample; the source of all its randomness in that epoch."""
    # One bit less, because batches carry the keys as int64.
    keys = chain(seed, epoch, np.asarray(sample_ids, np.int64).view(np.uint64))
    return (keys >> np.uint64(1)).astype(np.int64)


def uniform(keys: NDArray[np.int64] | int, purpose: int) -> NDArray[np.float64]:
    """One number in [0, 1) for each key; different purposes are independent."""
    # A double has 53 bits of mantissa; more would round up to 1.
    bits = chain(np.atleast_1d(np.asarray(keys, np.int64)).view(np.uint64), purpose)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def shuffled(count: int, *key: int) -> NDArray[np.int64]:
    """A permutation of range(count) that depends on the key alone."""
    return np.argsort(chain(*key, np.arange(count, dtype=np.uint64)), kind="stable")
