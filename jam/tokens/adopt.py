"""The vocabulary of a plain language model's folder, read off the files that its owner ships.

``tokenizer.json`` says which ids are text and which are special, ``config.json`` how many rows the table has,
``tokenizer_config.json`` (else the configuration) which ids begin, end and pad, the chat template how turns are written
and which id ends a reply. Rows without a token are padding, kept as reserved control ids. Nothing here guesses at image
ids: a folder with images needs ``jam.json``.
"""

import json
from itertools import groupby
from pathlib import Path

import numpy as np

from jam.errors import CheckpointError
from jam.tokens.chat_template import read_turns
from jam.tokens.vocabulary import CONTROL, TEXT, JamFile, Kind, Span, Vocabulary

_KINDS: dict[int, Kind] = {CONTROL: "control", TEXT: "text"}


def read_jam_file(folder: Path, config: dict) -> JamFile:
    """The folder's ``jam.json``; without one, that of a plain language model. A fused model must have its own.

    Raises CheckpointError for a damaged file, or a tokenizer that does not fit the configuration.
    """
    if (Path(folder) / "jam.json").is_file() or config.get("model_type") == "jam_cross":
        return JamFile.read(folder)
    return JamFile(adopt_vocabulary(folder, config))


def adopt_vocabulary(folder: Path, config: dict) -> Vocabulary:
    """Raises CheckpointError when tokenizer.json is missing or does not fit the configuration."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder}: neither jam.json nor tokenizer.json; one is required to know what the ids mean, save the "
            "model's fast tokenizer into this folder"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        stored = raw["model"]["vocab"]
        words = {word: index for index, (word, _) in enumerate(stored)} if isinstance(stored, list) else dict(stored)
        added = [(item["content"], int(item["id"]), bool(item["special"])) for item in raw.get("added_tokens", [])]
        largest = max([*words.values(), *(index for _, index, _ in added)])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {error!r}; the file is damaged, restore it from its source") from None
    size = config.get("vocab_size")
    if not isinstance(size, int) or size <= largest:
        raise CheckpointError(
            f"{folder}: tokenizer.json names id {largest}, config.json has vocab_size {size!r}; a row for every token "
            "is required, use the tokenizer of this model"
        )
    kinds = np.full(size, CONTROL, np.uint8)
    kinds[list(words.values())] = TEXT
    for word, index, special in added:
        words[word] = index
        kinds[index] = CONTROL if special else TEXT
    controls = _special_ids(Path(folder), config, words)
    kinds[list(controls.values())] = CONTROL
    named = {index: word for word, index in words.items()}
    turns, found = None, read_turns(folder, kinds, {f"{name}_token": named[at] for name, at in controls.items()})
    if found is not None:
        turns, end = found
        controls = {name: index for name, index in controls.items() if index != end} | {"eos": end}
    runs = [(int(kind), len(list(run))) for kind, run in groupby(kinds.tolist())]
    stops = np.cumsum([length for _, length in runs]).tolist()
    spans = (Span(_KINDS[kind], stop - length, stop) for (kind, length), stop in zip(runs, stops, strict=True))
    return Vocabulary(tuple(spans), controls, turns=turns)


def _special_ids(folder: Path, config: dict, words: dict[str, int]) -> dict[str, int]:
    """bos, eos and pad as the tokenizer's settings name them, else as the configuration numbers them.

    A pad token that is another one's id (a common stand-in) is left out: its row is trained.
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
        if isinstance(index, int) and 0 <= index < config["vocab_size"] and index not in found.values():
            found[name] = index
    return found
