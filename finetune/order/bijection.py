"""The order of an epoch without storing it: a keyed bijection of [0, size), asked for any places at once.

A Feistel network over the smallest square power of two that holds ``size``; what falls outside is sent through again
until it is inside (cycle walking: Black and Rogaway, *Ciphers with Arbitrary Finite Domains*, CT-RSA 2002, method 3).
The domain is below four times the size, so that a place takes four passes at most on average. A permutation that is
drawn and kept costs eight bytes a document, in every process.
"""

import numpy as np

ROUNDS = 8  # enough for small domains, whose halves have a few bits
_ODD = np.uint64(0x9E3779B97F4A7C15)


def bijection(places: np.ndarray, size: int, *keys: int) -> np.ndarray:
    """int64: what stands at some places of the order that the keys name.

    >>> sorted(bijection(np.arange(5), 5, 3, 1).tolist())
    [0, 1, 2, 3, 4]
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    seeds = np.random.SeedSequence(keys).generate_state(ROUNDS, np.uint64)
    found = np.array(places, dtype=np.uint64)
    walking = np.arange(found.size)
    while walking.size:
        left, right = found[walking] >> shift, found[walking] & mask
        for seed in seeds:
            left, right = right, left ^ (_mixed(right ^ seed) & mask)
        found[walking] = left << shift | right
        walking = walking[found[walking] >= size]
    return found.astype(np.int64)


def _mixed(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every bit of the input moves every other."""
    x = (x + _ODD) & np.uint64(0xFFFFFFFFFFFFFFFF)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
