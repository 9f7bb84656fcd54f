"""Evaluating a head on the ids it owns, and placing the result among all ids.

What a head owns are slices of the id space (control + text, or control + image), so that its rows are views of its
weight and nothing is gathered. Shapes: B batch, T tokens, D model width, K a head's own ids, V vocabulary.
"""

import torch
from torch import Tensor, nn

from jam.tokens.render import TEXT_HEAD
from jam.tokens.vocabulary import Vocabulary


def owned_slices(vocabulary: Vocabulary, head: int) -> list[slice]:
    """The ids that a head may say, as slices in ascending order, neighbours joined.

    Args:
        head: TEXT_HEAD (text and control ids) or IMAGE_HEAD (image and control ids).
    """
    foreign = "image" if head == TEXT_HEAD else "text"
    slices: list[slice] = []
    for span in vocabulary.spans:
        if span.kind == foreign:
            continue
        if slices and slices[-1].stop == span.start:
            slices[-1] = slice(slices[-1].start, span.stop)
        else:
            slices.append(slice(span.start, span.stop))
    return slices


class SpanHead(nn.Linear):
    """A head without bias that can score some slices of its rows only.

    A module and not a function of the weight: sharding and offloading gather a module's weight when it is *called*.
    """

    def forward(self, x_BTD: Tensor, slices: list[slice] | None = None) -> Tensor:
        """[..., V], or with ``slices`` [..., K] in their order."""
        if slices is None:
            return super().forward(x_BTD)
        return torch.cat([nn.functional.linear(x_BTD, self.weight[part]) for part in slices], -1)


def place(own_K: Tensor, slices: list[slice], size: int) -> Tensor:
    """Scores of owned ids [..., K] among all ids [..., size]; the others get the dtype's lowest finite value."""
    out = own_K.new_full((*own_K.shape[:-1], size), torch.finfo(own_K.dtype).min)
    at = 0
    for part in slices:
        width = part.stop - part.start
        out[..., part] = own_K[..., at : at + width]
        at += width
    return out
