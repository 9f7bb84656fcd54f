"""One document type for every use: training sample, prompt, reply, chat history.

A document is an ordered tuple of parts. A part is text, an image still in pixels, an image as codes, or, in a prompt, a
hole that the model fills; it carries the role that spoke it and the weight of its loss. Nothing here knows ids:
``jam.tokens.render`` is the only writer of control tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from PIL.Image import Image

from jam.errors import DataError, GenerationError

Role = Literal["document", "user", "assistant"]
MARKER = "<image>"
MOST_WEIGHT = 1000  # of a message's loss
Hole = Literal["text", "image"]


@dataclass(frozen=True)
class TextPart:
    text: str
    role: Role = "document"
    loss: float = 1.0


@dataclass(frozen=True)
class ImagePart:
    """An image in pixels (RGB), not tokenised yet."""

    image: Image
    role: Role = "document"
    loss: float = 1.0


@dataclass(frozen=True)
class CodesPart:
    """A whole image as VQ codes in raster order, each in [0, codebook size).

    ``grid`` is its rows and columns where a vocabulary writes them down; None is the vocabulary's own square.
    """

    codes: tuple[int, ...]
    role: Role = "document"
    loss: float = 1.0
    grid: tuple[int, int] | None = None


@dataclass(frozen=True)
class MaskPart:
    """A hole in a prompt: text that is missing between its neighbours, or a whole image."""

    kind: Hole
    role: Role = "document"
    loss: float = 0.0  # CM3 never learns to predict a mask


Part = TextPart | ImagePart | CodesPart | MaskPart


@dataclass(frozen=True)
class Document:
    parts: tuple[Part, ...]

    def with_codes(self, encode: Callable[[list[Image]], list[CodesPart]]) -> "Document":
        """The same document with every :class:`ImagePart` turned into codes by one call of ``encode``, which knows
        neither role nor loss."""
        images = [part.image for part in self.parts if isinstance(part, ImagePart)]
        codes = iter(encode(images) if images else ())
        parts = (
            replace(next(codes), role=part.role, loss=part.loss) if isinstance(part, ImagePart) else part
            for part in self.parts
        )
        return Document(tuple(parts))


def from_messages(messages: object, open_image: Callable[[str], Image | tuple[int, ...]]) -> Document:
    """Messages (OpenAI / TRL parts) to a document: loss 1 on what the assistant says, text and images alike, else 0.

    ``weight`` of a message (OpenAI's key) or of one of its parts is the loss there instead, from 0 to 1000.
    ``open_image`` turns a path into pixels, or into codes where they are known already. ``content`` is a string, or a
    list of ``{"type": "text", "text": ...}`` and ``{"type": "image", "path": ...}``.

    Raises:
        DataError: the structure is not that; the message says where.
    """
    if not isinstance(messages, list) or not messages:
        raise DataError("messages: expected a non-empty list of {role, content}; write one entry a turn")
    parts: list[Part] = []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict) or message.get("role") not in ("user", "assistant"):
            raise DataError(f"{where}: expected a mapping with role 'user' or 'assistant'; mend or remove this turn")
        role: Role = message["role"]
        said = _weight(message, 1.0 if role == "assistant" else 0.0, where)
        content = message.get("content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(blocks, list) or not blocks:
            raise DataError(f"{where}.content: expected text or a non-empty list of parts; give this turn content")
        for index, block in enumerate(blocks):
            loss = _weight(block, said, f"{where}.content[{index}]") if isinstance(block, dict) else said
            match block:
                case {"type": "text", "text": str(text)}:
                    parts.append(TextPart(text, role, loss))
                case {"type": "image", "path": str(path)}:
                    opened = open_image(path)
                    kind = CodesPart if isinstance(opened, tuple) else ImagePart
                    parts.append(kind(opened, role, loss))
                case _:
                    raise DataError(f"{where}.content[{index}]: expected {{type: text, text}} or {{type: image, path}}")
    return Document(tuple(parts))


def _weight(raw: dict, default: float, where: str) -> float:
    """Raises DataError for a weight that is no number from 0 to 1000."""
    found = raw.get("weight")
    if found is None:
        return default
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= MOST_WEIGHT:
        raise DataError(
            f"{where}.weight is {found!r:.40}; a number from 0 to {MOST_WEIGHT} is required, mend or remove it"
        )
    return float(found)


def user_turn(text: str, images: Sequence[Image], images_first: bool = True) -> tuple[Part, ...]:
    """A user's turn: every ``<image>`` in the text gives its place to the next image.

    >>> from PIL import Image
    >>> dot = Image.new("RGB", (1, 1))
    >>> [type(part).__name__ for part in user_turn("this <image> or <image>?", [dot, dot])]
    ['TextPart', 'ImagePart', 'TextPart', 'ImagePart', 'TextPart']

    Args:
        images_first: where images go that the text does not place: before it, or after it.

    Raises:
        GenerationError: nothing is said, what is said is not UTF-8, or the numbers of markers and images differ.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise GenerationError(
            f"the prompt holds a byte that is not UTF-8 at character {error.start}; give text in UTF-8"
        ) from None
    pieces = text.split(MARKER)
    markers = len(pieces) - 1
    if markers and markers != len(images):
        raise GenerationError(
            f"the prompt has {markers} {MARKER} markers and {len(images)} images were given; give one image a "
            "marker, in order, or no marker at all"
        )
    said: list[Part] = []
    for index, piece in enumerate(pieces):
        if piece.strip():
            said.append(TextPart(piece.strip() if markers else piece, "user", 0.0))
        if markers and index < markers:
            said.append(ImagePart(images[index], "user", 0.0))
    unplaced = [] if markers else [ImagePart(image, "user", 0.0) for image in images]
    parts = (*unplaced, *said) if images_first else (*said, *unplaced)
    if not parts:
        raise GenerationError("the prompt is empty; give some text or an image")
    return parts
