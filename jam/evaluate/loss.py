"""Held-out losses of any model, fused or plain: bits per byte of text, nats per image code.

Stages: render documents -> choose the predicted tokens that count -> batch by length -> forward -> sum nats.
Both measures use the restricted softmax (each position's head over its own span and the control rows), whatever the
model was trained with, so that parents and fusions stand in one table. Nothing is sampled: the same model and documents
give the same number. Images must be codes already; nothing here reads files.

Shapes: B documents of a batch, T tokens of its longest.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from jam.document import Document, TextPart
from jam.errors import DataError
from jam.models.load import Bundle
from jam.tokens.render import Tokens, render
from jam.tokens.vocabulary import IMAGE

Progress = Callable[[int, int], None]  # tokens done, tokens in all


@dataclass(frozen=True)
class Item:
    """A rendered document, which of its tokens are scored (bool [T]), and the ``size`` (bytes, codes) to divide by."""

    tokens: Tokens
    scored: np.ndarray
    size: int


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Indices grouped so that count x longest <= ``batch_tokens`` (a longer document stands alone), longest first.

    >>> batches_by_length([2, 5, 3, 1], 6)
    [[1], [2, 0], [3]]
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= batch_tokens:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


@torch.no_grad()
def scored_logits(
    bundle: Bundle, items: Sequence[Item], batch_tokens: int = 4096
) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Float logits [N, V] of every scored token, given all tokens before it in its document, and the tokens themselves
    [N], batch by batch; with the number of tokens that the batch holds. The order depends on the lengths alone."""
    device = bundle.model.device
    bundle.model.eval()
    for group in batches_by_length([len(item.tokens) for item in items], batch_tokens):
        longest = len(items[group[0]].tokens)
        ids_BT = np.full((len(group), longest), bundle.vocabulary.controls.get("pad", 0), np.int64)
        heads_BT = np.zeros((len(group), longest), np.int64)  # the head that predicts this token
        scored_BT = np.zeros((len(group), longest), bool)
        for row, index in enumerate(group):
            length = len(items[index].tokens)
            ids_BT[row, :length] = items[index].tokens.ids
            heads_BT[row, :length] = items[index].tokens.heads
            scored_BT[row, :length] = items[index].scored
        ids, heads, scored = (torch.from_numpy(array).to(device) for array in (ids_BT, heads_BT, scored_BT))
        # Padding stands on the right: a causal model never reads it, so no mask is needed.
        inputs = ids[:, :-1]
        positions = torch.arange(longest - 1, device=device).expand_as(inputs)
        logits, _ = bundle.logits(inputs, heads[:, 1:], position_ids=positions)
        keep = scored[:, 1:]
        yield logits[keep].float(), ids[:, 1:][keep], sum(len(items[index].tokens) for index in group)


def sum_nats(
    bundle: Bundle, items: Sequence[Item], batch_tokens: int = 4096, progress: Progress | None = None
) -> float:
    """Total of -ln p over every scored token, each given all tokens before it in its document."""
    total, done = 0.0, 0
    overall = sum(len(item.tokens) for item in items)
    for logits, ids, tokens in scored_logits(bundle, items, batch_tokens):
        total += torch.nn.functional.cross_entropy(logits, ids, reduction="none").double().sum().item()
        done += tokens
        if progress:
            progress(done, overall)
    return total


def text_item(bundle: Bundle, text: str, context: int) -> Item:
    """``<s> text </s>`` cut to ``context`` tokens; scored are all but ``<s>``, paid for by the UTF-8 bytes kept."""
    tokens = render(Document((TextPart(text),)), bundle.vocabulary, bundle.text)
    size = len(text.encode())
    if len(tokens) > context:
        tokens = Tokens(*(array[:context] for array in (tokens.ids, tokens.heads, tokens.weights, tokens.segments)))
        end = bundle.text.tokenizer.encode(text, add_special_tokens=False).offsets[context - 2][1]
        size = len(text[:end].encode())
    return Item(tokens, np.arange(len(tokens)) > 0, size)


def evaluate_text(
    bundle: Bundle,
    texts: Sequence[str],
    *,
    context: int | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> float:
    """Bits per byte of plain texts.

    Each text is its own document ``<s> text </s>``. The sum of -ln p over its text tokens and the closing ``</s>``,
    divided by ln 2 and by the UTF-8 bytes of the texts: comparable across vocabularies. A document longer than the
    context is cut there: its ``</s>`` and the bytes behind the cut count on neither side.

    Args:
        context: the most tokens a document may have; the model's own context by default.
        batch_tokens: the most padded tokens a forward pass sees.

    Raises:
        DataError: no text, or none with a byte in it.
    """
    items = [text_item(bundle, text, context or bundle.max_positions) for text in texts]
    size = sum(item.size for item in items)
    if not size:
        raise DataError(f"{len(texts)} texts with 0 bytes to evaluate; at least one byte is required, give some text")
    return sum_nats(bundle, items, batch_tokens, progress) / math.log(2) / size


def caption_item(bundle: Bundle, document: Document, context: int) -> Item:
    """A document with images as codes; scored are the codes alone, not the tokens that open and close them."""
    tokens = render(document, bundle.vocabulary, bundle.text)
    if len(tokens) > context:
        raise DataError(
            f"a captioned image of {len(tokens)} tokens; the context holds {context}; shorten the caption or drop it"
        )
    scored = bundle.vocabulary.kinds()[tokens.ids] == IMAGE
    return Item(tokens, scored, int(scored.sum()))


def evaluate_captions(
    bundle: Bundle,
    documents: Sequence[Document],
    *,
    context: int | None = None,
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> float | None:
    """Nats per image code of captioned images; None for a model without an image head.

    Codes are predicted from their caption and the codes before them. Only code positions count: the closing
    ``<break>`` is forced in use, and the caption is a condition.

    Raises:
        DataError: no image in the documents, images still in pixels or of the wrong length, or a document longer than
            the context.
    """
    if bundle.vocabulary.image_span is None:
        return None
    items = [caption_item(bundle, document, context or bundle.max_positions) for document in documents]
    size = sum(item.size for item in items)
    if not size:
        raise DataError(f"{len(documents)} documents without an image to evaluate; give captioned images as codes")
    return sum_nats(bundle, items, batch_tokens, progress) / size
