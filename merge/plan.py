"""What a merge is before it runs: two parents read header-first, and a frozen list of jobs.

``read_parent`` checks one folder. A method (``merge.uniform``, ``merge.width``, ``merge.cross``) turns two parents and
the recipe into a ``Plan``: for every output tensor its name, its shape and a rule that yields its rows; ``merge.run``
streams the plan to disk. A rule reads its sources when asked for rows and never before, so a plan costs headers only.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Protocol

import numpy as np

from jam.checkpoint import Checkpoint, check_floats
from jam.errors import CheckpointError
from jam.layouts import open_model
from jam.models.families import check_tensors, family_of
from jam.models.family import HEAD, Axes, Family, Sizes
from jam.tokens.adopt import Words
from jam.tokens.vocabulary import TEXT, JamFile, Vocabulary
from merge.image_network import ImageNetwork, given_network, own_network


@dataclass(frozen=True)
class Parent:
    """One parent; ``side`` is "text" or "image", the word used in reports and errors.

    ``network`` is the image tokenizer that the result gets from an image parent, ``passengers`` are tensors of the
    parent's files that are not the decoder's, ``notes`` what its owner's layout has to say of the result.
    """

    side: str
    checkpoint: Checkpoint
    family: Family
    sizes: Sizes
    axes: dict[str, Axes]
    jam: JamFile
    network: ImageNetwork | None = None
    passengers: Checkpoint | None = None
    notes: tuple[str, ...] = ()

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

    @cached_property
    def has_text(self) -> bool:
        """Whether it knows any text at all (LVM does not)."""
        return bool((self.vocabulary.kinds() == TEXT).any())

    def shape(self, name: str) -> tuple[int, ...]:
        return self.checkpoint.tensors[name].shape

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the parent's files under its name there."""
        passengers = {} if self.passengers is None else self.passengers.tensors
        return {info.name: info.shape for info in (*self.checkpoint.tensors.values(), *passengers.values())}


def read_parent(folder: Path, side: str, image_tokenizer: Path | None = None) -> Parent:
    """Open a parent's headers and side files.

    Args:
        image_tokenizer: a folder that takes the place of the parent's own image tokenizer.

    Raises:
        CheckpointError: a damaged or incomplete folder, an unknown family, a vocabulary of another size than the table.
        MergeError: an image tokenizer that does not belong to the parent.
    """
    model = open_model(folder)
    checkpoint, jam = model.checkpoint, model.jam
    family = family_of(checkpoint.config, str(folder))
    check_floats(checkpoint, family.ignored)
    axes = check_tensors(checkpoint, family)
    sizes = family.sizes(checkpoint.config)
    if sizes.vocab != jam.vocabulary.size:
        raise CheckpointError(
            f"{folder}: config.json has {sizes.vocab} vocabulary rows, jam.json {jam.vocabulary.size} ids; they must "
            "agree, describe padding rows in jam.json as a control span"
        )
    network = own_network(model) if image_tokenizer is None else given_network(image_tokenizer, model)
    notes = model.notes if model.lacks is None or image_tokenizer is not None else (*model.notes, model.lacks)
    parent = Parent(side, checkpoint, family, sizes, axes, jam, network, model.passengers, notes)
    if (side == "text" or parent.has_text) and not (Path(folder) / "tokenizer.json").is_file():
        raise CheckpointError(f"{folder}: no tokenizer.json; save the model's fast tokenizer into this folder")
    if parent.has_text and (Path(folder) / "jam.json").is_file():  # else the vocabulary came from the tokenizer
        count, size = Words.read(folder).count, jam.vocabulary.size
        if count > size:
            raise CheckpointError(
                f"{folder}: tokenizer.json names id {count - 1}, jam.json has {size} ids; the tokenizer of this model "
                "is required, restore it"
            )
    return parent


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


Read = Callable[[Checkpoint, str, slice], np.ndarray]  # rows of a tensor: Checkpoint.read, or its stored values


class Placing(ABC):
    """A rule that puts its parents' values where they belong and may compute nothing.

    What is only placed is the same work on float32 and on stored values; a merge that keeps the type need not convert.
    """

    only_places = True  # False where it does compute, and ``place`` needs float32

    @property
    @abstractmethod
    def origins(self) -> tuple[tuple[Parent, str], ...]:
        """The parents' tensors that it reads."""

    @abstractmethod
    def place(self, block: slice, read: Read) -> np.ndarray:
        """Rows ``block`` of the output tensor, of what ``read`` gives."""

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple((parent.side, tensor) for parent, tensor in self.origins)

    def rows(self, block: slice) -> np.ndarray:
        return self.place(block, Checkpoint.read)

    def keeps(self, dtype: str) -> bool:
        """Whether stored values of this type can be placed as they are."""
        types = {parent.checkpoint.tensors[tensor].dtype for parent, tensor in self.origins}
        return self.only_places and types == {dtype}


@dataclass(frozen=True)
class Copy(Placing):
    """A parent's tensor as it is."""

    parent: Parent
    tensor: str

    @property
    def fate(self) -> str:
        return f"copied from {self.parent.side} {self.tensor}"

    @property
    def origins(self) -> tuple[tuple[Parent, str], ...]:
        return ((self.parent, self.tensor),)

    def place(self, block: slice, read: Read) -> np.ndarray:
        return read(self.parent.checkpoint, self.tensor, block)


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
