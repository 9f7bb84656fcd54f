"""Held-out parts of the shipped mini data: texts, captioned images, captions to draw.

All choices of rows are even strides through the splits: fixed, spread over styles and subjects, and never picked by
looking at a result.
"""

from collections.abc import Sequence

from finetune.data import mini_data
from finetune.data.sources import mini_codes
from jam.document import CodesPart, Document, TextPart
from jam.tokens.image import ImageTokenizer

CAPTION_SPLITS = {"validation": ("validation",), "test": ("combination", "label")}
DRAWABLE = ("animals-nature", "food-drink", "travel-places", "objects", "activities")  # things, not signs or faces


def spread(rows: Sequence, count: int) -> list:
    """``count`` rows from the middles of even strides (all of them when there are fewer).

    >>> spread("abcdef", 3)
    ['b', 'd', 'f']
    """
    count = min(count, len(rows))
    return [rows[(2 * at + 1) * len(rows) // (2 * count)] for at in range(count)]


def held_out_texts(split: str, size: int) -> list[str]:
    """Texts of a split at even strides, about ``size`` bytes in all."""
    texts = mini_data.texts(split)
    mean = sum(len(text.encode()) for text in texts) / len(texts)
    return spread(texts, max(1, round(size / mean)))


def held_out_captions(split: str, count: int, tokenizer: ImageTokenizer) -> list[Document]:
    """Captioned images of a split as documents with codes, an equal share of each kind of held-out image."""
    kinds = CAPTION_SPLITS[split]
    chosen: list[dict] = []
    for kind in kinds:
        chosen += spread([row for row in mini_data.image_rows() if row["split"] == kind], count // len(kinds))
    codes = mini_codes(tokenizer, [row["file"] for row in chosen])
    captions = [(TextPart(mini_data.caption_for(row)), codes[row["file"]]) for row in chosen]
    return [Document((text, CodesPart(tuple(image.tolist())))) for text, image in captions]


def held_out_pictures(split: str, count: int) -> list[dict]:
    """Image rows of a split to draw, all of different labels, the styles of a label in turn."""
    by_label: dict[str, list[dict]] = {}
    for row in mini_data.image_rows():
        if row["split"] == split and row["group"] in DRAWABLE:
            by_label.setdefault(row["label"], []).append(row)
    return [by_label[label][at % len(by_label[label])] for at, label in enumerate(spread(list(by_label), count))]
