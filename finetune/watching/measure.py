"""What a step read, counted from its documents: how full its sequences were, what the CM3 objective did to them.

Counts add up over steps and ranks; shares are taken at the end. Nothing is assumed from the recipe: a document counts
as infilled because it holds ``<infill>``, whatever share of documents was asked for.
"""

from collections.abc import Sequence as Many

import numpy as np
import torch
from torch import Tensor

from finetune.order.pack import Sequence
from jam.tokens.render import TEXT_HEAD, Tokens
from jam.tokens.vocabulary import Vocabulary

DOCUMENTS, TOKENS, PLACES, PAIRS, INFILLED, MOVED, CAPTIONS, DROPPED, SOURCES = range(9)
"""Places in :func:`count`'s result. ``PAIRS`` sums the squares of the documents' lengths, what attention costs;
``MOVED`` are tokens behind an ``<infill>``; of ``CAPTIONS`` (text, then an image, in a source that the objective is
for) ``DROPPED`` were masked as a whole; from ``SOURCES`` on stand the tokens of each source."""


def count(
    sequences: Many[Sequence], owners: Many[int], conditioned: Many[bool], length: int, vocabulary: Vocabulary
) -> Tensor:
    """float64 [8 + sources] of the sequences of a batch.

    Args:
        owners: the source of each sequence.
        conditioned: of each source, whether the objective is for it.
        length: places of a sequence.
    """
    found = np.zeros(SOURCES + len(conditioned))
    for sequence, owner in zip(sequences, owners, strict=True):
        found[PLACES] += length
        for placed in sequence:
            size = len(placed.tokens)
            found[[DOCUMENTS, TOKENS, PAIRS, SOURCES + owner]] += 1, size, size**2, size
            if conditioned[owner]:
                found[INFILLED : DROPPED + 1] += masked(placed.tokens, vocabulary)
    return torch.from_numpy(found)


def masked(tokens: Tokens, vocabulary: Vocabulary) -> tuple[int, int, int, int]:
    """Of one document: 1 if it was turned into infilling, the tokens that were moved, 1 if it has a caption, 1 if that
    was dropped, which then is no infilling. A span that chance laid over just the caption cannot be told from that."""
    own, heads = tokens.segments, tokens.heads
    first, second = (own == 0).nonzero()[0], (own == 1).nonzero()[0]
    captioned = bool(len(first) and len(second)) and heads[first[0]] == TEXT_HEAD != heads[second[0]]
    cuts = (tokens.ids == vocabulary.controls.get("infill", -1)).nonzero()[0]
    if not len(cuts):
        return 0, 0, int(captioned), 0
    if captioned and len(cuts) == 1 and first[0] > cuts[0] > second[-1]:
        return 0, 0, 1, 1
    return 1, int((own[cuts[0] :] >= 0).sum()), int(captioned), 0


def shares(figures: Many[float]) -> dict[str, float]:
    """The keys of a log's line: ``fill`` of the places; ``infill/documents``, ``infill/tokens`` of all that was read;
    ``condition_drop`` of the captions, where there were any."""
    line = {
        "fill": figures[TOKENS] / figures[PLACES],
        "infill/documents": figures[INFILLED] / max(1.0, figures[DOCUMENTS]),
        "infill/tokens": figures[MOVED] / max(1.0, figures[TOKENS]),
    }
    if figures[CAPTIONS]:
        line["condition_drop"] = figures[DROPPED] / figures[CAPTIONS]
    return {name: round(value, 4) for name, value in line.items()}
