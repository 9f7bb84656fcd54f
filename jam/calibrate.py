"""``jam calibrate``: what one norm over two parents side by side does to each, measured for the width merge.

Stages: the joint vocabulary of both parents -> the same documents in joint ids for both: plain texts, and captions with
their images -> each parent reads them through its half of the joint table (its own rows, transplanted ones, zero for
ids that only the other knows, as ``merge.width`` writes them) -> moments of what enters its norms -> a factor for each
half of each norm (``jam.evaluate.statistics``) -> a JSON file.

What is measured are the parents alone. In the merged network a half that is corrected on average drifts from its parent
a little more with every layer, and off-diagonal blocks other than zero move it from the start; neither is followed.
"""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from finetune.data.held_out import held_out_captions, held_out_texts, spread
from finetune.data.sources import open_source
from finetune.recipe import Source as SourceRecipe
from jam import __version__, assets
from jam.checkpoint import write_json
from jam.document import Document, TextPart
from jam.errors import DataError, MergeError
from jam.evaluate.statistics import Fit, Moments, fit, norm_inputs, side_by_side
from jam.models.load import Bundle, load_bundle
from jam.tokens.render import render
from jam.tokens.text import TextTokenizer
from merge.calibration import FORMAT, describe_parent, norm_names
from merge.plan import Parent, read_parent
from merge.recipe import MergeRecipe, WidthSection
from merge.rows import Table, half_map
from merge.union import Pair
from merge.width import obstacles

MOST = 4_000  # documents of a file that are looked at
CAPTION = 12  # tokens of a caption, about


@dataclass(frozen=True)
class Data:
    """Joint ids of every document that is read, and one phrase that says what they are."""

    ids: tuple[np.ndarray, ...]
    description: str

    def record(self) -> dict[str, object]:
        digest = hashlib.sha256()
        for ids in self.ids:
            digest.update(ids.astype("<i8").tobytes() + b"|")
        total = sum(len(ids) for ids in self.ids)
        return {"description": self.description, "tokens": total, "sha256": digest.hexdigest()}


def run_calibrate(
    text: Path | None, image: Path | None, *, out: Path, texts: Path | None, captions: Path | None, tokens: int
) -> dict:
    """Measure and write ``out``; the parents may be such as a width merge takes.

    Args:
        texts, captions: data files as ``jam finetune`` reads them; None is the shipped validation data.
        tokens: about so many are read, half of each kind.

    Returns:
        What was written.

    Raises:
        MergeError: parents that no width merge can fuse, or ``out`` taken or in no folder.
        CheckpointError, DataError: a damaged parent or data file; an image parent without image tokenizer.
    """
    if out.exists() or out.is_symlink():
        raise MergeError(f"{out}: exists already; a new file is required, remove it or choose another name")
    if not out.absolute().parent.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise MergeError(f"{out}: no folder there that can be written; one is required, make it or choose another")
    pair = Pair(read_parent(text or assets.TEXT_PARENT, "text"), read_parent(image or assets.IMAGE_PARENT, "image"))
    lenient = WidthSection(off_diagonal="zero", qk_norm="average")
    if reasons := obstacles(pair, MergeRecipe(method="width", out=out, width=lenient)):
        raise MergeError(f"calibration of a width merge: {reasons[0]}; use parents that a width merge can fuse")
    bundle = load_bundle(pair.image.path)
    data = read_data(pair, bundle, texts, captions, tokens)
    found = measure(pair, bundle, data.ids)
    written = {
        "format": FORMAT,
        "jam": __version__,
        "parents": {side.side: describe_parent(side) for side in pair.sides},
        "data": data.record(),
        "norms": {name: {side: _record(*one) for side, one in halves.items()} for name, halves in found.items()},
    }
    write_json(out, written)
    for side in ("text", "image"):
        fits = [halves[side][1] for halves in found.values()]
        before, after = (float(np.mean([getattr(one, name) for one in fits])) for name in ("before", "after"))
        print(
            f"{side} half: {len(fits)} norms, mean relative error {before:.3f}, with factors {after:.3f}",
            file=sys.stderr,
        )
    print(f"{out}: measured on {data.description}", file=sys.stderr)
    return written


def _record(moments: Moments, found: Fit) -> dict[str, float]:
    """One half of one norm, rounded to what can be told apart."""
    values = {
        "factor": found.factor,
        "offset": found.offset,
        "mean": float(moments.mean.mean()),
        "mean_square": float(moments.square.mean()),
        "error_before": found.before,
        "error_after": found.after,
    }
    return {name: float(f"{value:.7g}") for name, value in values.items()}


def read_data(pair: Pair, bundle: Bundle, texts: Path | None, captions: Path | None, tokens: int) -> Data:
    """Documents of both kinds in the ids of the result; ``bundle`` is the image parent, which makes the codes.

    Raises:
        DataError: a bad line, no documents, no image tokenizer.
    """
    if bundle.image is None:
        raise DataError(f"{bundle.path}: no image tokenizer, so no codes to read; use a parent that has one")
    codes = bundle.vocabulary.codes_per_image
    if texts is None:
        plain = [Document((TextPart(text),)) for text in held_out_texts("validation", 4 * tokens)]
    else:
        plain = _documents("text", texts, bundle)
    if captions is None:
        shown = held_out_captions("validation", max(1, tokens // 2 // (codes + CAPTION)), bundle.image)
    else:
        shown = _documents("captions", captions, bundle)
    owner = pair.image if pair.union.same else pair.text
    tokenizer, context = TextTokenizer.load(owner.path), min(side.sizes.positions for side in pair.sides)
    chosen, words = [], []
    for documents, source, kind in ((plain, texts, "texts"), (shown, captions, "captioned images")):
        rendered = [render(one, pair.union.vocabulary, tokenizer).ids[:context] for one in documents]
        mean = sum(map(len, rendered)) / len(rendered)
        kept = spread(rendered, max(1, round(tokens / 2 / mean)))
        words.append(f"{sum(map(len, kept)):,} tokens of {len(kept)} {kind} ({source or 'shipped, validation'})")
        chosen += kept
    return Data(tuple(chosen), " and ".join(words))


def _documents(kind: str, path: Path, bundle: Bundle) -> list[Document]:
    source = open_source(kind, SourceRecipe(kind=kind, path=str(path), weight=1.0), bundle)
    return [source.make(index, 0.0) for index in spread(range(source.size), MOST)]


def measure(
    pair: Pair, image: Bundle, documents: Sequence[np.ndarray]
) -> Mapping[str, Mapping[str, tuple[Moments, Fit]]]:
    """For every norm of the result and each side what enters it, and what corrects its half."""
    inputs = {
        side.side: norm_inputs(
            as_half(side, pair, load_bundle(side.path) if side is pair.text else image).model,
            list(norm_names(side)),
            documents,
        )
        for side in pair.sides
    }
    found = {}
    for name in norm_names(pair.image):
        both = side_by_side(inputs["text"][name], inputs["image"][name])
        found[name] = {side: (moments[name], fit(moments[name], both)) for side, moments in inputs.items()}
    return found


def as_half(side: Parent, pair: Pair, bundle: Bundle) -> Bundle:
    """The parent's network with its half of the joint table, in place."""
    size = pair.union.vocabulary.size
    table = Table(side, side.family.embed, half_map(pair.union, side), pair.union.rows(side.side))
    rows = torch.from_numpy(table.read(slice(0, size)))
    bundle.model.get_input_embeddings().weight = torch.nn.Parameter(rows, requires_grad=False)
    return bundle
