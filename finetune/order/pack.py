"""Packing: token documents into fixed-length sequences, and sequences into a batch of tensors.

Documents in one sequence are isolated: attention is allowed inside a document only, and positions are the document's
own, from a start offset. No document is ever split here.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from jam.tokens.render import TEXT_HEAD, Tokens
from jam.tokens.vocabulary import Vocabulary


@dataclass(frozen=True)
class Placed:
    """One document with the learned position its first token takes.

    ``inputs`` are the ids that the model reads where they are not those it learns to predict (:func:`noisy_codes`);
    ``document`` is its number in its source, for errors.
    """

    tokens: Tokens
    offset: int
    inputs: np.ndarray | None = None
    document: int = -1


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
    """Indices grouped into bins, each as full as the rest allows: the longest that is left, and those that fill its bin
    best.

    Best fit one after another cannot tell that six long and six short captions fill a sequence where eleven long ones
    leave room that no twelfth fits.

    >>> best_fit([5, 3, 4, 4, 2], 9)
    [[0, 2], [3, 1, 4]]
    """
    left, bins = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)), []
    while left:
        chosen = _fullest([lengths[index] for index in left[1:]], capacity - lengths[left[0]])
        bins.append([left[0], *(left[1 + place] for place in chosen)])
        taken = {0, *(1 + place for place in chosen)}
        left = [index for place, index in enumerate(left) if place not in taken]
    return bins


def _fullest(lengths: list[int], room: int) -> list[int]:
    """Places of the items whose sum comes nearest to ``room`` from below, the first ones where several do. Bit n of a
    number says whether some of the items so far have the sum n (the subset sum problem, by Bellman's recursion)."""
    reached, below = [1], (1 << (room + 1)) - 1
    for length in lengths:
        reached.append((reached[-1] | reached[-1] << length) & below)
        if reached[-1] >> room:
            break
    total, chosen = reached[-1].bit_length() - 1, []
    for place in range(len(reached) - 2, -1, -1):
        if not reached[place] >> total & 1:
            chosen.append(place)
            total -= lengths[place]
    return chosen[::-1]


@dataclass(frozen=True)
class Batch:
    """Tensors of B packed sequences of T tokens.

    ``ids``, ``positions``, ``labels`` int64 [B, T] (labels are shifted: ``labels[t]`` follows ``ids[t]``);
    ``head_ids`` int64 [B, T] is the head that predicts ``labels[t]``; ``weights`` float32 [B, T], 0 where nothing is
    predicted; ``owners`` int64 [B, T] on the CPU, the number of a position's document in its row, -1 for the unused
    end; ``sources`` int64 [B].
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    head_ids: Tensor
    weights: Tensor
    owners: Tensor
    sources: Tensor

    @property
    def tokens(self) -> int:
        return int((self.labels >= 0).sum())

    @property
    def mask(self) -> Tensor:
        """bool [B, 1, T, T], True where a query (row) may attend: earlier tokens of its document and itself."""
        same = self.owners[:, :, None] == self.owners[:, None, :]
        return (same & torch.ones_like(same[0]).tril())[:, None].to(self.ids.device)

    def learnt(self) -> "Batch":
        """The same with labels only where they carry loss."""
        return replace(self, labels=self.labels.masked_fill(self.weights == 0, -1))

    def rows(self, start: int, stop: int) -> "Batch":
        part = slice(start, stop)
        return Batch(*(getattr(self, name)[part] for name in self.__dataclass_fields__))

    def to(self, device: torch.device) -> "Batch":
        moved = {name: getattr(self, name).to(device) for name in self.__dataclass_fields__ if name != "owners"}
        return replace(self, **moved)


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
    owners = np.full((count, length), -1, np.int64)
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
            owners[row, at:stop] = number
            at = stop
    arrays = (ids, positions, labels, heads, weights, owners, np.array(sources, np.int64))
    return Batch(*(torch.from_numpy(array) for array in arrays))
