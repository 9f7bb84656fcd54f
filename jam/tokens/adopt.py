"""The vocabulary of a plain language model's folder, read off the files that its owner ships.

``tokenizer.json`` says which ids are text and which are special, ``config.json`` how many rows the table has,
``tokenizer_config.json`` (else the configuration) which ids begin, end and pad, the chat template how turns are written
and which id ends a reply. Rows without a token are padding, kept as reserved control ids. Nothing here knows of image
ids: folders with images are read by ``jam.layouts``.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jam.checkpoint import read_json
from jam.errors import CheckpointError
from jam.tokens.chat_template import read_turns
from jam.tokens.vocabulary import CONTROL, MAX_IDS, TEXT, Vocabulary


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
            raw = read_json(path)
            stored = raw["model"]["vocab"]
            words = (
                {word: index for index, (word, _) in enumerate(stored)} if isinstance(stored, list) else dict(stored)
            )
            added = [(item["content"], item["id"], bool(item["special"])) for item in raw.get("added_tokens", [])]
            words |= {word: index for word, index, _ in added}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: {error!r}; the file is damaged, restore it from its source") from None
        if not words or any(type(index) is not int or not 0 <= index < MAX_IDS for index in words.values()):
            raise CheckpointError(
                f"{path}: its tokens have no ids or ids that are none; whole numbers from 0 to {MAX_IDS - 1} are "
                "required, restore the file from its source"
            )
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
        if type(size) is not int or size > MAX_IDS:
            shown = size if size is None or isinstance(size, float) else f"a {type(size).__name__}"
            raise CheckpointError(
                f"{self.path.parent}: config.json has vocab_size {shown}; a whole number from 1 to {MAX_IDS} is "
                "required, restore the file"
            )
        if size < self.count:
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
    written = {f"{name}_token": named[at] for name, at in controls.items() if at in named}  # a row may have no token
    turns, found = None, read_turns(folder, kinds, written)
    if found is not None:
        turns, end = found
        controls = {name: index for name, index in controls.items() if index != end} | {"eos": end}
    return Vocabulary.of_kinds(kinds, controls, turns=turns)


def special_ids(folder: Path, config: dict, words: dict[str, int]) -> dict[str, int]:
    """bos, eos and pad as the tokenizer's settings name them, else as the configuration numbers them.

    A pad token that is another one's id (a common stand-in) is left out: its row is trained. OPT begins and ends with
    one token. Raises CheckpointError for a name or a number of another type.
    """
    settings = folder / "tokenizer_config.json"
    named = read_json(settings) if settings.is_file() else {}
    named = {name: named[f"{name}_token"] for name in ("bos", "eos", "pad") if f"{name}_token" in named}
    found: dict[str, int] = {}
    for name in ("bos", "eos", "pad"):
        if name in named:
            word = named[name].get("content", named[name]) if isinstance(named[name], dict) else named[name]
            if not (word is None or isinstance(word, str)):
                raise CheckpointError(
                    f"{settings}: {name}_token is a {type(word).__name__}; a token, a mapping with its content or null "
                    "is required, restore the file"
                )
            index = words.get(word)
        else:
            index = config.get(f"{name}_token_id")
            index = index[0] if isinstance(index, list) and index else index
            if not (index is None or type(index) is int):
                raise CheckpointError(
                    f"{folder}/config.json: {name}_token_id is or holds a {type(index).__name__}; a whole number, a "
                    "list of them or null is required, restore the file"
                )
        inside = index is not None and 0 <= index < config["vocab_size"]
        if inside and not (name == "pad" and index in found.values()):
            found[name] = index
    return found
