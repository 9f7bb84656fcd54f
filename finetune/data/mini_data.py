"""The shipped mini data: rows, images, captions, two-object scenes, texts, conversations, by split.

Everything random is drawn from hashes of names, so that splits and scenes never depend on order or machine.
"""

import hashlib
import io
import json
import lzma
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from jam.assets import DATA

SCENE_GROUPS = ("animals-nature", "food-drink")
TRAIN_SCENES, HELD_OUT_SCENES = 5_000, 300
CAPTION_FORMS = (
    "{label}",
    "a {style} drawing of {label}",
    "{label} in the {style} style",
    "{label}, {tags}",
)
STYLED = 1  # the form that names label and style: used for scenes' frame and for every evaluation


def hash_fraction(*keys: str) -> float:
    """A number in [0, 1) that depends only on the keys."""
    digest = hashlib.sha256("\x1f".join(keys).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a ``.jsonl`` or ``.jsonl.xz`` file of ours."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def image_rows() -> tuple[dict, ...]:
    """One row an image: file, style, label, tags, group, subgroup, split (train, validation, combination, label)."""
    return tuple(read_jsonl(DATA / "images.jsonl"))


@cache
def image_set_digest() -> str:
    """SHA-256 of the archive of images."""
    with open(DATA / "images.zip", "rb") as archive:
        return hashlib.file_digest(archive, "sha256").hexdigest()


class ImageArchive:
    """Random access to the shipped images by file name."""

    def __init__(self) -> None:
        self.archive = zipfile.ZipFile(DATA / "images.zip")

    def open(self, file: str) -> Image.Image:
        return Image.open(io.BytesIO(self.archive.read(file))).convert("RGB")


def caption_for(row: dict, form: int = STYLED) -> str:
    """A caption of an image row in one of ``CAPTION_FORMS``."""
    tags = ", ".join(row["tags"][:3]) or row["subgroup"].replace("-", " ")
    return CAPTION_FORMS[form].format(label=row["label"], style=row["style"], tags=tags)


@dataclass(frozen=True)
class Scene:
    """Two objects at half size on white: ``first`` left of or above ``second``; both in one style."""

    first: dict
    second: dict
    beside: bool

    @property
    def key(self) -> str:
        return f"{self.first['file']}|{self.second['file']}|{'left' if self.beside else 'above'}"

    @property
    def caption(self) -> str:
        relation = "to the left of" if self.beside else "above"
        return f"a {self.first['style']} drawing of {self.first['label']} {relation} {self.second['label']}"

    def image(self, archive: ImageArchive) -> Image.Image:
        first, second = (archive.open(row["file"]) for row in (self.first, self.second))
        side = first.width
        half, quarter = side // 2, side // 4
        canvas = Image.new("RGB", (side, side), "white")
        small = [image.resize((half, half), Image.Resampling.BOX) for image in (first, second)]
        places = [(0, quarter), (half, quarter)] if self.beside else [(quarter, 0), (quarter, half)]
        for image, place in zip(small, places, strict=True):
            canvas.paste(image, place)
        return canvas


@cache
def scenes(split: str) -> tuple[Scene, ...]:
    """Scenes of train images: ``train``, ``validation`` or ``combination`` (pairings of labels never seen in train).

    A pair of labels belongs to one split whatever the order, style and arrangement.
    """
    wanted = TRAIN_SCENES if split == "train" else HELD_OUT_SCENES
    by_style: dict[str, list[dict]] = {}
    for row in image_rows():
        if row["split"] == "train" and row["group"] in SCENE_GROUPS:
            by_style.setdefault(row["style"], []).append(row)
    generator = np.random.default_rng([0, ("train", "validation", "combination").index(split)])
    chosen: dict[str, Scene] = {}
    styles = sorted(by_style)
    while len(chosen) < wanted:
        rows = by_style[styles[generator.integers(len(styles))]]
        first, second = (rows[i] for i in generator.choice(len(rows), 2, replace=False))
        pair = hash_fraction("pair", *sorted((first["label"], second["label"])))
        belongs = "combination" if pair < 0.05 else "validation" if pair < 0.1 else "train"
        if belongs == split:
            scene = Scene(first, second, bool(generator.integers(2)))
            chosen.setdefault(scene.key, scene)
    return tuple(chosen.values())


@cache
def texts(split: str) -> tuple[str, ...]:
    """Wikipedia summaries and WordNet glosses of a split: train, validation, test."""
    wiki = [f"{r['title']}\n{r['text']}" for r in read_jsonl(DATA / "wikipedia.jsonl.xz") if r["split"] == split]
    glosses = [r["text"] for r in read_jsonl(DATA / "glosses.jsonl.xz") if r["split"] == split]
    return tuple(wiki + glosses)


@cache
def conversations(split: str) -> tuple[dict, ...]:
    """Rows with ``messages``; splits: train, validation, wording (unseen wordings), subject (unseen subjects)."""
    path = next(p for p in (DATA / "conversations.jsonl.xz", DATA / "conversations.jsonl") if p.exists())
    return tuple(row for row in read_jsonl(path) if row["split"] == split)
