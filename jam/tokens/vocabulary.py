"""One id space of named spans, and the file that records it (``jam.json``).

A vocabulary partitions ``[0, size)`` into spans of three kinds: text, control, image. Which ids may follow, how loss is
split by modality and how long an image is all derive from it. ``controls`` names the control ids in use; a control id
without a name is reserved.

CM3Leon's ``<break>`` both opens and closes an image, so ``begin_image`` and ``end_image`` may be one id; Chameleon
has two. ``unconditional`` stands for "no condition" where a model has a token for that alone (Liquid), ``end_turn``
ends a speaker's turn (Chameleon); ``begin_codes``, ``end_row``, ``end_frame`` and ``size_N`` (N rows or columns) belong
to images that carry their size and row ends among the codes (Emu3, Lumina-mGPT; ``jam.tokens.frame``).
"""

import json
import math
import re
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np

from jam.checkpoint import read_json
from jam.errors import CheckpointError
from jam.header import shown

Kind = Literal["control", "text", "image"]
CONTROL, TEXT, IMAGE = 0, 1, 2  # values of Vocabulary.kinds()
_KIND_VALUE: dict[str, int] = {"control": CONTROL, "text": TEXT, "image": IMAGE}
_KINDS: dict[int, Kind] = {CONTROL: "control", TEXT: "text", IMAGE: "image"}
MAX_IDS = 1 << 24  # far above any real vocabulary: one byte an id is held
CONTROL_NAMES = (
    *("bos", "pad", "eos", "mask", "infill", "begin_image", "end_image", "user", "assistant"),
    *("unconditional", "end_turn", "begin_codes", "end_row", "end_frame"),
)
_SIZE = re.compile(r"size_([1-9][0-9]{0,4})")
FORMAT = 1
KEYS = ("format", "vocabulary", "image_tokenizer", "unconditional", "fusion", "sampling")
SAMPLING_NAMES = (  # the fields of jam.decode.options.SamplingOptions, which loads torch; a test holds the two equal
    *("mode", "max_tokens", "max_images", "min_images", "stop", "seed"),
    *("text_temperature", "text_top_p", "text_top_k", "text_repetition_penalty"),
    *("image_temperature", "image_top_p", "image_top_k", "image_repetition_penalty", "image_beams"),
    "image_size",
    *("guidance", "guidance_scale", "image_guidance_scale", "cd_alpha", "cd_k", "jacobi_window"),
)


@dataclass(frozen=True)
class Span:
    """Ids ``start`` to ``stop - 1``, all of one kind."""

    kind: Kind
    start: int
    stop: int


@dataclass(frozen=True)
class Turns:
    """How a chat model writes its turns, where its template says it in ids of its own (``jam.tokens.chat_template``).

    ``opening`` stands before the first user's words, ``assistant`` between a user's words and the reply, ``user``
    between a reply's ``eos`` and the next user's words.
    """

    opening: tuple[int, ...]
    assistant: tuple[int, ...]
    user: tuple[int, ...]


@dataclass(frozen=True)
class Vocabulary:
    """Spans that partition the ids, named controls, the exact number of codes of an image (0: no images), and a chat
    template's turns; without them the controls ``user`` and ``assistant`` begin a turn."""

    spans: tuple[Span, ...]
    controls: dict[str, int]
    codes_per_image: int = 0
    turns: Turns | None = None

    def __post_init__(self) -> None:
        if not self.spans:
            raise CheckpointError("vocabulary: no spans; spans must partition the ids in order, mend jam.json")
        at = 0
        for span in self.spans:
            if span.kind not in _KIND_VALUE or not type(span.start) is type(span.stop) is int or span.stop > MAX_IDS:
                raise CheckpointError(
                    f"vocabulary: span {[span.kind, span.start, span.stop]}; a kind ({', '.join(_KIND_VALUE)}) and two "
                    f"whole numbers up to {MAX_IDS} are required, mend jam.json"
                )
            if span.start != at or span.stop <= span.start:
                raise CheckpointError(
                    f"vocabulary: span {span.kind} [{span.start}, {span.stop}) does not start at {at}; "
                    "spans must partition the ids in order, mend jam.json"
                )
            at = span.stop
        if sum(span.kind == "image" for span in self.spans) > 1:
            raise CheckpointError("vocabulary: more than one image span; image ids must be contiguous, mend jam.json")
        kinds = self.kinds()
        for name, index in self.controls.items():
            if (
                (name not in CONTROL_NAMES and not _SIZE.fullmatch(name))
                or type(index) is not int
                or not 0 <= index < self.size
                or kinds[index] != CONTROL
            ):
                raise CheckpointError(
                    f"vocabulary: control {name}={index} is unknown or outside a control span; "
                    f"names are {', '.join(CONTROL_NAMES)}, size_N, mend jam.json"
                )
        if self.turns is not None and "eos" not in self.controls:
            raise CheckpointError("vocabulary: turns but no eos, which ends a reply; it is required, mend jam.json")
        for index in () if self.turns is None else (*self.turns.opening, *self.turns.assistant, *self.turns.user):
            if type(index) is not int or not 0 <= index < self.size or kinds[index] == IMAGE:
                raise CheckpointError(
                    f"vocabulary: turns name id {index!r}; text and control ids are required, mend jam.json"
                )

    @property
    def converses(self) -> bool:
        """Whether it can write who speaks."""
        return self.turns is not None or {"user", "assistant"} <= set(self.controls)

    @property
    def size(self) -> int:
        return self.spans[-1].stop

    @property
    def image_span(self) -> Span | None:
        return next((span for span in self.spans if span.kind == "image"), None)

    @property
    def codebook_size(self) -> int:
        span = self.image_span
        return span.stop - span.start if span else 0

    @property
    def framed(self) -> bool:
        """Whether an image has rows with ends, and may have any size (``jam.tokens.frame``)."""
        return "end_row" in self.controls

    @property
    def sizes(self) -> dict[int, int]:
        """The ids that say how many rows or columns an image has, by that number."""
        found = ((_SIZE.fullmatch(name), index) for name, index in self.controls.items())
        return {int(named[1]): index for named, index in found if named}

    @property
    def within_image(self) -> tuple[int, ...]:
        """Controls after which an image goes on, the opening one left out."""
        names = ("begin_codes", "end_row", "end_frame")
        return (*(self.controls[name] for name in names if name in self.controls), *self.sizes.values())

    def kinds(self) -> np.ndarray:
        """uint8 [size]: CONTROL, TEXT or IMAGE for every id."""
        return np.concatenate([np.full(s.stop - s.start, _KIND_VALUE[s.kind], np.uint8) for s in self.spans])

    def image_ids(self, codes: np.ndarray) -> np.ndarray:
        """Codes to ids, any shape.

        Raises:
            CheckpointError: there is no image span, or a code lies outside the codebook.
        """
        codes, span = np.asarray(codes), self.image_span
        if span is None:
            raise CheckpointError("this vocabulary has no image span; use a model with image ids for images")
        if codes.size and codes.dtype.kind not in "iu":  # larger than 64 bits are objects
            raise CheckpointError(f"image codes are of type {codes.dtype}; whole numbers of the codebook are required")
        if codes.size and not (codes.min() >= 0 and codes.max() < self.codebook_size):
            raise CheckpointError(
                f"image codes span [{codes.min()}, {codes.max()}], the codebook has {self.codebook_size}; "
                "the image tokenizer and the model must belong together"
            )
        return codes.astype(np.int64) + span.start

    @classmethod
    def of_kinds(
        cls, kinds: np.ndarray, controls: dict[str, int], codes_per_image: int = 0, turns: Turns | None = None
    ) -> "Vocabulary":
        """Spans from a kind for every id; a named control is a control whatever its kind was."""
        kinds = kinds.copy()
        kinds[list(controls.values())] = CONTROL
        runs = [(int(kind), len(list(run))) for kind, run in groupby(kinds.tolist())]
        stops = np.cumsum([length for _, length in runs]).tolist()
        spans = (Span(_KINDS[kind], stop - length, stop) for (kind, length), stop in zip(runs, stops, strict=True))
        return cls(tuple(spans), controls, codes_per_image, turns)

    def to_json(self) -> dict:
        raw: dict = {
            "spans": [[span.kind, span.start, span.stop] for span in self.spans],
            "controls": dict(self.controls),
            "codes_per_image": self.codes_per_image,
        }
        if self.turns is not None:
            raw["turns"] = {name: list(ids) for name, ids in asdict(self.turns).items()}
        return raw

    @classmethod
    def from_json(cls, raw: dict) -> "Vocabulary":
        spans = tuple(Span(kind, start, stop) for kind, start, stop in raw["spans"])
        written = raw.get("turns")
        if not (written is None or isinstance(written, dict)):
            raise CheckpointError(
                f"vocabulary: turns is a {type(written).__name__}; a mapping or null is required, mend jam.json"
            )
        turns = None if written is None else Turns(**{name: tuple(ids) for name, ids in written.items()})
        found, codes = cls(spans, dict(raw["controls"]), raw["codes_per_image"], turns), raw["codes_per_image"]
        images = found.image_span is not None
        if type(codes) is not int or codes < 0 or (codes > 0) != images:
            raise CheckpointError(
                f"vocabulary: codes_per_image is {codes!r} with {'an' if images else 'no'} image span; the number of "
                "codes of an image is required where there are image ids, else 0, mend jam.json"
            )
        if images and (missing := {"begin_image", "end_image"} - found.controls.keys()):
            raise CheckpointError(
                f"vocabulary: an image span without {' and '.join(sorted(missing))}; the controls around an image are "
                "required, mend jam.json"
            )
        begin, end = (found.controls.get(name) for name in ("begin_image", "end_image"))
        if images and found.framed and (begin == end or math.isqrt(codes) ** 2 != codes):
            raise CheckpointError(
                f"vocabulary: end_row, codes_per_image {codes}, begin_image {begin}, end_image {end}; images with row "
                "ends need a square number and an end_image of its own, mend jam.json"
            )
        return found


@dataclass(frozen=True)
class JamFile:
    """``jam.json``: what a checkpoint folder says beyond transformers' own files.

    ``unconditional`` names the controls that stand for "no condition" before an image (classifier-free guidance);
    ``image_tokenizer`` is a subfolder, or None for a text model; ``fusion`` is the merge's record or None; ``sampling``
    holds the model's own defaults of ``jam.decode.options.SamplingOptions``.
    """

    vocabulary: Vocabulary
    image_tokenizer: str | None = None
    unconditional: tuple[str, ...] = ("bos", "mask", "begin_image")
    fusion: dict | None = None
    sampling: dict = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> "JamFile":
        """Raises CheckpointError when the file is missing or does not parse, or says what this version does not know.
        A file without ``format``, written by hand, is read as the present one."""
        path = Path(folder) / "jam.json"
        if not path.is_file():
            raise CheckpointError(f"{folder}: no jam.json; jam needs it to know which ids are text, control and image")
        raw = read_json(path)
        written = raw.get("format", FORMAT)
        if type(written) is not int or written != FORMAT:
            raise CheckpointError(f"{path}: format {written!r:.60}; {FORMAT} is read, use the jam that wrote it")
        if unknown := [key for key in raw if key not in KEYS]:
            raise CheckpointError(
                f"{path}: unknown key {shown(unknown[0])}; keys are {', '.join(KEYS)}, remove it or mend its name"
            )
        try:
            record = cls(
                Vocabulary.from_json(raw["vocabulary"]),
                raw["image_tokenizer"],
                tuple(raw["unconditional"]),
                raw["fusion"],
                raw.get("sampling", {}),
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{path}: {error!r}; the file is damaged, restore it from its source") from None
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
        record._check(path)
        return record

    def _check(self, path: Path) -> None:
        """Raises CheckpointError for a value of another type than the file has, or a subfolder that is none."""
        subfolder, unknown = self.image_tokenizer, [name for name in self.unconditional if name not in CONTROL_NAMES]
        if not (subfolder is None or (isinstance(subfolder, str) and subfolder == Path(subfolder).name != "..")):
            raise CheckpointError(
                f"{path}: image_tokenizer is {subfolder!r}; the name of a subfolder or null is required, mend the file"
            )
        if unknown:
            raise CheckpointError(
                f"{path}: unconditional names {unknown[0]!r}; names are {', '.join(CONTROL_NAMES)}, mend the file"
            )
        if not (self.fusion is None or isinstance(self.fusion, dict)):
            raise CheckpointError(f"{path}: fusion is {self.fusion!r}; a mapping or null is required, mend the file")
        if not isinstance(self.sampling, dict):
            raise CheckpointError(f"{path}: sampling is {self.sampling!r}; a mapping is required, mend the file")
        if unknown := [name for name in self.sampling if name not in SAMPLING_NAMES]:
            raise CheckpointError(
                f"{path}: sampling names {shown(unknown[0])}; names are {', '.join(SAMPLING_NAMES)}, mend the file"
            )

    def write(self, folder: Path) -> None:
        raw = {
            "format": FORMAT,
            "vocabulary": self.vocabulary.to_json(),
            "image_tokenizer": self.image_tokenizer,
            "unconditional": list(self.unconditional),
            "fusion": self.fusion,
        }
        if self.sampling:
            raw["sampling"] = self.sampling
        (Path(folder) / "jam.json").write_text(json.dumps(raw, indent=2) + "\n")
