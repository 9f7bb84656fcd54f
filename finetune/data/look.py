"""What a prepared source holds: lengths, how full packing gets, and documents as they read, with their loss mask."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from finetune.data.rendering import Tokenizers
from finetune.data.shards import Shards, runs_of
from finetune.order.bijection import bijection
from finetune.order.pack import best_fit
from finetune.order.plan import WINDOW
from jam.errors import CheckpointError
from jam.tokens.render import IMAGE_HEAD, Tokens
from jam.tokens.vocabulary import IMAGE

WINDOWS = 16  # packed for an estimate, at most


@dataclass(frozen=True)
class Fill:
    """Packing at one length: the share of places taken, texts that are cut, documents with images that do not fit.

    ``documents`` are those that the share was measured on, in the order of the first epoch under seed 0; CM3 adds two
    tokens a span, which is not counted.
    """

    share: float
    documents: int
    cut: int
    too_long: int


def fill_of(shards: Shards, seq_len: int) -> Fill:
    lengths, pictures = shards.lengths(), shards.with_images()
    long = lengths > seq_len
    last = (len(lengths) - 1) // WINDOW
    taken = places = documents = 0
    for window in sorted({round(n) for n in np.linspace(0, last, WINDOWS).tolist()}):
        window_places = np.arange(window * WINDOW, min((window + 1) * WINDOW, len(lengths)))
        documents += len(window_places)
        parts: list[int] = []
        for index in bijection(window_places, len(lengths), 0, 0, 0).tolist():
            if not long[index]:
                parts.append(int(lengths[index]))
            elif not pictures[index]:  # as finetune.data.sources.pieces cuts it: every piece begins with <s>
                whole, rest = divmod(int(lengths[index]) - 1, seq_len - 1)
                parts += [seq_len] * whole + ([rest + 1] if rest else [])
        taken += sum(parts)
        places += len(best_fit(parts, seq_len)) * seq_len
    return Fill(taken / max(1, places), documents, int((long & ~pictures).sum()), int((long & pictures).sum()))


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """First and last length of a bin, and documents in it; bins double, and empty ones at the ends are left out.

    >>> histogram(np.array([3, 4, 5, 9]))
    [(2, 3, 1), (4, 7, 2), (8, 15, 1)]
    """
    bins = np.floor(np.log2(lengths)).astype(np.int64)
    counts = np.bincount(bins)
    return [(1 << n, (2 << n) - 1, int(counts[n])) for n in range(int(bins.min()), len(counts))]


@dataclass(frozen=True)
class Stretch:
    """Tokens of one document that belong together: what they say, and the weight of their loss (0: not learnt).

    ``codes`` are those of an image, ``grid`` its rows and columns where it carries them.
    """

    weight: float
    says: str
    codes: tuple[int, ...] = ()
    grid: tuple[int, int] | None = None

    def picture(self, model: Tokenizers) -> Image.Image | None:
        """The image; None where the model has no decoder for it."""
        if not self.codes or model.image is None or not model.image.makes_images:
            return None
        (drawn,) = model.image.decode(np.array([self.codes]), self.grid)
        return drawn


def stretches(tokens: Tokens, model: Tokenizers) -> Iterator[Stretch]:
    """A document in order; controls by their names in jam.json, other ids of turns by their words.

    Raises:
        CheckpointError: ids that are not this model's.
    """
    vocabulary = model.vocabulary
    if len(tokens) and int(tokens.ids.max()) >= vocabulary.size:
        raise CheckpointError(f"an id {int(tokens.ids.max())} of {vocabulary.size}; the shards are of another model")
    kinds, names = vocabulary.kinds(), {index: name for name, index in reversed(vocabulary.controls.items())}
    at = 0
    for length, head, weight, segment in zip(*(values.tolist() for values in runs_of(tokens)), strict=True):
        ids = tokens.ids[at : at + length]
        learnt = weight if at else 0.0  # the first token is never predicted
        at += length
        if segment >= 0 and head == IMAGE_HEAD:
            codes = ids[kinds[ids] == IMAGE] - vocabulary.image_span.start
            grid = None
            if vocabulary.framed:
                rows = int((ids == vocabulary.controls["end_row"]).sum())
                grid = (rows, len(codes) // rows)
            size = "" if grid is None else f", {grid[0]} rows of {grid[1]}"
            yield Stretch(learnt, f"an image of {len(codes)} codes{size}", tuple(codes.tolist()), grid)
        elif segment >= 0:
            yield Stretch(learnt, model.text.decode(ids.tolist()))
        else:
            word = model.text.tokenizer.id_to_token
            yield Stretch(learnt, " ".join(f"<{names[i]}>" if i in names else str(word(i)) for i in ids.tolist()))
