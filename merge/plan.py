"""What a merge is before it runs: two parents read header-first, and a frozen list of jobs.

``read_parent`` checks one folder. A method (``merge.uniform``, ``merge.width``, ``merge.cross``) turns two parents and
the recipe into a ``Plan``: for every output tensor its name, its shape and a rule that yields its rows; ``merge.run``
streams the plan to disk. A rule reads its sources when asked for rows and never before, so a plan costs headers only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from jam.checkpoint import Checkpoint, open_checkpoint
from jam.errors import CheckpointError
from jam.models.families import check_tensors, family_of
from jam.models.family import HEAD, Axes, Family, Sizes
from jam.tokens.adopt import read_jam_file
from jam.tokens.vocabulary import JamFile, Vocabulary


@dataclass(frozen=True)
class Parent:
    """One parent; ``side`` is "text" or "image", the word used in reports and errors."""

    side: str
    checkpoint: Checkpoint
    family: Family
    sizes: Sizes
    axes: dict[str, Axes]
    jam: JamFile

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def config(self) -> dict:
        return self.checkpoint.config

    @property
    def vocabulary(self) -> Vocabulary:
        return self.jam.vocabulary

    @property
    def head(self) -> str:
        """The tensor that scores the vocabulary: the table itself when tied."""
        return self.family.embed if self.sizes.tied else HEAD

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[name].shape


def read_parent(folder: Path, side: str) -> Parent:
    """Open a parent's headers and side files.

    Raises:
        CheckpointError: a damaged or incomplete folder, an unknown family, a vocabulary of another size than the table.
    """
    checkpoint = open_checkpoint(folder)
    family = family_of(checkpoint.config, str(folder))
    axes = check_tensors(checkpoint, family)
    sizes, jam = family.sizes(checkpoint.config), read_jam_file(folder, checkpoint.config)
    if sizes.vocab != jam.vocabulary.size:
        raise CheckpointError(
            f"{folder}: config.json has {sizes.vocab} vocabulary rows, jam.json {jam.vocabulary.size} ids; they must "
            "agree, describe padding rows in jam.json as a control span"
        )
    if not (Path(folder) / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: no tokenizer.json; save the model's fast tokenizer into this folder")
    if jam.image_tokenizer is not None:
        for name in ("config.json", "model.safetensors"):
            if not (Path(folder) / jam.image_tokenizer / name).is_file():
                raise CheckpointError(f"{folder}: no {jam.image_tokenizer}/{name}; restore the image tokenizer")
        network = open_checkpoint(Path(folder) / jam.image_tokenizer)
        codes = network.config.get("n_embed", network.config.get("codebook_size"))  # ours; Emu3's
        if codes != jam.vocabulary.codebook_size:
            raise CheckpointError(
                f"{network.path}: a codebook of {codes} codes, jam.json has "
                f"{jam.vocabulary.codebook_size} image ids; they must agree, restore the image tokenizer"
            )
    return Parent(side, checkpoint, family, sizes, axes, jam)


Source = tuple[str, str]  # "text" or "image", and a tensor of that parent


class Rule(Protocol):
    """How one output tensor comes to be."""

    @property
    def fate(self) -> str:
        """One phrase for the report: what was done with which tensors."""

    @property
    def sources(self) -> tuple[Source, ...]:
        """The parents' tensors that it reads; none for new weights."""

    def rows(self, block: slice) -> np.ndarray:
        """float32 rows ``block`` of the output tensor."""


@dataclass(frozen=True)
class Copy:
    """A parent's tensor as it is."""

    parent: Parent
    tensor: str

    @property
    def fate(self) -> str:
        return f"copied from {self.parent.side} {self.tensor}"

    @property
    def sources(self) -> tuple[Source, ...]:
        return ((self.parent.side, self.tensor),)

    def rows(self, block: slice) -> np.ndarray:
        return self.parent.checkpoint.read(self.tensor, block)


@dataclass(frozen=True)
class Job:
    """One output tensor."""

    name: str
    shape: tuple[int, ...]
    rule: Rule


def _nothing_measured() -> dict:
    return {}


@dataclass(frozen=True)
class Plan:
    """Everything that a merge will write. ``rows`` says per table where each vocabulary row comes from; ``measured`` is
    called after the stream for figures that only the weights give."""

    method: str
    jobs: tuple[Job, ...]
    config: dict
    jam: JamFile
    preserves: str
    rows: Mapping[str, dict]
    notes: tuple[str, ...] = ()
    figures: Mapping[str, object] = field(default_factory=dict)
    measured: Callable[[], dict] = _nothing_measured

    @property
    def parameters(self) -> int:
        return sum(prod(job.shape) for job in self.jobs)


def single_table_config(parent: Parent, vocabulary: Vocabulary, dtype: str, **changes: object) -> dict:
    """A configuration of the parent's own class, without keys that say where the parent came from."""
    dropped = ("_name_or_path", "torch_dtype", "transformers_version")
    config = {key: value for key, value in parent.config.items() if key not in dropped}
    config |= {"architectures": [parent.family.architecture], "dtype": dtype, "vocab_size": vocabulary.size}
    return config | token_ids(vocabulary) | changes


def token_ids(vocabulary: Vocabulary) -> dict[str, int | None]:
    """transformers' names for the special ids."""
    return {f"{name}_token_id": vocabulary.controls.get(name) for name in ("bos", "eos", "pad")}
