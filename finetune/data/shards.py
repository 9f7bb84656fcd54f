"""Prepared sources: documents rendered once into shards that a memory map reads.

    source.json      format, dtype, what the ids mean (hashes), counts, the reader's settings, size and SHA-256 of files
    shard-00000.bin  ids, one document after another, little-endian, nothing else
    shard-00000.idx  safetensors: where documents begin, and head, loss weight and segment of their tokens as runs

The index holds runs (stretches of one head, weight and segment), not tokens: a document of a caption and an image has
about six. ``offsets`` int64 [D+1] counts tokens, ``run_offsets`` int64 [D+1] counts runs; ``lengths`` uint32, ``heads``
uint8, ``weights`` float32 and ``segments`` int32 are [R]. What is read is bit for bit what ``render`` gave.
"""

import hashlib
import json
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from jam.checkpoint import read_json
from jam.digest import sha256_of
from jam.errors import CheckpointError, DataError
from jam.header import read_header
from jam.journal import Shard
from jam.tokens.image import ImageTokenizer
from jam.tokens.render import IMAGE_HEAD, Tokens
from jam.tokens.vocabulary import CONTROL, IMAGE, TEXT, Vocabulary

FORMAT = 1
RECORD = "source.json"
DTYPES = ("uint16", "uint32", "int32")
_NAME = re.compile(r"shard-[0-9]{5,}\.(bin|idx)")
_ARRAYS = {  # of an index: type in the file, numpy's
    "offsets": ("I64", "<i8"),
    "run_offsets": ("I64", "<i8"),
    "lengths": ("U32", "<u4"),
    "heads": ("U8", "|u1"),
    "weights": ("F32", "<f4"),
    "segments": ("I32", "<i4"),
}


def hash_network(tokenizer: ImageTokenizer) -> Any:
    """A SHA-256 that has read the names and weights of an image tokenizer."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    return digest


@dataclass(frozen=True)
class Identity:
    """What ids mean, as SHA-256: the vocabulary, the text tokenizer, the image tokenizer (None where there is none)."""

    vocabulary: str
    text: str
    image: str | None

    @classmethod
    def of(cls, folder: Path, vocabulary: Vocabulary, image: ImageTokenizer | None) -> "Identity":
        """Of a model folder. Padding and truncation of tokenizer.json are left out: jam does neither."""
        words = read_json(folder / "tokenizer.json")
        words = {key: value for key, value in words.items() if key not in ("padding", "truncation")}
        own = None if image is None else hash_network(image).hexdigest()
        return cls(_hash(vocabulary.to_json()), _hash(words), own)


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def dtype_for(vocabulary: Vocabulary) -> str:
    """The narrowest type of a ``.bin`` that holds every id."""
    return "uint16" if vocabulary.size <= 1 << 16 else "uint32"


@dataclass
class Counts:
    """Of a shard or a source; ``learnt`` are tokens with a loss, ``rows`` and ``skipped`` what was read and refused."""

    rows: int = 0
    skipped: int = 0
    documents: int = 0
    conversations: int = 0
    images: int = 0
    text: int = 0
    image: int = 0
    control: int = 0
    learnt: int = 0

    @property
    def tokens(self) -> int:
        return self.text + self.image + self.control

    def add(self, other: "Counts") -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


def runs_of(tokens: Tokens) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Lengths, heads, weights and segments of the stretches over which the last three stay the same."""
    changed = np.ones(len(tokens) + 1, bool)
    inside = changed[1:-1]
    inside[:] = tokens.heads[1:] != tokens.heads[:-1]
    for values in (tokens.weights.view(np.int32), tokens.segments):
        inside |= values[1:] != values[:-1]
    edges = np.flatnonzero(changed)
    starts = edges[:-1]
    lengths = (edges[1:] - starts).astype(np.uint32)
    return lengths, tokens.heads[starts], tokens.weights[starts], tokens.segments[starts]


def replace_file(path: Path, data: bytes) -> None:
    """A file that is whole and on disk, or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


@dataclass
class ShardWriter:
    """One shard on its way: ids go to a temporary file, runs wait in memory (about 13 bytes each)."""

    folder: Path
    number: int
    dtype: str
    kinds: np.ndarray
    counts: Counts = field(default_factory=Counts)

    def __post_init__(self) -> None:
        self.name = f"shard-{self.number:05d}"
        self._path = self.folder / f"{self.name}.bin"
        self._file = self._path.with_name(f"{self._path.name}.tmp").open("wb")
        self._digest = hashlib.sha256()
        self._offsets, self._run_offsets = array("q", [0]), array("q", [0])
        self._runs = {"lengths": array("I"), "heads": array("B"), "weights": array("f"), "segments": array("i")}

    @property
    def bytes(self) -> int:
        """Of its ids so far."""
        return self._offsets[-1] * np.dtype(self.dtype).itemsize

    def add(self, tokens: Tokens, conversation: bool) -> None:
        data = tokens.ids.astype(np.dtype(self.dtype).newbyteorder("<")).tobytes()
        self._file.write(data)
        self._digest.update(data)
        runs = dict(zip(self._runs, runs_of(tokens), strict=True))
        for name, values in runs.items():
            self._runs[name].frombytes(values.tobytes())
        self._offsets.append(self._offsets[-1] + len(tokens))
        self._run_offsets.append(self._run_offsets[-1] + len(runs["lengths"]))
        by_kind = np.bincount(self.kinds[tokens.ids], minlength=3).tolist()
        counts = self.counts
        counts.documents += 1
        counts.conversations += conversation
        counts.images += int(((runs["heads"] == IMAGE_HEAD) & (runs["segments"] >= 0)).sum())
        counts.text, counts.image = counts.text + by_kind[TEXT], counts.image + by_kind[IMAGE]
        counts.control += by_kind[CONTROL]
        counts.learnt += int((tokens.weights[1:] > 0).sum())

    def finish(self) -> list[Shard]:
        """Both files, whole and on disk; the index last, which says that the shard is there."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        Path(self._file.name).replace(self._path)
        lists = {"offsets": self._offsets, "run_offsets": self._run_offsets, **self._runs}
        arrays = {name: np.frombuffer(values, _ARRAYS[name][1]) for name, values in lists.items()}
        data = save(arrays, {"counts": json.dumps(asdict(self.counts))})  # one key: more have no fixed order
        index = self.folder / f"{self.name}.idx"
        replace_file(index, data)
        return [Shard.of(self._path, self._digest.hexdigest()), Shard.of(index, hashlib.sha256(data).hexdigest())]

    def drop(self) -> None:
        try:
            self._file.close()
        finally:  # what a full disk did not take is written again on closing
            Path(self._file.name).unlink(missing_ok=True)


def read_counts(index: Path) -> Counts:
    """What the writer noted in an index."""
    with index.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return Counts(**json.loads(header["__metadata__"]["counts"]))


@dataclass(frozen=True)
class _Shard:
    """One shard, mapped."""

    path: Path
    dtype: str
    offsets: np.ndarray
    run_offsets: np.ndarray
    lengths: np.ndarray
    heads: np.ndarray
    weights: np.ndarray
    segments: np.ndarray

    @classmethod
    def open(cls, folder: Path, name: str, dtype: str) -> "_Shard":
        index = folder / f"{name}.idx"
        try:
            infos = {info.name: info for info in read_header(index)}
        except CheckpointError as error:
            raise DataError(f"{error}; prepare the source again") from None
        if {name: info.dtype for name, info in infos.items()} != {name: kind for name, (kind, _) in _ARRAYS.items()}:
            raise DataError(f"{index}: not the index of a shard; restore it or prepare the source again")
        arrays = {name: np.memmap(index, _ARRAYS[name][1], "r", info.begin, info.shape) for name, info in infos.items()}
        shard = cls(folder / f"{name}.bin", dtype, **arrays)
        size, width = (folder / f"{name}.bin").stat().st_size, np.dtype(dtype).itemsize
        if not len(shard.offsets) == len(shard.run_offsets) > 1 or int(shard.offsets[-1]) * width != size:
            raise DataError(f"{index}: does not fit {name}.bin; restore both or prepare the source again")
        return shard

    @cached_property
    def ids(self) -> np.ndarray:
        return np.memmap(self.path, np.dtype(self.dtype).newbyteorder("<"), "r")

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    def tokens(self, index: int) -> Tokens:
        first, last = (int(n) for n in self.offsets[index : index + 2])
        runs = slice(*(int(n) for n in self.run_offsets[index : index + 2]))
        lengths = self.lengths[runs]
        if int(lengths.sum()) != last - first:
            raise DataError(f"{self.path}: altered, document {index} of it has no whole runs; run jam data check")
        heads, weights, segments = (
            np.repeat(values[runs], lengths) for values in (self.heads, self.weights, self.segments)
        )
        return Tokens(self.ids[first:last].astype(np.int32), heads, weights, segments)


@dataclass(frozen=True)
class Shards:
    """A prepared source: documents by number, in the order of what they were prepared from."""

    folder: Path
    counts: Counts
    identity: Identity
    reader: dict
    shards: tuple[_Shard, ...]

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([shard.documents for shard in self.shards])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def tokens(self, index: int) -> Tokens:
        """Document ``index`` as it was rendered. Raises DataError where its index was altered."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return self.shards[number].tokens(index - (int(self._ends[number - 1]) if number else 0))

    def where(self, index: int) -> str:
        """File and place of a document, for errors."""
        number = int(np.searchsorted(self._ends, index, side="right"))
        return f"{self.shards[number].path}: document {index}"

    def lengths(self) -> np.ndarray:
        """int64 [D]: tokens of every document. Raises DataError where an index was altered."""
        return np.concatenate([_steps(shard, shard.offsets) for shard in self.shards])

    def with_images(self) -> np.ndarray:
        """bool [D]: which documents have an image. Raises DataError where an index was altered."""
        for shard in self.shards:
            _steps(shard, shard.run_offsets)
        return np.concatenate(
            [np.logical_or.reduceat(shard.heads == IMAGE_HEAD, shard.run_offsets[:-1]) for shard in self.shards]
        )

    def check_model(self, folder: Path, vocabulary: Vocabulary, image: ImageTokenizer | None) -> None:
        """Raises DataError where a model's ids mean something else. An image tokenizer counts where there are images
        and both have one: codes alone need none."""
        own = Identity.of(folder, vocabulary, image if self.counts.images and self.identity.image else None)
        differing = [name for name in ("vocabulary", "text") if getattr(own, name) != getattr(self.identity, name)]
        if own.image is not None and own.image != self.identity.image:
            differing.append("image")
        if differing:
            what = {"vocabulary": "vocabulary", "text": "text tokenizer", "image": "image tokenizer"}[differing[0]]
            raise DataError(
                f"{self.folder}: prepared for another {what} than that of {folder}; prepare the source for this model "
                "(jam data prepare --model)"
            )


def _steps(shard: _Shard, offsets: np.ndarray) -> np.ndarray:
    """int64 [D]: how many tokens or runs every document has; one has none or fewer only where the index was altered."""
    ends = shard.offsets[-1] if offsets is shard.offsets else len(shard.heads)
    found = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != ends or (found <= 0).any():
        raise DataError(
            f"{shard.path.with_suffix('.idx')}: altered, its documents are not in order; run jam data check"
        )
    return found


def _record(folder: Path) -> tuple[dict, list[str]]:
    """source.json and the names of the shards. Raises DataError for one that is missing or damaged."""
    path = folder / RECORD
    if not path.is_file():
        raise DataError(f"{folder}: no prepared source (no {RECORD}); make one with jam data prepare")
    try:
        raw = read_json(path)
        if raw["format"] != FORMAT:
            raise DataError(f"{path}: format {raw['format']!r:.60}; {FORMAT} is read, prepare the source again")
        names = [entry["name"] for entry in raw["files"]]
        expected = [f"shard-{n:05d}.{end}" for n in range(len(names) // 2) for end in ("bin", "idx")]
        sound = all(type(entry["bytes"]) is int and isinstance(entry["sha256"], str) for entry in raw["files"])
        if not names or names != expected or not all(map(_NAME.fullmatch, names)) or not sound:
            raise ValueError("its list of files is not one of shards")
        if raw["dtype"] not in DTYPES:
            raise ValueError(f"dtype {raw['dtype']!r:.40}")
        counts, _, _ = Counts(**raw["counts"]), Identity(**raw["hashes"]), dict(raw["reader"])
        if not all(type(number) is int and number >= 0 for number in asdict(counts).values()):
            raise ValueError("a count is no whole number")
    except (CheckpointError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: damaged ({error}); restore it or prepare the source again") from None
    return raw, [name.removesuffix(".bin") for name in expected[::2]]


def open_shards(folder: Path) -> Shards:
    """Opens a prepared source; files are checked by size alone (:func:`altered` hashes them).

    Raises:
        DataError: no such folder, a file that is missing, of another size, or not what source.json says.
    """
    raw, names = _record(folder)
    for entry in raw["files"]:
        path = folder / entry["name"]
        if not path.is_file():
            raise DataError(f"{path}: missing; restore it or prepare the source again")
        if path.stat().st_size != entry["bytes"]:
            raise DataError(
                f"{path}: {path.stat().st_size} bytes, {entry['bytes']} were written; restore it or prepare the source "
                "again"
            )
    shards = tuple(_Shard.open(folder, name, raw["dtype"]) for name in names)
    found = Shards(folder, Counts(**raw["counts"]), Identity(**raw["hashes"]), raw["reader"], shards)
    if len(found) != found.counts.documents:
        raise DataError(
            f"{folder}: {len(found)} documents, {RECORD} says {found.counts.documents}; prepare the source again"
        )
    return found


def altered(folder: Path) -> Iterator[str]:
    """One line for every file of a prepared source whose bytes are not those that were written."""
    raw, _ = _record(folder)
    for entry in raw["files"]:
        path = folder / entry["name"]
        if not path.is_file():
            yield f"{path}: missing; restore it or prepare the source again"
        elif sha256_of(path) != entry["sha256"]:
            yield f"{path}: altered since it was written (SHA-256 differs); restore it or prepare the source again"
