"""New weights: normal numbers, the same on every machine, in any order and for every block size.

Both kinds are whole-number arithmetic on random words by place and a rounding or two, where logarithms and cosines
would depend on the machine.
"""

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

from merge.philox import words
from merge.plan import Source


@dataclass(frozen=True)
class Noise:
    """A new matrix [rows, columns] of normal numbers, keyed by seed and the tensor's name."""

    shape: tuple[int, int]
    std: float
    seed: int
    name: str

    @property
    def fate(self) -> str:
        return f"new: normal, std {self.std:g}"

    @property
    def sources(self) -> tuple[Source, ...]:
        return ()


class Quantiles(Noise):
    """Each number is one of 65,536 quantiles, picked by 16 bits of a Philox word.

    A quantile is the middle of its share; the tails end at 4.3 standard deviations, and 0.002 % of the variance is lost
    with what lies beyond. Four numbers to a word: a copy's pace, which a cross merge of large parents needs.
    """

    def rows(self, block: slice) -> np.ndarray:
        first, count = (rows * self.shape[1] for rows in (block.start, block.stop - block.start))
        skip = first % 4
        drawn = words(self.seed, self.name, first // 4, (skip + count + 3) // 4).view("<u2")[skip : skip + count]
        return np.take(scaled_quantiles(self.std), drawn).reshape(-1, self.shape[1])


@cache
def quantiles() -> np.ndarray:
    """float64 [65536], rising, each on a grid of 2^-20 so that no machine's logarithm decides a last bit.

    >>> float(quantiles()[32768]), float(quantiles()[0])
    (1.9073486328125e-05, -4.324918746948242)
    """
    normal = NormalDist()
    upper = [normal.inv_cdf((32768 + k + 0.5) / 65536) for k in range(32768)]
    half = np.round(np.array(upper) * 2**20) / 2**20
    return np.concatenate([-half[::-1], half])


@cache
def scaled_quantiles(std: float) -> np.ndarray:
    """float32 [65536]."""
    return (quantiles() * std).astype(np.float32)


class Sums(Noise):
    """Each number is the sum of twelve 16-bit pieces of Philox words, centred and scaled (Irwin-Hall).

    Its tails end at 6 standard deviations. The models that ship were merged with these.
    """

    def rows(self, block: slice) -> np.ndarray:
        first, count = (rows * self.shape[1] for rows in (block.start, block.stop - block.start))
        result = np.empty(count, np.float32)
        for at in range(0, count, PIECE):
            piece = result[at : at + PIECE]
            drawn = words(self.seed, self.name, WORDS * (first + at), WORDS * len(piece))
            total = _sums_of_twelve(drawn)
            centred = (2 * total - 12 * 65535) / (2 * np.sqrt(np.float64(2**32 - 1)))  # variance 12 (65536^2 - 1) / 12
            piece[:] = centred * self.std
        return result.reshape(-1, self.shape[1])


WORDS = 3  # 64-bit words for one number: twelve pieces of 16 bits
PIECE = 1 << 15  # numbers that are made at once: their words stay in a core's cache


def _sums_of_twelve(drawn: np.ndarray) -> np.ndarray:
    """int64 [n]: the sum of the twelve 16-bit pieces of every three words of uint64 [3 n].

    Pieces are added inside the words, two to a word of 32-bit lanes, which no sum of six overflows.

    >>> _sums_of_twelve(np.array([0x0001_0002_0003_0004, 0, 0xFFFF_0000_0000_0000], np.uint64)).tolist()
    [65545]
    """
    lanes = np.uint64(0x0000_FFFF_0000_FFFF)
    pairs = drawn >> np.uint64(16)
    pairs &= lanes
    pairs += drawn & lanes
    threes = pairs.reshape(-1, WORDS)
    total = threes[:, 0] + threes[:, 1]
    total += threes[:, 2]
    total += total >> np.uint64(32)
    total &= np.uint64(0xFFFF_FFFF)
    return total.view(np.int64)


NOISE: dict[str, type[Quantiles] | type[Sums]] = {"quantiles": Quantiles, "sums": Sums}
