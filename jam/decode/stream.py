"""Steps to what a reader sees: text as it comes, images when they are whole, and the reply as a document.

Stages: a step goes to its row's text or codes; whole UTF-8 characters leave as ``TextDelta``; the closing control of an
image decodes its codes to pixels and leaves as ``ImageDone``; the last step leaves as ``Stop``.
A half-written image never enters the document: stop reading at any step, and the reply is still well formed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from PIL.Image import Image

from jam.decode.engine import generate
from jam.decode.grammar import Kind, Rules, Step, StopReason
from jam.decode.job import Options, options_of, rules_of
from jam.decode.options import SamplingOptions
from jam.decode.stop import StopText
from jam.document import CodesPart, Document, MaskPart, Part, Role, TextPart
from jam.errors import GenerationError
from jam.models.load import Bundle
from jam.tokens.text import TextStream


@dataclass(frozen=True)
class TextDelta:
    row: int
    text: str


@dataclass(frozen=True)
class ImageStart:
    row: int
    index: int


@dataclass(frozen=True)
class ImageProgress:
    """``done`` of ``total`` codes are there; every so-manieth row the image so far, where previews are asked for."""

    row: int
    index: int
    done: int
    total: int
    preview: Image | None = None


@dataclass(frozen=True)
class ImageDone:
    """A whole image: exact codes, and pixels if the model has an image tokenizer."""

    row: int
    index: int
    codes: tuple[int, ...]
    image: Image | None


@dataclass(frozen=True)
class Stop:
    """``eos``: the model ended its reply; ``length``: the context or the token budget did; ``stop``: a stop string."""

    row: int
    reason: StopReason


Event = TextDelta | ImageStart | ImageProgress | ImageDone | Stop


@dataclass(frozen=True)
class Reply:
    """A reply in full. ``images`` are the pixels of the document's images, in order (empty without a tokenizer);
    ``stop`` is ``cut`` while the model has not ended it."""

    document: Document
    images: tuple[Image, ...]
    stop: StopReason | Literal["cut"]


@dataclass
class _Row:
    role: Role
    stream: TextStream
    rules: Rules
    opened: bool = False  # the reply begins inside an image
    parts: list[Part] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    drawn: int = 0
    stop: StopReason | Literal["cut"] = "cut"
    words: tuple[str, ...] = ()
    shown: StopText = field(init=False)
    cut: int | None = None  # where the text at hand ends before a stop string

    def __post_init__(self) -> None:
        self.shown = StopText(self.words)


class ReplyStream:
    """Collects the steps of one ``generate`` call; ``push`` turns each into events.

    Args:
        options: those of the call, whose stop strings are not shown.
        preview_rows: rows of codes after which an image is shown as far as it is there; 0 shows none.
    """

    def __init__(self, bundle: Bundle, prompts: Sequence[Document], options: Options = None, preview_rows: int = 0):
        self.bundle = bundle
        self.preview_rows = preview_rows if bundle.image is not None else 0
        self.rows = [
            _Row(reply_role(prompt), *self._beginning(prompt, own), words=own.stop)
            for prompt, own in zip(prompts, options_of(bundle, prompts, options), strict=True)
        ]

    def _beginning(self, prompt: Document, own: SamplingOptions) -> tuple[TextStream, Rules, bool]:
        """The text that a reply begins with, which goes on from other text in a hole; its rules; whether an image is
        open."""
        inside = any(isinstance(a, TextPart) and isinstance(b, MaskPart) for a, b in pairwise(prompt.parts))
        hole = next((part.kind for part in prompt.parts if isinstance(part, MaskPart)), None)
        return TextStream(self.bundle.text, inside), rules_of(self.bundle, own, hole), hole == "image"

    def push(self, step: Step) -> list[Event]:
        row, index = self.rows[step.row], step.row
        events: list[Event] = []
        match step.kind:
            case Kind.TEXT:
                row.text.append(step.token)
                shown = row.shown.push(row.stream.push(step.token))
                ended = step.stop == "stop"
                row.cut = row.shown.cut if ended else None
                # a stop string that did not end the reply is text
                events += self._delta(index, shown if ended or not row.shown.found else shown + row.shown.flush())
            case Kind.BEGIN:
                events += self._close_text(index)
                events.append(ImageStart(index, row.drawn))
            case Kind.CODE:
                if row.opened and not row.codes:
                    events.append(ImageStart(index, row.drawn))
                row.codes.append(step.token - self.bundle.vocabulary.image_span.start)
                frame, preview = row.rules.image, None
                total, columns = frame.codes, math.isqrt(frame.codes) if frame.grid is None else frame.columns
                every = self.preview_rows * columns
                if every and len(row.codes) % every == 0 and len(row.codes) < total:
                    preview = self.bundle.image.preview(row.codes, frame.grid)
                events.append(ImageProgress(index, row.drawn, len(row.codes), total, preview))
            case Kind.END:
                events.append(self._close_image(index))
            case Kind.EOS:
                events += [self._close_image(index)] if row.codes else []
            case Kind.FRAME:
                pass
        if step.stop is not None:
            events += self._close_text(index)
            row.stop = step.stop
            events.append(Stop(index, step.stop))
        return events

    def reply(self, index: int) -> Reply:
        """The reply so far; an image that is not whole is left out."""
        row = self.rows[index]
        parts = [*row.parts, *self._text_part(row)]
        return Reply(Document(tuple(parts)), tuple(row.images), row.stop)

    def _delta(self, index: int, text: str) -> list[Event]:
        return [TextDelta(index, text)] if text else []

    def _text_part(self, row: _Row) -> list[Part]:
        text = self.bundle.text.decode(row.text, row.stream.inside)[: row.cut] if row.text else ""
        return [TextPart(text, row.role)] if text else []

    def _close_text(self, index: int) -> list[Event]:
        row = self.rows[index]
        row.parts += self._text_part(row)
        rest = [] if row.cut is not None else self._delta(index, row.shown.push(row.stream.flush()) + row.shown.flush())
        row.text, row.stream, row.shown, row.cut = [], TextStream(self.bundle.text), StopText(row.words), None
        return rest

    def _close_image(self, index: int) -> ImageDone:
        row = self.rows[index]
        codes, grid = tuple(row.codes), row.rules.image.grid
        image = None
        if self.bundle.image is not None:
            (image,) = self.bundle.image.decode(np.array([codes]), grid)
            row.images.append(image)
        row.parts.append(CodesPart(codes, row.role, grid=grid))
        row.codes = []
        row.drawn += 1
        return ImageDone(index, row.drawn - 1, codes, image)


def reply_role(prompt: Document) -> Role:
    """The assistant answers a conversation; a plain document goes on as itself."""
    last = prompt.parts[-1].role if prompt.parts else "document"
    return "document" if last == "document" else "assistant"


def filled(prompt: Document, reply: Reply) -> Document:
    """A prompt with what fills its hole in the hole's place; neighbouring text becomes one part.

    Raises:
        GenerationError: the prompt has no hole, or more than one.
    """
    holes = sum(isinstance(part, MaskPart) for part in prompt.parts)
    if holes != 1:
        raise GenerationError(f"the prompt has {holes} holes; required: one, give the prompt of this reply")
    parts: list[Part] = []
    for place in prompt.parts:
        for part in reply.document.parts if isinstance(place, MaskPart) else (place,):
            if isinstance(part, TextPart) and parts and isinstance(parts[-1], TextPart):
                parts[-1] = replace(parts[-1], text=parts[-1].text + part.text)
            else:
                parts.append(part)
    return Document(tuple(parts))


def events(
    bundle: Bundle,
    prompts: Sequence[Document],
    options: Options = None,
    streams: Sequence[int] | None = None,
    preview_rows: int = 0,
) -> Iterator[Event]:
    """The events of ``jam.decode.engine.generate``, with its arguments and errors; ``preview_rows`` as ``ReplyStream``
    takes it."""
    steps = generate(bundle, prompts, options, streams)  # first: it says what is wrong with a prompt
    stream = ReplyStream(bundle, prompts, options, preview_rows)
    return (event for step in steps for event in stream.push(step))


def replies(
    bundle: Bundle,
    prompts: Sequence[Document],
    options: Options = None,
    streams: Sequence[int] | None = None,
) -> list[Reply]:
    """Whole replies, in the order of the prompts; arguments and errors of ``jam.decode.engine.generate``."""
    steps = generate(bundle, prompts, options, streams)
    stream = ReplyStream(bundle, prompts, options)
    for step in steps:
        stream.push(step)
    return [stream.reply(index) for index in range(len(prompts))]
