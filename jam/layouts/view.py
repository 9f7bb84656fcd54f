"""What a layout makes of its owner's folder: a decoder of a known family, its vocabulary, and the image network.

A view renames tensors and copies nothing: a ``TensorInfo`` keeps file, offsets and the name that it has there, only the
key that it stands under is ours.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from jam.checkpoint import Checkpoint, TensorInfo
from jam.errors import CheckpointError
from jam.tokens.adopt import Words, special_ids
from jam.tokens.vocabulary import IMAGE, JamFile, Vocabulary


@dataclass(frozen=True)
class ModelFolder:
    """A checkpoint folder as the rest of jam reads it.

    Attributes:
        checkpoint: the decoder alone, configuration and tensors under its family's names.
        layout: whose folder it is; None for jam's own folders and plain language models.
        passengers: the image network that lies among the decoder's tensors, under the names inside an image tokenizer
            folder; its ``config`` is that folder's config.json.
        code_order: int64 [K], the row of the owner's codebook that each image id stands for, in the order of the ids.
            None where the k-th id is the k-th row.
        notes: what a user has to know of it, for reports.
        lacks: what is missing to make pictures of its codes; None if nothing is.
    """

    checkpoint: Checkpoint
    jam: JamFile
    layout: str | None = None
    passengers: Checkpoint | None = None
    code_order: np.ndarray | None = None
    notes: tuple[str, ...] = ()
    lacks: str | None = None


@dataclass(frozen=True)
class Owner:
    """A folder without ``jam.json``, before anyone knows what it is."""

    checkpoint: Checkpoint

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def config(self) -> dict:
        return self.checkpoint.config

    @cached_property
    def words(self) -> Words | None:
        """None without a tokenizer.json. Raises CheckpointError for a damaged one."""
        return Words.read(self.path) if (self.path / "tokenizer.json").is_file() else None

    def has(self, *names: str) -> bool:
        """Whether the tokenizer has every one of these tokens."""
        return self.words is not None and all(name in self.words.ids for name in names)

    @cached_property
    def named_words(self) -> dict[str, int]:
        """The configuration's ``vocabulary_map``, else the tokenizer's tokens.

        Raises:
            CheckpointError: neither is there, or they give one token two numbers.
        """
        mapped = self.config.get("vocabulary_map")
        if mapped is not None and not (
            isinstance(mapped, dict) and mapped and all(type(index) is int for index in mapped.values())
        ):
            raise CheckpointError(
                f"{self.path}/config.json: vocabulary_map is a {type(mapped).__name__} without numbered tokens; a "
                "mapping of token to id is required, restore the file"
            )
        if mapped is None and self.words is None:
            raise CheckpointError(
                f"{self.path}: neither vocabulary_map in config.json nor tokenizer.json; one is required to know the "
                "image ids, save the model's fast tokenizer into this folder"
            )
        stored = self.words.ids if self.words is not None else {}
        for name, index in (mapped or {}).items():
            if stored.get(name, index) != index:
                raise CheckpointError(
                    f"{self.path}: token {name} is {index} in config.json's vocabulary_map and {stored[name]} in "
                    "tokenizer.json; they must agree, use the tokenizer of this model"
                )
        return mapped or stored


def split(owner: Owner, network: tuple[str, ...], decoder: Mapping[str, str]) -> tuple[dict, dict]:
    """Every tensor once: the decoder's under its family's names, the image network's under the names inside it.

    Args:
        network: prefixes of the image network's tensors.
        decoder: prefixes of the decoder's tensors, and what its family has in their place. Tensors of no known prefix
            go to the decoder as they are, where the family refuses what it does not know.

    Raises:
        CheckpointError: two tensors under one name.
    """
    parts: tuple[dict[str, TensorInfo], dict[str, TensorInfo]] = ({}, {})
    for name, info in owner.checkpoint.tensors.items():
        prefix = next((prefix for prefix in network if name.startswith(prefix)), None)
        if prefix is not None:
            part, ours = parts[1], name.removeprefix(prefix)
        else:
            prefix = next((prefix for prefix in decoder if name.startswith(prefix)), "")
            part, ours = parts[0], decoder.get(prefix, "") + name.removeprefix(prefix)
        if ours in part:
            raise CheckpointError(
                f"{owner.path}: tensors {part[ours].name} and {name} are both the model's {ours}; one of them is "
                "required, save the model again"
            )
        part[ours] = info
    return dict(sorted(parts[0].items())), dict(sorted(parts[1].items()))


def vocabulary_of(
    owner: Owner, config: dict, codes: range, controls: Mapping[str, int], codes_per_image: int
) -> Vocabulary:
    """The tokenizer's ids with ``codes`` as image ids and ``controls`` beside bos, eos and pad. Needs ``owner.words``.

    Raises CheckpointError when the configuration has too few rows.
    """
    kinds = owner.words.kinds(config)
    kinds[codes.start : codes.stop] = IMAGE
    found = {
        name: index for name, index in special_ids(owner.path, config, owner.words.ids).items() if name not in controls
    }
    return Vocabulary.of_kinds(kinds, found | dict(controls), codes_per_image)


def code_ids(numbered: Mapping[int, list[int]], names: str, where: str) -> tuple[range, np.ndarray]:
    """Image ids and the code that each stands for.

    Args:
        numbered: the ids that name each code.
        names: what the tokens are called, for errors.

    Returns:
        The ids, and int64 [K] with the code of each in the order of the ids.

    Raises:
        CheckpointError: no codes, a code without an id or with several, ids that are not contiguous.
    """
    if not numbered:
        raise CheckpointError(
            f"{where}: no token is named {names}; they say which ids are image codes, use the tokenizer of this model "
            "or write jam.json"
        )
    for code in range(max(numbered) + 1):
        ids = numbered.get(code, [])
        if len(ids) != 1:
            found = "has no id" if not ids else f"has the ids {ids[0]} and {ids[1]}"
            raise CheckpointError(
                f"{where}: of {len(numbered)} image codes up to {max(numbered)}, code {code} {found}; one id for each "
                "code is required, restore the file"
            )
    code_of = {ids[0]: code for code, ids in numbered.items()}
    first = min(code_of)
    span = range(first, first + len(numbered))
    if missing := next((index for index in span if index not in code_of), None):
        raise CheckpointError(
            f"{where}: image ids start at {first} and lack {missing}; contiguous ids are required, such a model cannot "
            "be read yet"
        )
    return span, np.array([code_of[index] for index in span], np.int64)


def check_words(words: Mapping[str, int], where: str) -> None:
    """Raises CheckpointError for two tokens under one id."""
    seen: dict[int, str] = {}
    for name, index in words.items():
        if index in seen:
            raise CheckpointError(
                f"{where}: tokens {seen[index]} and {name} have one id, {index}; one token for each id is required, "
                "restore the file"
            )
        seen[index] = name


def unordered(order: np.ndarray) -> np.ndarray | None:
    """A code order, or None where it changes nothing."""
    return None if (order == np.arange(len(order))).all() else order
