"""Document <-> token ids: the only writer of control tokens.

Layout (CM3Leon, arXiv 2309.02591, figure 9: text <break> image <break> ... <eos>), with roles for conversations:

    <s> text <break> codes <break> text </s>                                     a plain document
    <s> <user> text <assistant> text <break> codes <break> text </s> <user> ...  a conversation
    <s> text <mask> <break> codes <break> <infill>                               a prompt with a hole in its text
    <s> <break> <mask> <break> text <infill>                                     one with an image missing

A role token stands wherever the speaker changes; ``</s>`` closes a plain document and every assistant turn. Where the
vocabulary has a chat model's own ``turns``, they stand in place of ``<s> <user>``, ``<user>`` and ``<assistant>``. A
prompt with a hole is written as CM3 training writes the whole document with that span moved to its end
(``finetune.order.cm3.mask_spans``), up to where the span begins. Where images carry their size and row ends, these
stand among the codes (``jam.tokens.frame``).
Each token also carries the *head* that predicts it, text or image (``design``: two heads are never compared), and its
loss weight. The head is local: a token is predicted by the image head when an image is open before it, row ends and the
closing ``<break>`` included; a size in text, and the control that ends it, is the text head's.
"""

from dataclasses import dataclass

import numpy as np

from jam.document import CodesPart, Document, ImagePart, MaskPart, Part, Role, TextPart
from jam.errors import DataError
from jam.tokens.frame import frame_of, read_grid
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import IMAGE, Vocabulary

TEXT_HEAD, IMAGE_HEAD = 0, 1
NO_HOLES = (
    "an image that is missing, and this model's images carry their size: none can be written for it; ask for the image "
    "with a prompt, or for text in the hole"
)


@dataclass(frozen=True)
class Tokens:
    """Parallel arrays of one document, length T.

    ``ids`` int32; ``heads`` uint8, the head that predicts this token; ``weights`` float32, the weight of its loss
    (position 0 is never predicted); ``segments`` int32 numbers the text and image segments from 0, -1 on controls.
    """

    ids: np.ndarray
    heads: np.ndarray
    weights: np.ndarray
    segments: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


class _Writer:
    def __init__(self) -> None:
        self.ids: list[int] = []
        self.heads: list[int] = []
        self.weights: list[float] = []
        self.segments: list[int] = []
        self.segment = -1

    def add(self, ids: list[int], head: int, weight: float, control: bool) -> None:
        if not control:
            self.segment += 1
        self.ids += ids
        self.heads += [head] * len(ids)
        self.weights += [weight] * len(ids)
        self.segments += [-1 if control else self.segment] * len(ids)

    def tokens(self) -> Tokens:
        return Tokens(
            np.array(self.ids, np.int32),
            np.array(self.heads, np.uint8),
            np.array(self.weights, np.float32),
            np.array(self.segments, np.int32),
        )


def render(document: Document, vocabulary: Vocabulary, text: TextTokenizer, complete: bool = True) -> Tokens:
    """Writes a document as tokens.

    Args:
        complete: True closes the document with ``</s>``; False leaves it open for the model to go on, and after a user
            turn appends the assistant's role token (a prompt), or ``<infill>`` where the document has a hole.

    Raises:
        DataError: an image in pixels (tokenise it first), an image of the wrong length or of a size that cannot be
            written, a control that this vocabulary lacks, a reply that nobody asked for where the vocabulary's turns
            begin with the user, or a hole that cannot be filled: a second one, one in a conversation, one in a complete
            document.
    """
    controls, turns = vocabulary.controls, vocabulary.turns
    hole = _hole(document, vocabulary, complete)

    def control(name: str) -> list[int]:
        if name not in controls:
            raise DataError(f"this model's vocabulary has no {name!r} control; use one with it or another document")
        return [controls[name]]

    def begin(speaker: Role, before: Role) -> list[int]:
        if turns is None:
            return control(speaker)
        if before == "document":
            if speaker == "assistant":
                raise DataError("the conversation begins with the assistant, this model's turns with the user")
            return list(turns.opening)
        return list(turns.assistant if speaker == "assistant" else turns.user)

    writer = _Writer()
    if turns is None or not document.parts or document.parts[0].role == "document":
        writer.add(control("bos"), TEXT_HEAD, 0.0, True)
    role: Role = "document"
    weight = 0.0
    inside = False  # after a hole in text
    for part in document.parts:
        if part.role != role:
            if role == "assistant":
                writer.add(control("eos"), TEXT_HEAD, weight, True)
            writer.add(begin(part.role, role), TEXT_HEAD, 0.0, True)
            role = part.role
        weight = part.loss
        match part:
            case TextPart():
                ids = text.encode(part.text, inside)
                if ids:
                    writer.add(ids, TEXT_HEAD, weight, False)
            case CodesPart():
                begin_image, _ = control("begin_image"), control("end_image")
                frame = frame_of(vocabulary, text, part.grid)
                if len(part.codes) != frame.codes:
                    raise DataError(
                        f"an image of {len(part.codes)} codes; this vocabulary's images have exactly {frame.codes}"
                        + (f" at {frame.rows} x {frame.columns}" if vocabulary.framed else "")
                    )
                ids = frame.filled(vocabulary.image_ids(np.array(part.codes)).tolist())
                first, last = len(frame.opening), len(ids) - len(frame.closing)
                writer.add(begin_image, TEXT_HEAD, weight, True)
                writer.add(ids[: frame.spoken], TEXT_HEAD, weight, True)
                writer.add(ids[frame.spoken : first], IMAGE_HEAD, weight, True)
                writer.add(ids[first:last], IMAGE_HEAD, weight, False)
                writer.add(ids[last:], IMAGE_HEAD, weight, True)
            case MaskPart(kind="image"):
                if vocabulary.framed:
                    raise DataError(NO_HOLES)
                writer.add(control("begin_image"), TEXT_HEAD, weight, True)
                writer.add(control("mask"), IMAGE_HEAD, weight, True)
                writer.add(control("end_image"), IMAGE_HEAD, weight, True)
            case MaskPart():
                writer.add(control("mask"), TEXT_HEAD, weight, True)
            case ImagePart():
                raise DataError("an image in pixels cannot be rendered; turn it into codes first (Document.with_codes)")
        inside = isinstance(part, MaskPart) and part.kind == "text"
    if complete:
        writer.add(control("eos"), TEXT_HEAD, weight, True)
    elif hole:
        writer.add(control("infill"), TEXT_HEAD, weight, True)
    elif role == "user":
        writer.add(begin("assistant", role), TEXT_HEAD, 0.0, True)
    return writer.tokens()


def _hole(document: Document, vocabulary: Vocabulary, complete: bool) -> bool:
    """Whether a document has a hole. Raises DataError for one that cannot be filled."""
    count = sum(isinstance(part, MaskPart) for part in document.parts)
    if not count:
        return False
    if complete:
        raise DataError("a complete document has no hole; fill it first (jam.decode.stream.filled) or give a prompt")
    if count > 1:
        raise DataError(f"the prompt has {count} holes; one is filled at a time, leave out the others")
    if any(part.role != "document" for part in document.parts):
        raise DataError("a hole in a conversation; only a plain document has one, leave out who speaks")
    if missing := [name for name in ("mask", "infill") if name not in vocabulary.controls]:
        raise DataError(
            f"the prompt has a hole and this model's vocabulary no {missing[0]!r} control; models trained with the CM3 "
            "objective fill holes, use one of these or a prompt without"
        )
    return True


def _turn_at(ids: list[int], at: int, role: Role, vocabulary: Vocabulary) -> tuple[Role, int] | None:
    """Whose turn begins at a place of a stream, by the vocabulary's ``turns``, and where the words begin."""
    turns, eos = vocabulary.turns, vocabulary.controls["eos"]
    if turns is None:
        return None
    found: dict[Role, tuple[str, tuple[int, ...]]] = {
        "document": ("user", turns.opening),
        "user": ("assistant", turns.assistant),
        "assistant": ("user", (eos, *turns.user)),
    }
    speaker, written = found[role]
    if (at > 0) == (role == "document") or tuple(ids[at : at + len(written)]) != written:
        return None
    return speaker, at + len(written)


def parse(ids: list[int], vocabulary: Vocabulary, text: TextTokenizer) -> Document:
    """The inverse of :func:`render` for complete streams of documents with codes and canonical text.

    Raises:
        DataError: the stream breaks the grammar (an image of the wrong length, a stray code).
    """
    kinds = vocabulary.kinds()
    controls = vocabulary.controls
    begin = controls.get("begin_image")
    start = vocabulary.image_span.start if vocabulary.image_span else 0
    parts: list[Part] = []
    role: Role = "document"
    pending: list[int] = []

    def close_text() -> None:
        if pending:
            parts.append(TextPart(text.decode(pending), role, 0.0 if role == "user" else 1.0))
            pending.clear()

    at = 0
    while at < len(ids):
        token = ids[at]
        if (turn := _turn_at(ids, at, role, vocabulary)) is not None:
            close_text()
            role, at = turn
            continue
        if kinds[token] == IMAGE:
            raise DataError(f"token {at}: an image code outside an image; the stream breaks the grammar")
        if token == begin and vocabulary.codes_per_image:
            close_text()
            frame = frame_of(vocabulary, text, read_grid(ids, at + 1, vocabulary, text))
            inside = ids[at + 1 : at + 1 + len(frame)]
            if len(inside) < len(frame) or any(
                (kinds[c] != IMAGE) if forced is None else (c != forced)
                for c, forced in zip(inside, map(frame.forced, range(len(frame))), strict=False)
            ):
                size = f" in rows of {frame.columns} with their ends" if vocabulary.framed else ""
                raise DataError(
                    f"token {at}: an image that has not exactly {frame.codes} codes{size} and a closing token"
                )
            codes = tuple(c - start for c in inside if kinds[c] == IMAGE)
            parts.append(CodesPart(codes, role, 0.0 if role == "user" else 1.0, frame.grid))
            at += len(frame) + 1
            continue
        if token in (controls.get("user"), controls.get("assistant")):
            close_text()
            role = "user" if token == controls.get("user") else "assistant"
        elif token in (controls["bos"], controls["eos"]):
            close_text()
        else:
            pending.append(token)
        at += 1
    close_text()
    return Document(tuple(parts))
