"""Two vocabularies become one, with a source for every row of every table.

A parent *owns* an id when it knew it in training: its text and image ids and the controls that its vocabulary names.
Reserved control rows exist in its table but mean nothing.

Where both parents have one tokenizer, the joint vocabulary is the image parent's. Where they differ, the text parent's
is kept whole, so that text is cut exactly as the LLM cuts it; after its last id follow the controls that only the
image parent has, then its image ids. The image parent's rows for the LLM's tokens come from ``merge.transplant``:
copied where one of its tokens is the same string, averaged where several make it up, and none where it has no word
for it, or no words at all. Controls are matched by name.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from jam.checkpoint import read_json
from jam.errors import CheckpointError
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import CONTROL, IMAGE, TEXT, JamFile, Span, Vocabulary
from merge.image_network import FOLDER
from merge.plan import Parent
from merge.transplant import Spelling, pieces

AVERAGED, NONE = -3, -1  # in Rows.source, beside the parent's row numbers


@dataclass(frozen=True)
class Rows:
    """Where one parent's rows for the joint ids come from.

    Attributes:
        source: int64 [V], the parent's row; ``AVERAGED`` for the mean of several; ``NONE``.
        known: bool [V], the parent owns the id, or has made it up from rows that it owns.
        offsets, pieces: the n-th averaged id is the mean of rows ``pieces[offsets[n] : offsets[n + 1]]``.
    """

    source: np.ndarray
    known: np.ndarray
    offsets: np.ndarray
    pieces: np.ndarray

    @classmethod
    def same(cls, vocabulary: Vocabulary, size: int) -> "Rows":
        """Every id of the parent at its own number."""
        ids = np.arange(size, dtype=np.int64)
        source = np.where(ids < vocabulary.size, ids, NONE)
        return cls(source, owned(vocabulary, size), np.zeros(1, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Union:
    """The joint vocabulary and both parents' rows for it; ``same`` says that the parents have one tokenizer."""

    vocabulary: Vocabulary
    text: Rows
    image: Rows
    same: bool

    def rows(self, side: str) -> Rows:
        return self.text if side == "text" else self.image

    def figures(self) -> dict[str, int]:
        """How the image parent's rows for the joint text ids came to be."""
        is_text = self.vocabulary.kinds() == TEXT
        source = self.image.source[is_text]
        return {
            "text_ids": int(is_text.sum()),
            "copied": int((source >= 0).sum()),
            "averaged": int((source == AVERAGED).sum()),
            "without_source": int((source == NONE).sum()),
        }


@dataclass(frozen=True)
class Pair:
    """Both parents of a merge."""

    text: Parent
    image: Parent

    @property
    def sides(self) -> tuple[Parent, Parent]:
        return self.text, self.image

    @cached_property
    def one_tokenizer(self) -> bool:
        return one_tokenizer(*self.sides)

    @cached_property
    def union(self) -> Union:
        """Raises CheckpointError for a tokenizer whose tokens no string follows from. ``obstacle`` must be None."""
        text, image = self.sides
        if self.one_tokenizer:
            joint, size = image.vocabulary, image.vocabulary.size
            if (turns := text.vocabulary.turns) is not None:
                eos = {"eos": text.vocabulary.controls["eos"]}
                joint = replace(joint, controls=joint.controls | eos, turns=turns)
            return Union(joint, Rows.same(text.vocabulary, size), Rows.same(image.vocabulary, size), same=True)
        return join(text, image)

    def obstacle(self) -> str | None:
        """Why the two vocabularies cannot become one, or None when they can."""
        ours, theirs = self.text.vocabulary, self.image.vocabulary
        if theirs.image_span is None:
            swap = "use an image-text model, or name its image ids in jam.json"
            if ours.image_span is not None:
                swap = "swap --text and --image"
            return f"the image parent {self.image.path} has no image ids; {swap}"
        if ours.image_span is not None and not self.one_tokenizer:
            return "both parents have image ids, under different numbers; use a text LLM as the text parent"
        return None


def joint_jam_file(pair: Pair, method: str) -> JamFile:
    """jam.json of the result."""
    image = pair.image
    tokenizer = None if image.network is None else FOLDER
    fusion = {"method": method, "text": pair.text.family.model_type, "image": image.family.model_type}
    sampling = image.jam.sampling
    if method in ("cross", "extend"):  # the text parent's own network writes the text, in its own manner
        sampling = {name: value for name, value in sampling.items() if not name.startswith("text_")}
        sampling |= {name: value for name, value in pair.text.jam.sampling.items() if name.startswith("text_")}
    return JamFile(pair.union.vocabulary, tokenizer, image.jam.unconditional, fusion, sampling)


def owned(vocabulary: Vocabulary, size: int) -> np.ndarray:
    """bool [size]: the ids that a model of ``vocabulary`` knew in training."""
    result = np.zeros(size, bool)
    result[: vocabulary.size] = vocabulary.kinds() != CONTROL
    result[list(vocabulary.controls.values())] = True
    if vocabulary.turns is not None:
        result[[*vocabulary.turns.opening, *vocabulary.turns.assistant, *vocabulary.turns.user]] = True
    return result


def one_tokenizer(text: Parent, image: Parent) -> bool:
    """Whether text and controls have the same numbers and strings in both, and text is cut alike."""
    ours, theirs = text.vocabulary, image.vocabulary
    if not image.has_text or ours.size > theirs.size or (ours.kinds() != theirs.kinds()[: ours.size]).any():
        return False
    same = {name: index for name, index in ours.controls.items() if name != "eos" or ours.turns is None}
    if any(theirs.controls.get(name) != index for name, index in same.items()):
        return False  # a chat model of the same tokenizer may end its replies otherwise
    mine, its = (
        {index: word for word, index in TextTokenizer.load(side.path).tokenizer.get_vocab(True).items()}
        for side in (text, image)
    )
    ids = np.flatnonzero(owned(ours, ours.size) & (ours.kinds() != IMAGE)).tolist()
    return all(mine.get(index) == its.get(index) for index in ids) and _segmentation(text.path) == _segmentation(
        image.path
    )


def _segmentation(folder: Path) -> list:
    """What decides how text is cut, beside the strings themselves."""
    raw = read_json(folder / "tokenizer.json")
    try:
        merges = [m if isinstance(m, str) else " ".join(m) for m in raw["model"].get("merges", [])]
        return [raw["model"].get("type"), merges, raw.get("normalizer"), raw.get("pre_tokenizer")]
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}/tokenizer.json: {error!r}; the file is damaged, restore it") from None


def joint_vocabulary(ours: Vocabulary, theirs: Vocabulary) -> Vocabulary:
    """The text parent's ids, then the controls that only the image parent names, then its image ids.

    ``<break>``, one id under two names, stays one id.
    """
    foreign = sorted({index for name, index in theirs.controls.items() if name not in ours.controls})
    number = {index: ours.size + n for n, index in enumerate(foreign)}
    controls = ours.controls | {
        name: number[index] for name, index in theirs.controls.items() if name not in ours.controls
    }
    start = ours.size + len(foreign)
    added = [Span("control", ours.size, start)] if foreign else []
    image = Span("image", start, start + theirs.codebook_size)
    return Vocabulary((*ours.spans, *added, image), controls, theirs.codes_per_image, ours.turns)


def join(text: Parent, image: Parent) -> Union:
    """The union of two parents with different tokenizers."""
    ours, theirs = text.vocabulary, image.vocabulary
    joint = joint_vocabulary(ours, theirs)
    kinds = joint.kinds()
    source = np.full(joint.size, NONE, np.int64)
    ids = np.flatnonzero(kinds == TEXT)
    offsets, found = np.zeros(len(ids) + 1, np.int64), np.zeros(0, np.int64)
    if image.has_text:
        offsets, found = pieces(Spelling.of(text.path), Spelling.of(image.path), ids.tolist())
    lengths = np.diff(offsets)
    usable = (theirs.kinds() == TEXT)[found]  # a piece that is no text token stands for something else
    whole = np.ones(len(ids), bool)
    whole[np.repeat(np.arange(len(ids)), lengths)[~usable]] = False
    single, several = whole & (lengths == 1), whole & (lengths > 1)
    source[ids[single]] = found[offsets[:-1][single]]
    source[ids[several]] = AVERAGED
    averaged = np.repeat(several, lengths)
    for name, index in theirs.controls.items():
        source[joint.controls[name]] = index
    source[kinds == IMAGE] = theirs.image_ids(np.arange(theirs.codebook_size))
    starts = np.concatenate([[0], np.cumsum(lengths[several])]).astype(np.int64)
    return Union(joint, Rows.same(ours, joint.size), Rows(source, source != NONE, starts, found[averaged]), same=False)
