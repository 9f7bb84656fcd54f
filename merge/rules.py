"""Rules of the uniform merge: what becomes of the same numbers in two models, and in their common ancestor.

    linear           w a + (1 - w) b
    slerp            along the arc between both tensors, taken as vectors (Shoemake 1985)
    task_arithmetic  base + scale (w (a - base) + (1 - w) (b - base)) (arXiv 2212.04089)
    ties             as task_arithmetic, of each difference the greatest share ``density``; where the two disagree in
                     sign the weightier sign alone, and those that have it are averaged (arXiv 2306.01708)
    dare             as task_arithmetic, of each difference a random share ``density``, divided by ``density``
                     (arXiv 2311.03099)

a is the text parent, b the image parent, w the text parent's share. All but linear suppose parents that were trained
from one ancestor. A rule that needs figures of a whole tensor (slerp's angle, the least magnitude that ties keeps)
reads it before its first block, in blocks of its own size; random numbers go by place. Hence nothing depends on how the
merge streams.

Ties keeps every number as great as the least one kept, also where that makes more than the share. The share is taken
tensor by tensor, not over the whole model as in the paper, whose threshold needs all differences at once.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import numpy as np

from jam.checkpoint import row_blocks
from merge.philox import words
from merge.plan import Parent, Source

PASS = 1 << 17  # elements of a block of a first pass
PARALLEL = 0.9995  # |cosine| from which an arc is a line, or no arc is the shortest


def mean(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """``weight * first + (1 - weight) * second`` in float32; equal entries stay bit-equal under any weight (at one half
    down to 2^-148, twice float32's smallest number).

    >>> mean(np.float32([1.0, 3.0]), np.float32([3.0, 3.0]), 0.25).tolist()
    [2.5, 3.0]
    """
    if weight in (0.0, 1.0):
        return first if weight else second
    result = np.float32(weight) * first
    result += np.float32(1.0 - weight) * second
    if weight != 0.5:  # two halves make a whole; other shares round
        np.copyto(result, first, where=first == second)
    return result


class Reader(Protocol):
    """float32 rows of a tensor of one model: ``Whole``, or ``merge.rows.Table``."""

    @property
    def origin(self) -> Source:
        """Whose tensor it is."""

    def read(self, block: slice) -> np.ndarray:
        """float32 rows."""


@dataclass(frozen=True)
class Whole:
    """A tensor as its model has it."""

    parent: Parent
    tensor: str

    @property
    def origin(self) -> Source:
        return self.parent.side, self.tensor

    def read(self, block: slice) -> np.ndarray:
        return self.parent.checkpoint.read(self.tensor, block)


@dataclass(frozen=True)
class Slerp:
    """Spherical interpolation of two tensors; ``shared`` bool [rows] are the rows that count, None for all.

    Nearly parallel or opposite tensors, and those without length, take the weighted mean.
    """

    text: Reader
    image: Reader
    shape: tuple[int, ...]
    weight: float
    shared: np.ndarray | None = None

    @property
    def fate(self) -> str:
        return f"slerp, {self.weight:g} of the way from image to text {self.text.origin[1]}"

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.text.origin, self.image.origin

    @cached_property
    def shares(self) -> tuple[float, float] | None:
        """Factors of both tensors, or None for the weighted mean."""
        dot = ours = theirs = 0.0
        for block in row_blocks(self.shape, PASS):
            first, second = (_counted(side.read(block), self.shared, block) for side in (self.text, self.image))
            dot += float(np.add.reduce(first * second))  # no matrix product: its sum is ordered by the machine
            ours += float(np.add.reduce(first * first))
            theirs += float(np.add.reduce(second * second))
        length = (ours * theirs) ** 0.5
        if not length or abs(dot) > PARALLEL * length:
            return None
        angle = np.arccos(dot / length)
        return tuple(float(np.sin(share * angle) / np.sin(angle)) for share in (self.weight, 1.0 - self.weight))

    def rows(self, block: slice) -> np.ndarray:
        first, second = self.text.read(block), self.image.read(block)
        if self.shares is None or self.weight in (0.0, 1.0):
            return mean(first, second, self.weight)
        return np.float32(self.shares[0]) * first + np.float32(self.shares[1]) * second


def _counted(values: np.ndarray, shared: np.ndarray | None, block: slice) -> np.ndarray:
    """float64 [n], the numbers of a block's rows that count."""
    return (values if shared is None else values[shared[block]]).astype(np.float64).ravel()


@dataclass(frozen=True)
class TaskVectors:
    """``base + scale * (differences from it, combined)``, in float64, hence the parent where both are the same.

    ``rule`` is task_arithmetic, ties or dare; ``shared`` as in ``Slerp``.
    """

    rule: str
    text: Reader
    image: Reader
    base: Reader
    name: str
    shape: tuple[int, ...]
    weight: float
    scale: float
    density: float
    seed: int
    shared: np.ndarray | None = None

    @property
    def fate(self) -> str:
        share = "" if self.rule == "task_arithmetic" else f", {self.density:g} of each difference"
        differences = f"{self.weight:g} x text and {1 - self.weight:g} x image difference"
        return f"{self.rule}: base + {self.scale:g} x ({differences} from it){share}, {self.text.origin[1]}"

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.text.origin, self.image.origin, self.base.origin

    def rows(self, block: slice) -> np.ndarray:
        base = self.base.read(block).astype(np.float64)
        ours, theirs = (side.read(block) - base for side in (self.text, self.image))
        combined = {"task_arithmetic": self._sum, "ties": self._elected, "dare": self._drawn}[self.rule]
        return (base + self.scale * combined(ours, theirs, block)).astype(np.float32)

    def _sum(self, ours: np.ndarray, theirs: np.ndarray, block: slice) -> np.ndarray:
        return self.weight * ours + (1.0 - self.weight) * theirs

    def _drawn(self, ours: np.ndarray, theirs: np.ndarray, block: slice) -> np.ndarray:
        width = prod(self.shape[1:])
        for side, vector in (("text", ours), ("image", theirs)):
            keep = drawn(self.seed, f"dare:{side}:{self.name}", block.start * width, vector.size, self.density)
            vector *= keep.reshape(vector.shape) / self.density
        return self._sum(ours, theirs, block)

    def _elected(self, ours: np.ndarray, theirs: np.ndarray, block: slice) -> np.ndarray:
        for vector, least in zip((ours, theirs), self.least, strict=True):
            vector[np.abs(vector).astype(np.float32) < least] = 0.0
        sign = np.where(self._sum(ours, theirs, block) >= 0.0, 1.0, -1.0)
        weights = (self.weight, 1.0 - self.weight)
        agree = [weight * (vector * sign > 0.0) for weight, vector in zip(weights, (ours, theirs), strict=True)]
        total = agree[0] + agree[1]
        return (agree[0] * ours + agree[1] * theirs) / np.where(total > 0.0, total, 1.0)

    @cached_property
    def least(self) -> tuple[np.float32, ...]:
        """The least magnitude that ties keeps of each difference."""
        return tuple(self._least(side) for side in (self.text, self.image))

    def _least(self, side: Reader) -> np.float32:
        count = self.shape[0] if self.shared is None else int(self.shared.sum())
        keep = int(self.density * (count * prod(self.shape[1:])))

        def magnitudes() -> Iterator[np.ndarray]:
            for block in row_blocks(self.shape, PASS):
                ours, base = (_counted(reader.read(block), self.shared, block) for reader in (side, self.base))
                yield np.abs(ours - base).astype(np.float32)

        return kth_greatest(magnitudes, keep)


def drawn(seed: int, name: str, first: int, count: int, share: float) -> np.ndarray:
    """bool [count]: which of the numbers from place ``first`` on are drawn, each with probability ``share``."""
    odd = first % 2  # a 64-bit word serves two
    halves = words(seed, name, first // 2, (odd + count + 1) // 2).view("<u4")[odd : odd + count]
    return halves < np.uint64(round(share * 2**32))


def kth_greatest(blocks: Callable[[], Iterator[np.ndarray]], k: int) -> np.float32:
    """The ``k``-th greatest of many non-negative float32, exactly and in bounded memory; infinity for k = 0.

    Bits of non-negative floats sort as the numbers do: one pass counts their upper 16 bits, another the lower 16 of
    those with the upper bits found.

    >>> float(kth_greatest(lambda: iter([np.float32([3, 1]), np.float32([2, 2])]), 2))
    2.0
    """
    if k < 1:
        return np.float32(np.inf)
    upper, lower = (np.zeros(1 << 16, np.int64) for _ in (0, 1))
    for values in blocks():
        upper += np.bincount(values.view(np.uint32) >> 16, minlength=1 << 16)
    high, k = _bin_from_top(upper, k)
    for values in blocks():
        bits = values.view(np.uint32)
        lower += np.bincount(bits[bits >> 16 == high] & 0xFFFF, minlength=1 << 16)
    low, _ = _bin_from_top(lower, k)
    return np.uint32(high << 16 | low).view(np.float32)


def _bin_from_top(counts: np.ndarray, k: int) -> tuple[int, int]:
    """The bin that holds the ``k``-th from the top, and its number inside that bin.

    >>> _bin_from_top(np.array([5, 2, 1]), 2)
    (1, 1)
    """
    reached = np.cumsum(counts[::-1])
    at = int(np.searchsorted(reached, k))
    return len(counts) - 1 - at, k - int(reached[at] - counts[::-1][at])
