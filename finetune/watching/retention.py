"""What a model in training keeps of both parents: losses on held-out data, beside the parents' own.

Stages: held-out texts and captioned images as codes -> the parents, found by the merge's record in the model's folder
-> nats per UTF-8 byte of text and nats per image code of each (``jam.evaluate.loss``, in the run's arithmetic) -> lines
of ``retention.jsonl``, the table ``retention.md``.

A line stands for what was measured on the data whose digest it carries; lines of other data are not compared.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.held_out import held_out_captions, spread
from finetune.data.mini_data import texts as shipped_texts
from finetune.data.sources import open_source
from finetune.recipe import Source, WatchSection
from jam import assets
from jam.checkpoint import read_json
from jam.document import CodesPart, Document, TextPart
from jam.errors import CheckpointError, JamError, message_lines
from jam.evaluate.loss import evaluate_captions, evaluate_text
from jam.layouts import open_model
from jam.models.load import Bundle, load_bundle
from jam.recipe_tree import read_tree

RETENTION = "retention.jsonl"
SIDES = {"text": assets.TEXT_PARENT, "image": assets.IMAGE_PARENT}  # what a merge takes where it is told nothing


@dataclass(frozen=True)
class HeldOut:
    """What is measured; ``captions`` is empty where the model has no codes or nothing that makes them."""

    texts: tuple[str, ...]
    captions: tuple[Document, ...]
    context: int

    @classmethod
    def open(cls, watch: WatchSection, bundle: Bundle, seq_len: int) -> "HeldOut":
        """
        Raises:
            DataError: as :func:`finetune.data.sources.open_source`.
        """
        count, captions = watch.retention, []
        texts = _documents("text", watch.texts, bundle, count) if watch.texts else spread(_shipped(), count)
        if bundle.vocabulary.image_span is not None and bundle.image is not None:
            captions = (
                _documents("captions", watch.captions, bundle, count)
                if watch.captions
                else held_out_captions("validation", count, bundle.image)
            )
        plain = (text if isinstance(text, str) else text.parts[0].text for text in texts)
        return cls(tuple(plain), tuple(captions), seq_len)

    @property
    def digest(self) -> str:
        """Twelve hex digits of all that is measured."""
        total = hashlib.sha256(str(self.context).encode())
        for part in (*map(TextPart, self.texts), *(part for document in self.captions for part in document.parts)):
            total.update(repr(part.codes if isinstance(part, CodesPart) else part.text).encode())
        return total.hexdigest()[:12]

    def losses(self, bundle: Bundle) -> dict[str, float | None]:
        """``text``: nats per byte; ``image``: nats per code, None for a model without them. Texts are cut where the
        run's sequences end, or the model's positions."""
        text = evaluate_text(bundle, self.texts, context=min(self.context, bundle.max_positions)) * math.log(2)
        return {"text": text, "image": evaluate_captions(bundle, self.captions) if self.captions else None}


def _shipped() -> tuple[str, ...]:
    return shipped_texts("validation")


def _documents(kind: str, path: str, bundle: Bundle, count: int) -> list[Document]:
    source = open_source(kind, Source(kind=kind, path=path, weight=1.0), bundle)
    return [source.make(index, 0.0) for index in spread(range(source.size), count)]


@dataclass(frozen=True)
class Parent:
    """One parent of a model: ``side`` text or image, where its folder was, what it was."""

    side: str
    folder: Path
    identity: str | None

    def load(self) -> Bundle:
        """
        Raises:
            CheckpointError: the folder is gone, holds another model, or one that jam merge alone reads.
        """
        if not self.folder.is_dir():
            raise CheckpointError(f"{self.folder} is gone")
        if self.identity not in (None, open_model(self.folder).checkpoint.identity()):
            raise CheckpointError(f"{self.folder} holds another model than the merge read")
        return load_bundle(self.folder)


def parents_of(model: Path) -> list[Parent]:
    """The parents that a model's ``merge.yaml`` names (and ``report.json`` identifies); none of a model that is no
    merge. Relative paths are meant from where the merge ran, and looked for from here."""
    if not (model / "merge.yaml").is_file():
        return []
    recipe = read_tree(model / "merge.yaml").values
    known = read_json(model / "report.json").get("parents", {}) if (model / "report.json").is_file() else {}
    return [
        Parent(side, Path(recipe.get(side) or shipped), known.get(side, {}).get("identity"))
        for side, shipped in SIDES.items()
    ]


def reason(error: JamError) -> str:
    """A parent's error for a cell of the table."""
    return message_lines(error)[0].partition("; ")[0].replace("|", "/")


def change(value: float | None, base: float | None) -> str:
    """A relative change.

    >>> change(1.01, 1.0), change(None, 1.0)
    ('+1.0 %', '')
    """
    return "" if value is None or base is None else f"{100 * (value / base - 1):+.1f} %"


def summary(row: dict, rows: Sequence[dict]) -> str:
    """One line of what a row says beside the parents', or beside step 0 where one cannot be measured."""
    parts = []
    for side, unit in (("text", "nats/byte"), ("image", "nats/code")):
        if row[side] is not None:
            names = (f"{side} parent", "step 0")
            base = next(
                (one for name in names for one in rows if one["of"] == name and one.get(side) is not None), None
            )
            over = f" ({change(row[side], base[side])} over {base['of']})" if base is not None else ""
            parts.append(f"{side} {row[side]:.3f} {unit}{over}")
    return ", ".join(parts)


def table(rows: Sequence[dict], held_out: HeldOut) -> str:
    """``retention.md``: the parents, the model at step 0, then now."""
    bases = {side: next((row for row in rows if row["of"] == f"{side} parent"), {}) for side in SIDES}
    lines = [
        "| model | text, nats per byte | over the text parent | images, nats per code | over the image parent |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row.get("missing"):
            lines.append(f"| {row['of']} | not measured: {row['missing']} | | | |")
            continue
        text, image = ("-" if row[side] is None else f"{row[side]:.4f}" for side in SIDES)
        is_model = not row["of"].endswith("parent")
        deltas = [change(row[side], bases[side].get(side)) if is_model else "" for side in SIDES]
        lines.append(f"| {row['of']} | {text} | {deltas[0]} | {image} | {deltas[1]} |")
    size = sum(len(text.encode()) for text in held_out.texts)
    said = f"{len(held_out.texts)} texts ({size:,} bytes), {len(held_out.captions)} captioned images, all held out"
    return "\n".join(["# What the model keeps of its parents", "", f"{said}; data {held_out.digest}.", "", *lines, ""])
