"""Tables of the result, row by row: which parent's row every joint id takes, and how a block of rows is read.

``merge.union`` says where a parent has a row for an id; a method decides here what stands where a parent has none.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from jam.checkpoint import row_blocks
from merge.plan import Parent, Source
from merge.union import AVERAGED, Rows, Union, owned

MEAN, ZERO = -1, -2  # in a row map, beside the parent's row numbers and AVERAGED


def tower_map(union: Union, parent: Parent, use: str) -> np.ndarray:
    """int64 [V] for a table that one parent alone fills: its row, ``AVERAGED`` or ``MEAN``; a closing control takes the
    eos row.

    Args:
        use: "input" (foreign ids take the mean row), "head" (a foreign closing control takes the row of eos, so that
            text ends before an image where the parent would end it), or "tied" (one row serves both: the head's).
    """
    mine = union.rows(parent.side)
    rows = np.where(mine.known, mine.source, MEAN)
    closing, eos = union.vocabulary.controls.get("end_image"), parent.vocabulary.controls.get("eos")
    if use != "input" and closing is not None and eos is not None and not mine.known[closing]:
        rows[closing] = eos
    return rows.astype(np.int64)


def half_map(union: Union, parent: Parent) -> np.ndarray:
    """int64 [V] for one half of a concatenated table: own rows, ``ZERO`` where only the other parent knows the id.

    A reserved id that neither knows keeps the row that each table has.
    """
    mine, other = union.rows(parent.side), union.rows("image" if parent.side == "text" else "text")
    reserved = (mine.source >= 0) & ~other.known
    return np.where(mine.known | reserved, mine.source, ZERO).astype(np.int64)


@dataclass
class Table:
    """Rows of a parent's table in a new order, read when asked; the first read proves that the whole table is finite.

    ``source`` int64 [V]: the parent's row, ``AVERAGED`` as ``rows`` says, ``MEAN`` (mean of the rows it trained: those
    it owns, without the pad row, which OPT freezes at zero) or ``ZERO``.
    """

    parent: Parent
    tensor: str
    source: np.ndarray
    rows: Rows
    _mean: np.ndarray | None = field(default=None, init=False)

    @property
    def origin(self) -> Source:
        return self.parent.side, self.tensor

    def read(self, block: slice) -> np.ndarray:
        """float32 [rows, width]."""
        mean = self.mean()
        wanted = self.source[block]
        result = np.zeros((len(wanted), mean.shape[0]), np.float32)
        result[wanted == MEAN] = mean
        for at, start, stop in _runs(wanted):
            result[at : at + stop - start] = self.parent.checkpoint.read(self.tensor, slice(start, stop))
        averaged = np.flatnonzero(wanted == AVERAGED)
        if averaged.size:
            first = int(self._order[block.start])
            result[averaged] = self._averages(slice(first, first + len(averaged)))
        return result

    @cached_property
    def _order(self) -> np.ndarray:
        """int64 [V]: how many averaged ids stand before each id."""
        return np.cumsum(self.source == AVERAGED) - (self.source == AVERAGED)

    def _averages(self, numbers: slice) -> np.ndarray:
        """float32 [n, width], the means of several rows each, summed in float64 in their order."""
        offsets = self.rows.offsets[numbers.start : numbers.stop + 1]
        several = self.rows.pieces[offsets[0] : offsets[-1]]
        distinct, at = np.unique(several, return_inverse=True)
        values = self.parent.checkpoint.gather(self.tensor, distinct)[at].astype(np.float64)
        sums = np.add.reduceat(values, offsets[:-1] - offsets[0], axis=0)
        return (sums / np.diff(offsets)[:, None]).astype(np.float32)

    def mean(self) -> np.ndarray:
        """float32 [width], summed in float64 row by row, so that no machine orders the sum differently."""
        if self._mean is None:
            total, count = self._summed(lambda rows: rows)
            self._mean = (total / max(1, count)).astype(np.float32)
        return self._mean

    @cached_property
    def spread(self) -> np.ndarray:
        """float32 [width], the standard deviation of each column around the mean, summed as that is."""
        mean = self.mean().astype(np.float64)
        total, count = self._summed(lambda rows: np.square(rows - mean))
        return np.sqrt(total / max(1, count)).astype(np.float32)

    def _summed(self, term: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, int]:
        """float64 [width], the sum of a function of the rows that the parent trained, and their number."""
        shape = self.parent.shape(self.tensor)
        trained = owned(self.parent.vocabulary, shape[0])
        if (pad := self.parent.vocabulary.controls.get("pad")) is not None:
            trained[pad] = False
        total = np.zeros(shape[1], np.float64)
        for block in row_blocks(shape):
            rows = self.parent.checkpoint.read(self.tensor, block)
            total += np.add.reduce(term(rows[trained[block]]), axis=0, dtype=np.float64)
        return total, int(trained.sum())


def _runs(rows: np.ndarray) -> list[tuple[int, int, int]]:
    """Consecutive parent's rows inside a map: (place in the map, first row, row after the last).

    >>> _runs(np.array([5, 6, -1, 7, 2]))
    [(0, 5, 7), (3, 7, 8), (4, 2, 3)]
    """
    places = np.flatnonzero(rows >= 0)
    if not places.size:
        return []
    breaks = np.flatnonzero((np.diff(places) != 1) | (np.diff(rows[places]) != 1)) + 1
    return [(int(run[0]), int(rows[run[0]]), int(rows[run[-1]]) + 1) for run in np.split(places, breaks)]


def describe(labels: Sequence[str]) -> dict:
    """The report of one table: how many rows of each fate, and the fate of every id as [start, stop, fate] ranges.

    >>> describe(["copied", "copied", "mean"])
    {'counts': {'copied': 2, 'mean': 1}, 'ranges': [[0, 2, 'copied'], [2, 3, 'mean']]}
    """
    ranges: list[list] = []
    for index, label in enumerate(labels):
        if ranges and ranges[-1][2] == label:
            ranges[-1][1] = index + 1
        else:
            ranges.append([index, index + 1, label])
    counts: dict[str, int] = {}
    for start, stop, label in ranges:
        counts[label] = counts.get(label, 0) + stop - start
    return {"counts": counts, "ranges": ranges}


def tower_labels(union: Union, source: np.ndarray, side: str) -> list[str]:
    """Fates of a table made by ``tower_map``."""
    known, theirs = union.rows(side).known, union.rows(side).source
    labels = []
    for index, row in enumerate(source.tolist()):
        if row == MEAN:
            labels.append(f"foreign: mean of {side} rows")
        elif row == AVERAGED:
            labels.append(f"averaged {side} rows")
        elif known[index] or theirs[index] == row:
            labels.append(f"{side} row")
        else:
            labels.append(f"foreign: {side} eos row")
    return labels
