"""Random words by their place: the same on every machine, in any order and for every block size."""

import hashlib

import numpy as np


def words(seed: int, name: str, first: int, count: int) -> np.ndarray:
    """Random uint64 words number ``first`` to ``first + count`` of a tensor's own stream (Philox 4x64, Salmon et al.
    2011, keyed by a hash of seed and name).

    >>> whole = words(0, "a", 0, 9)
    >>> np.concatenate([words(0, "a", 0, 5), words(0, "a", 5, 4)]).tolist() == whole.tolist()
    True
    """
    key = np.frombuffer(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:16], "<u8")
    generator = np.random.Philox(key=key)
    generator.advance(first // 4)  # one counter step gives four words
    skip = first % 4
    return np.asarray(generator.random_raw(skip + count)[skip:], "<u8")
