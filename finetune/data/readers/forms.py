"""Rows to documents: one function for each form that data comes in, by the reader's name.

A form takes one row (a JSON object, or a row of a table or an archive) and never looks at others. Loss: plain documents
are learnt whole; of conversations what the assistant says, its images included.
"""

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from finetune.data.readers.lines import text_field
from finetune.data.readers.media import Media
from jam.document import MARKER, CodesPart, Document, ImagePart, Part, TextPart, from_messages
from jam.errors import DataError

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
PICTURES = ("image", "file_name", "jpg", "jpeg", "png", "webp")
CAPTIONS = ("caption", "text", "txt")


@dataclass(frozen=True)
class Context:
    """What a form may need beside the row. ``codes_per_image`` is the model's, None where no model is given."""

    media: Media
    codes_per_image: int | None = None


Form = Callable[[dict, Context], Document]


def text(row: dict, context: Context) -> Document:
    """``{"text"}``"""
    return Document((TextPart(text_field(row, "text")),))


def captions(row: dict, context: Context) -> Document:
    """``{"image", "caption"}``: the caption, then the image. Tables say ``text`` and ``file_name`` too, archives the
    members' suffixes."""
    caption = text_field(row, *CAPTIONS)
    key = next((key for key in PICTURES if row.get(key) is not None), None)
    if key is None:
        raise DataError(f"no image; one of the fields {', '.join(PICTURES)} is required")
    return Document((TextPart(caption), ImagePart(context.media.open(row[key]))))


def messages(row: dict, context: Context) -> Document:
    """``{"messages"}`` (OpenAI, TRL) or ``{"conversations"}`` (LLaVA, ShareGPT), images in their places.

    A part of type ``image`` or ``image_url`` may name its image; one that does not, and every ``<image>`` in a text,
    takes the next of the row's ``images`` (or ``image``). Where there are images and no place for any, they go before
    the first user's words, as TRL puts them.
    """
    listed = _listed(row)
    turns = [_turn(turn, f"messages[{number}]") for number, turn in enumerate(_turns(row))]
    blocks = [block for turn in turns for block in turn["content"]]
    places = [block for block in blocks if block["type"] == "image" and block["image"] is None]
    if listed and not any(block["type"] == "image" for block in blocks):
        first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
        places = [{"type": "image", "image": None} for _ in listed]
        first["content"] = [*places, *first["content"]]
    if len(places) != len(listed):
        raise DataError(
            f"{len(places)} places for images ({MARKER} or parts without a path) and {len(listed)} images; as many of "
            "both are required, mend or remove the line"
        )
    for place, image in zip(places, listed, strict=True):
        place["image"] = image
    for number, turn in enumerate(turns):
        if not any(block["type"] == "image" or block["text"].strip() for block in turn["content"]):
            raise DataError(f"messages[{number}]: neither words nor an image; give this turn content or remove it")
    values = []
    for turn in turns:
        for block in turn["content"]:
            if block["type"] == "image":
                values.append(block.pop("image"))
                block["path"] = str(len(values) - 1)
    document = from_messages(turns, lambda number: context.media.open(values[int(number)]))
    if not any(part.loss for part in document.parts):
        raise DataError("no turn of the assistant, so nothing to learn; add one or remove the line")
    return document


def _listed(row: dict) -> list:
    """The row's own list of images; ``image`` may be one path or a list."""
    if row.get("images") is not None and row.get("image") is not None:
        raise DataError("fields 'images' and 'image' are both there; one of them is required, remove the other")
    found = row.get("images") if row.get("images") is not None else row.get("image")
    if found is None:
        return []
    if isinstance(found, list):
        return found
    return [found]


def _turns(row: dict) -> list[dict]:
    if row.get("messages") is not None:
        found, name = row["messages"], "messages"
    else:
        found, name = row.get("conversations"), "conversations"
    if not isinstance(found, list) or not found or not all(isinstance(turn, dict) for turn in found):
        raise DataError(f"{name}: expected a non-empty list of turns, in 'messages' or 'conversations'")
    return found


def _turn(turn: dict, where: str) -> dict:
    """A turn as ``{role, content: [parts]}`` with texts split at ``<image>``; an image part holds ``image`` or None."""
    said = turn.get("role", turn.get("from"))
    role = SPEAKERS.get(said) if isinstance(said, str) else None
    if role is None:
        raise DataError(
            f"{where}: the speaker is {str(said)[:40]!r}; {', '.join(SPEAKERS)} are known, mend or remove the turn"
        )
    if calls := next((key for key in ("tool_calls", "function_call") if turn.get(key)), None):
        raise DataError(f"{where}: {calls}, which no model here can learn; text and images are read, remove the line")
    content = turn.get("content", turn.get("value"))
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(blocks, list) or not blocks:
        raise DataError(f"{where}: expected text or a non-empty list of parts; give this turn content")
    parts: list[dict] = []
    for index, block in enumerate(blocks):
        before = len(parts)
        match block:
            case {"type": "text", "text": str(words)}:
                parts += _split(words)
            case {"type": "image_url", "image_url": {"url": str(url)}}:
                parts.append({"type": "image", "image": url})
            case {"type": "image"}:
                keys = [key for key in ("path", "image", "url") if block.get(key) is not None]
                if len(keys) > 1:
                    raise DataError(f"{where}.content[{index}]: an image by {' and '.join(keys)}; name it once")
                parts.append({"type": "image", "image": block[keys[0]] if keys else None})
            case _:
                raise DataError(f"{where}.content[{index}]: expected {{type: text, text}} or {{type: image, path}}")
        if block.get("weight") is not None:
            parts[before:] = [part | {"weight": block["weight"]} for part in parts[before:]]
    return {"role": role, "content": parts, "weight": turn.get("weight")}


def _split(words: str) -> list[dict]:
    """Text and places; what touches a place loses its outer space, as in a prompt (``jam.document.user_turn``)."""
    pieces = words.split(MARKER)
    if len(pieces) == 1:
        return [{"type": "text", "text": words}]
    parts: list[dict] = []
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image", "image": None})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def interleaved(row: dict, context: Context) -> Document:
    """Web pages of OBELICS' form (``{"texts", "images"}``, one of both at each place) or MMC4's (``{"text_list",
    "image_info"}``, each image before the sentence it was matched to)."""
    ordered = _mmc4(row) if "text_list" in row else _obelics(row)
    parts: list[Part] = []
    for kind, value in ordered:
        parts.append(TextPart(value) if kind == "text" else ImagePart(context.media.open(value)))
    if not parts:
        raise DataError("neither text nor images; remove the line")
    return Document(tuple(parts))


def _obelics(row: dict) -> Sequence[tuple[str, object]]:
    texts, images = row.get("texts"), row.get("images")
    if not isinstance(texts, list) or not isinstance(images, list) or len(texts) != len(images):
        raise DataError("expected lists 'texts' and 'images' of one length, or 'text_list' and 'image_info'")
    found: list[tuple[str, object]] = []
    for number, (words, image) in enumerate(zip(texts, images, strict=True)):
        if (words is None) == (image is None) or not (words is None or isinstance(words, str)):
            raise DataError(f"place {number} of 'texts' and 'images': exactly one of text and image is required")
        if image is not None:
            found.append(("image", image))
        elif words.strip():
            found.append(("text", words))
    return found


def _mmc4(row: dict) -> Sequence[tuple[str, object]]:
    sentences, infos = row["text_list"], row.get("image_info")
    if not isinstance(sentences, list) or not all(isinstance(words, str) for words in sentences):
        raise DataError("field 'text_list': expected a list of texts")
    if not isinstance(infos, list) or not all(isinstance(info, Mapping) for info in infos):
        raise DataError("field 'image_info': expected a list of objects")
    before: dict[int, list[object]] = {}
    for number, info in enumerate(infos):
        place = info.get("matched_text_index")
        name = info.get("image_name") if info.get("image_name") is not None else info.get("raw_url")
        if type(place) is not int or not 0 <= place < len(sentences) or not isinstance(name, str):
            raise DataError(
                f"image_info[{number}]: image_name (or raw_url) and matched_text_index below {len(sentences)} are "
                "required"
            )
        before.setdefault(place, []).append(name)
    found: list[tuple[str, object]] = []
    for number, words in enumerate(sentences):
        found += [("image", name) for name in before.get(number, ())]
        if found and found[-1][0] == "text":
            found[-1] = ("text", f"{found[-1][1]} {words}")
        elif words.strip():
            found.append(("text", words))
    return found


def codes(row: dict, context: Context) -> Document:
    """``{"tokens"}``: base64 of int32, little-endian, whole images one after another (LVM's visual sentences)."""
    written = text_field(row, "tokens")
    try:
        data = base64.b64decode(written, validate=True)
        if not data or len(data) % 4:
            raise ValueError(f"{len(data)} bytes")
    except (ValueError, binascii.Error) as error:
        raise DataError(f"field 'tokens': base64 of int32 numbers is required ({error}); mend the line") from None
    values = np.frombuffer(data, "<i4").tolist()
    size = context.codes_per_image or len(values)
    if len(values) % size:
        raise DataError(f"{len(values)} codes; this model's images have {size}, a multiple is required")
    images = (values[at : at + size] for at in range(0, len(values), size))
    return Document(tuple(CodesPart(tuple(image)) for image in images))


FORMS: dict[str, Form] = {
    "text": text,
    "captions": captions,
    "messages": messages,
    "interleaved": interleaved,
    "codes": codes,
}
