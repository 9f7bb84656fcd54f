"""Rows of the joint vocabulary: which parent owns an id, and where every row of every table comes from.

A parent *owns* an id when it knew it in training: its text and image ids and the controls that its jam.json names.
Reserved control rows exist in its table but mean nothing. Ids that a parent does not own are *foreign* to it.

For now the parents' tokenizers must agree on every text and control id that the text parent owns; the image parent's
vocabulary is then the joint one. Carrying rows over between different tokenizers is not done here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jam.checkpoint import row_blocks
from jam.errors import CheckpointError
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import CONTROL, IMAGE, Vocabulary
from merge.plan import Parent

MEAN, ZERO = -1, -2  # in a row map, beside the parent's row numbers


def owned(vocabulary: Vocabulary, size: int) -> np.ndarray:
    """bool [size]: the ids that a model of ``vocabulary`` knew in training."""
    result = np.zeros(size, bool)
    result[: vocabulary.size] = vocabulary.kinds() != CONTROL
    result[list(vocabulary.controls.values())] = True
    return result


def disagreement(text: Parent, image: Parent) -> str | None:
    """Why the two vocabularies cannot become one, or None when they can."""
    ours, theirs = text.vocabulary, image.vocabulary
    if ours.image_span is not None and theirs.image_span is None:
        return "the text parent makes images and the image parent does not; swap --text and --image"
    if ours.size > theirs.size or (ours.kinds() != theirs.kinds()[: ours.size]).any():
        return (
            f"the text parent's {ours.size} ids have other kinds than the image parent's first {ours.size} of "
            f"{theirs.size}; text and control ids must lie at the same numbers, use parents of one tokenizer"
        )
    for name, index in ours.controls.items():
        if theirs.controls.get(name) != index:
            return (
                f"control {name} is id {index} in the text parent and {theirs.controls.get(name)} in the image parent; "
                "the same id is required, use parents of one tokenizer"
            )
    differing = _differing_ids(text, image)
    if differing:
        return (
            f"the tokenizers differ at {len(differing)} of {int(owned(ours, ours.size).sum())} ids, the first is "
            f"{differing[0]}; rows cannot yet be carried over between tokenizers, use parents of one tokenizer"
        )
    if _segmentation(text.path) != _segmentation(image.path):
        return (
            "the tokenizers have the same ids but cut text differently (merges, normalizer or pre-tokenizer); rows "
            "cannot yet be carried over between tokenizers, use parents of one tokenizer"
        )
    return None


def _differing_ids(text: Parent, image: Parent) -> list[int]:
    """Ids of the text parent that stand for another string in the image parent's tokenizer."""
    ours, theirs = (
        {index: word for word, index in TextTokenizer.load(side.path).tokenizer.get_vocab(True).items()}
        for side in (text, image)
    )
    kinds = text.vocabulary.kinds()
    ids = np.flatnonzero(owned(text.vocabulary, text.vocabulary.size) & (kinds != IMAGE)).tolist()
    return [index for index in ids if ours.get(index) != theirs.get(index)]


def _segmentation(folder: Path) -> list:
    """What decides how text is cut, beside the strings themselves."""
    try:
        raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"].get("merges", [])]
        return [raw["model"].get("type"), merges, raw.get("normalizer"), raw.get("pre_tokenizer")]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}/tokenizer.json: {error!r}; the file is damaged, restore it") from None


def tower_map(vocabulary: Vocabulary, parent: Parent, use: str) -> np.ndarray:
    """int64 [V] for a table that one parent alone fills: its row, or ``MEAN``; a closing control takes the eos row.

    Args:
        use: "input" (foreign ids take the mean row), "head" (a foreign closing control takes the row of eos, so that
            text ends before an image where the parent would end it), or "tied" (one row serves both: the head's).
    """
    mine = owned(parent.vocabulary, vocabulary.size)
    rows = np.where(mine, np.arange(vocabulary.size), MEAN)
    closing, eos = vocabulary.controls.get("end_image"), parent.vocabulary.controls.get("eos")
    if use != "input" and closing is not None and eos is not None and not mine[closing]:
        rows[closing] = eos
    return rows.astype(np.int64)


def half_map(vocabulary: Vocabulary, parent: Parent, other: Parent) -> np.ndarray:
    """int64 [V] for one half of a concatenated table: own rows, ``ZERO`` where only the other parent owns the id.

    A reserved id that neither owns keeps the row that each table has.
    """
    mine, theirs = (owned(side.vocabulary, vocabulary.size) for side in (parent, other))
    present = np.arange(vocabulary.size) < parent.vocabulary.size
    return np.where(mine | (present & ~theirs), np.arange(vocabulary.size), ZERO).astype(np.int64)


@dataclass
class Table:
    """Rows of a parent's table in a new order, read when asked; the first read proves that the whole table is finite.

    ``source`` int64 [V]: the parent's row, ``MEAN`` (mean of the rows it trained: those it owns, without the pad row,
    which OPT freezes at zero) or ``ZERO``.
    """

    parent: Parent
    tensor: str
    source: np.ndarray
    _mean: np.ndarray | None = field(default=None, init=False)

    def read(self, block: slice) -> np.ndarray:
        """float32 [rows, width]."""
        mean = self.mean()
        wanted = self.source[block]
        result = np.zeros((len(wanted), mean.shape[0]), np.float32)
        result[wanted == MEAN] = mean
        for at, start, stop in _runs(wanted):
            result[at : at + stop - start] = self.parent.checkpoint.read(self.tensor, slice(start, stop))
        return result

    def mean(self) -> np.ndarray:
        """float32 [width], summed in float64 row by row, so that no machine orders the sum differently."""
        if self._mean is None:
            shape = self.parent.shape(self.tensor)
            trained = owned(self.parent.vocabulary, shape[0])
            if (pad := self.parent.vocabulary.controls.get("pad")) is not None:
                trained[pad] = False
            total = np.zeros(shape[1], np.float64)
            for block in row_blocks(shape):
                rows = self.parent.checkpoint.read(self.tensor, block)
                total += np.add.reduce(rows[trained[block]], axis=0, dtype=np.float64)
            self._mean = (total / max(1, int(trained.sum()))).astype(np.float32)
        return self._mean


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


def tower_labels(source: np.ndarray, side: str) -> list[str]:
    """Fates of a table made by ``tower_map``."""
    labels = [
        f"{side} row" if row == index else f"foreign: {side} eos row" for index, row in enumerate(source.tolist())
    ]
    return [f"foreign: mean of {side} rows" if source[i] == MEAN else label for i, label in enumerate(labels)]
