"""The vocabulary of a plain language model's folder, read off the files that its owner ships.

``tokenizer.json`` says which ids are text and which are special, ``config.json`` how many rows the table has,
``tokenizer_config.json`` (else the configuration) which ids begin, end and pad, the chat template how turns are written
and which id ends a reply. Rows without a token are padding, kept as reserved control ids. Nothing here knows of image
ids: folders with images are read by ``jam.layouts``.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jam.errors import CheckpointError
from jam.tokens.chat_template import read_turns
from jam.tokens.vocabulary import CONTROL, TEXT, Vocabulary


@dataclass(frozen=True)
class Words:
    """The tokens of a ``tokenizer.json``: their numbers, and those that are written apart from the model's own."""

    path: Path
    ids: dict[str, int]
    added: dict[int, bool]  # id to whether it is special

    @classmethod
    def read(cls, folder: Path) -> "Words":
        """Raises CheckpointError when tokenizer.json is missing or damaged."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{folder}: neither jam.json nor tokenizer.json; one is required to know what the ids mean, save the "
                "model's fast tokenizer into this folder"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            stored = raw["model"]["vocab"]
            words = (
                {word: index for index, (word, _) in enumerate(stored)} if isinstance(stored, list) else dict(stored)
            )
            added = [(item["content"], int(item["id"]), bool(item["special"])) for item in raw.get("added_tokens", [])]
            words |= {word: index for word, index, _ in added}
            max(words.values())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: {error!r}; the file is damaged, restore it from its source") from None
        return cls(path, words, {index: special for _, index, special in added})

    @property
    def count(self) -> int:
        """Ids up to the last token's."""
        return max(self.ids.values()) + 1

    def kinds(self, config: dict) -> np.ndarray:
        """uint8 [vocab_size]: TEXT, or CONTROL for special tokens and rows without a token.

        Raises CheckpointError when the configuration has fewer rows than tokens.
        """
        size = config.get("vocab_size")
        if not isinstance(size, int) or size < self.count:
            raise CheckpointError(
                f"{self.path.parent}: tokenizer.json names id {self.count - 1}, config.json has vocab_size {size!r}; a "
                "row for every token is required, use the tokenizer of this model"
            )
        kinds = np.full(size, CONTROL, np.uint8)
        kinds[list(self.ids.values())] = TEXT
        kinds[[index for index, special in self.added.items() if special]] = CONTROL
        return kinds


def adopt_vocabulary(folder: Path, config: dict) -> Vocabulary:
    """Raises CheckpointError when tokenizer.json is missing or does not fit the configuration."""
    words = Words.read(folder)
    kinds = words.kinds(config)
    controls = special_ids(Path(folder), config, words.ids)
    kinds[list(controls.values())] = CONTROL
    named = {index: word for word, index in words.ids.items()}
    turns, found = None, read_turns(folder, kinds, {f"{name}_token": named[at] for name, at in controls.items()})
    if found is not None:
        turns, end = found
        controls = {name: index for name, index in controls.items() if index != end} | {"eos": end}
    return Vocabulary.of_kinds(kinds, controls, turns=turns)


def special_ids(folder: Path, config: dict, words: dict[str, int]) -> dict[str, int]:
    """bos, eos and pad as the tokenizer's settings name them, else as the configuration numbers them.

    A pad token that is another one's id (a common stand-in) is left out: its row is trained. OPT begins and ends with
    one token.
    """
    settings = folder / "tokenizer_config.json"
    try:
        named = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
        named = {name: named[f"{name}_token"] for name in ("bos", "eos", "pad") if f"{name}_token" in named}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{settings}: {error!r}; the file is damaged, restore it from its source") from None
    found: dict[str, int] = {}
    for name in ("bos", "eos", "pad"):
        if name in named:
            word = named[name]["content"] if isinstance(named[name], dict) else named[name]
            index = words.get(word)
        else:
            index = config.get(f"{name}_token_id")
            index = index[0] if isinstance(index, list) and index else index
        inside = isinstance(index, int) and 0 <= index < config["vocab_size"]
        if inside and not (name == "pad" and index in found.values()):
            found[name] = index
    return found
