"""The CM3 objective: turn a document into an infilling instance, and back.

Aghajanyan et al., *CM3* (arXiv 2201.07520, section 2) with CM3Leon's two changes (arXiv 2309.02591, section 2.2): one
``<mask>`` / ``<infill>`` pair of tokens, and no span across ``<break>``.

    <s> Image of a cat <break> ... <break> </s>   ->   <s> Image of <mask> <break> ... <break> <infill> a cat </s>

Several spans are told apart by order: the n-th ``<infill>`` belongs to the n-th ``<mask>``. Predicting ``<mask>`` has
loss weight 0 (CM3, section 2). A span lies inside one text or image segment: a drawn span is clipped to the segment
that it overlaps most. No token is lost: the transform grows a document by two tokens a span. A long text is cut so that
the growth of its pieces fits (``finetune.data.sources.cut``); a document with images, which is never cut, gets fewer
spans where it would not.

The number of spans is drawn before the cut, the spans after it: :func:`draw_instance`, then :func:`infilled`.
"""

import numpy as np

from finetune.recipe import ObjectiveSection
from jam.errors import RunError
from jam.tokens.render import TEXT_HEAD, Tokens
from jam.tokens.vocabulary import Vocabulary

CAPTION = -1  # beside numbers of spans: the caption goes as a whole
_TRIES = 64
Span = tuple[int, int]  # start, stop


def draw_instance(generator: np.random.Generator, objective: ObjectiveSection, captioned: bool = True) -> int:
    """What happens to a document: ``CAPTION``, or its number of spans, 0 for none. ``condition_drop`` is drawn first,
    ``cm3`` is a share of the rest: of a document that is not ``captioned`` (:func:`caption_span`), of all."""
    draw, drop = generator.random(), objective.condition_drop if captioned else 0.0
    if draw < drop:
        return CAPTION
    if draw >= drop + objective.cm3 * (1 - drop):
        return 0
    if objective.spans == "one":
        return 1
    return int(np.clip(generator.poisson(1.0), objective.clamp_min, objective.clamp_max))


def growth(instance: int) -> int:
    """Tokens that a document grows by at most."""
    return 2 * abs(instance)


def segment_bounds(tokens: Tokens) -> list[Span]:
    """Start and stop of every text and image segment, in order; a piece of a long text may lack the first ones."""
    bounds = []
    for number in np.unique(tokens.segments[tokens.segments >= 0]):
        where = np.flatnonzero(tokens.segments == number)
        bounds.append((int(where[0]), int(where[-1]) + 1))
    return bounds


def draw_spans(tokens: Tokens, count: int, generator: np.random.Generator) -> list[Span]:
    """``count`` disjoint, non-empty spans in order, each inside one segment; fewer only where a document hardly holds
    them.

    Ends that meet, hold controls alone or touch another span are drawn again. One span at least, if ``count`` is and
    anything can be masked.
    """
    bounds = segment_bounds(tokens)
    spans: list[Span] = []
    if not bounds:
        return spans
    for _ in range(_TRIES * count):
        if len(spans) == count:
            break
        start, stop = sorted(generator.integers(0, len(tokens) + 1, size=2).tolist())
        clipped = max(((max(start, a), min(stop, b)) for a, b in bounds), key=lambda s: s[1] - s[0], default=(0, 0))
        touches = any(clipped[0] <= b and a <= clipped[1] for a, b in spans)  # adjacent masks could not be told apart
        if clipped[1] > clipped[0] and not touches:
            spans.append(clipped)
    if not spans and count:
        spans.append(max(bounds, key=lambda s: s[1] - s[0]))
    return sorted(spans)


def caption_span(tokens: Tokens) -> list[Span]:
    """The whole first text segment, if an image follows it: the form that guidance uses as "no condition"."""
    bounds = segment_bounds(tokens)
    if len(bounds) < 2:
        return []
    first, second = bounds[0], bounds[1]
    is_caption = tokens.heads[first[0]] == TEXT_HEAD and tokens.heads[second[0]] != TEXT_HEAD
    return [first] if is_caption else []


def mask_spans(tokens: Tokens, spans: list[Span], vocabulary: Vocabulary) -> Tokens:
    """Moves each span behind the document, leaving ``<mask>`` in its place; +2 tokens a span.

    Raises:
        RunError: a vocabulary without these controls.
    """
    if not spans:
        return tokens
    if missing := [name for name in ("mask", "infill") if name not in vocabulary.controls]:
        raise RunError(
            f"a span is to be masked, and this model's vocabulary has no {missing[0]!r} control; set objective.cm3 and "
            "objective.condition_drop to 0, or train a model that has it"
        )
    mask, infill, eos = (vocabulary.controls[name] for name in ("mask", "infill", "eos"))
    closed = tokens.ids[-1] == eos
    body_stop = len(tokens) - int(closed)
    ids, heads, weights, segments = [], [], [], []

    def copy(start: int, stop: int) -> None:
        for target, source in (
            (ids, tokens.ids),
            (heads, tokens.heads),
            (weights, tokens.weights),
            (segments, tokens.segments),
        ):
            target.append(source[start:stop])

    def control(token: int, head: int, weight: float) -> None:
        for target, value in ((ids, token), (heads, head), (weights, weight), (segments, -1)):
            target.append(np.array([value]))

    at = 0
    for start, stop in spans:
        copy(at, start)
        control(mask, int(tokens.heads[start]), 0.0)
        at = stop
    copy(at, body_stop)
    head = TEXT_HEAD  # after a span, the span's own segment stays in charge until <infill> or </s>
    closing_weight = float(tokens.weights[-1])
    for start, stop in spans:
        control(infill, head, closing_weight)
        copy(start, stop)
        head = int(tokens.heads[start])
    if closed:
        control(eos, head, closing_weight)
    return Tokens(
        np.concatenate(ids).astype(np.int32),
        np.concatenate(heads).astype(np.uint8),
        np.concatenate(weights).astype(np.float32),
        np.concatenate(segments).astype(np.int32),
    )


def unmask(ids: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """The inverse of :func:`mask_spans` on ids."""
    mask, infill, eos = (vocabulary.controls[name] for name in ("mask", "infill", "eos"))
    cuts = np.flatnonzero(ids == infill)
    if not len(cuts):
        return ids
    closed = ids[-1] == eos
    stop = len(ids) - int(closed)
    spans = [ids[a + 1 : b] for a, b in zip(cuts, [*cuts[1:], stop], strict=True)]
    body = np.split(ids[: cuts[0]], np.flatnonzero(ids[: cuts[0]] == mask))
    whole = [body[0]] + [piece for span, rest in zip(spans, body[1:], strict=True) for piece in (span, rest[1:])]
    return np.concatenate([*whole, ids[stop:]])


def infilled(
    tokens: Tokens, instance: int, generator: np.random.Generator, vocabulary: Vocabulary, room: int
) -> Tokens:
    """One document as :func:`draw_instance` said.

    Args:
        room: the longest the result may be, in tokens.
    """
    most = max(0, (room - len(tokens)) // 2)
    if instance == CAPTION:
        return mask_spans(tokens, caption_span(tokens)[:most], vocabulary)
    return mask_spans(tokens, draw_spans(tokens, min(instance, most), generator), vocabulary)
