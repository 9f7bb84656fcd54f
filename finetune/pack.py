"""Packing: token documents into fixed-length sequences, and sequences into a batch of tensors.

Documents in one sequence are isolated: attention is allowed inside a document only, and positions are the document's
own, from a start offset. No document is ever split here.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from jam.tokens.render import TEXT_HEAD, Tokens
from jam.tokens.vocabulary import Vocabulary


@dataclass(frozen=True)
class Placed:
    """One document with the learned position its first token takes.

    ``inputs`` are the ids that the model reads where they are not those it learns to predict (:func:`noisy_codes`).
    """

    tokens: Tokens
    offset: int
    inputs: np.ndarray | None = None


Sequence = list[Placed]


def noisy_codes(
    tokens: Tokens, generator: np.random.Generator, vocabulary: Vocabulary, share: float
) -> np.ndarray | None:
    """Ids as read by the model: in a ``share`` of documents some image codes are replaced by random ones.

    Each such document draws its rate from U(0, 1). A model that reads its images whole learns a training image by its
    first codes and hardly from its caption, and is lost at its own first wrong code; where codes cannot be trusted
    the caption has to be read (docs/log.md, mini parents, second round). Codes without loss stay: they are the user's.

    Returns:
        int32 [T], or None for the ids themselves.
    """
    image = vocabulary.image_span
    if image is None:
        return None
    codes = (tokens.ids >= image.start) & (tokens.ids < image.stop) & (tokens.weights > 0)
    if not codes.any() or generator.random() >= share:
        return None
    hit = codes & (generator.random(len(tokens)) < generator.random())
    return np.where(hit, generator.integers(image.start, image.stop, len(tokens)), tokens.ids).astype(np.int32)


def best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Indices grouped into bins: longest first, each into the fullest bin that holds it.

    >>> best_fit([5, 3, 4, 2], 7)
    [[0, 3], [2, 1]]
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is left in a bin, and which; in order
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        at = bisect_left(room, (lengths[index], -1))
        left, chosen = room.pop(at) if at < len(room) else (capacity, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(index)
        insort(room, (left - lengths[index], chosen))
    return bins


@dataclass(frozen=True)
class Batch:
    """Tensors of B packed sequences of T tokens.

    ``ids``, ``positions``, ``labels`` int64 [B, T] (labels are shifted: ``labels[t]`` follows ``ids[t]``);
    ``head_ids`` int64 [B, T] is the head that predicts ``labels[t]``; ``weights`` float32 [B, T], 0 where nothing is
    predicted; ``mask`` bool [B, 1, T, T], True where a query (row) may attend; ``sources`` int64 [B].
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    head_ids: Tensor
    weights: Tensor
    mask: Tensor
    sources: Tensor

    @property
    def tokens(self) -> int:
        return int((self.labels >= 0).sum())

    def learnt(self) -> "Batch":
        """The same with labels only where they carry loss."""
        return replace(self, labels=self.labels.masked_fill(self.weights == 0, -1))

    def rows(self, start: int, stop: int) -> "Batch":
        part = slice(start, stop)
        return Batch(*(getattr(self, name)[part] for name in self.__dataclass_fields__))


def collate(sequences: list[Sequence], sources: list[int], length: int, pad: int) -> Batch:
    """Lays sequences out as one batch of ``length`` tokens a row.

    A row's unused end is one more document of pad tokens that predicts nothing.
    """
    count = len(sequences)
    ids = np.full((count, length), pad, np.int64)
    positions = np.zeros((count, length), np.int64)
    labels = np.full((count, length), -1, np.int64)
    heads = np.full((count, length), TEXT_HEAD, np.int64)
    weights = np.zeros((count, length), np.float32)
    owner = np.full((count, length), -1, np.int64)
    for row, sequence in enumerate(sequences):
        at = 0
        for number, placed in enumerate(sequence):
            tokens = placed.tokens
            stop = at + len(tokens)
            ids[row, at:stop] = tokens.ids if placed.inputs is None else placed.inputs
            positions[row, at:stop] = placed.offset + np.arange(len(tokens))
            labels[row, at : stop - 1] = tokens.ids[1:]
            heads[row, at : stop - 1] = tokens.heads[1:]
            weights[row, at : stop - 1] = tokens.weights[1:]
            owner[row, at:stop] = number
            at = stop
    causal = np.tril(np.ones((length, length), bool))
    mask = (owner[:, :, None] == owner[:, None, :]) & causal
    arrays = (ids, positions, labels, heads, weights, mask[:, None], np.array(sources, np.int64))
    return Batch(*(torch.from_numpy(array) for array in arrays))
