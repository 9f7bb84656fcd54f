"""Rows for one tokenizer's tokens out of another's: each token's string is cut by the other tokenizer.

Stages: ``tokenizer.json`` to the bytes of every token (``token_bytes``) -> those bytes in the other tokenizer's
spelling -> its model cuts them -> the rows to average. The model is asked directly, without normalizer and
pre-tokenizer: a token is a piece of a word, and a sentence-start space put before it would be a piece too many.

Two spellings are known: byte-level (GPT-2's printable letter for each byte; Llama 3, Qwen, OPT, Chameleon) and
sentencepiece's (``▁`` for a space, ``<0xE2>`` for a byte; Llama 2, Gemma, Mistral). Anything else is refused.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, pre_tokenizers

from jam.errors import CheckpointError
from jam.tokens.text import TextTokenizer

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def _letters() -> dict[str, int]:
    """GPT-2's letter of every byte: printable Latin-1 stands for itself, the rest for letters from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in plain)
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


LETTERS = _letters()
_LETTER_OF = {byte: letter for letter, byte in LETTERS.items()}
assert set(LETTERS) == set(pre_tokenizers.ByteLevel.alphabet())


@dataclass(frozen=True)
class Spelling:
    """One tokenizer and how its tokens spell bytes."""

    folder: Path
    tokenizer: Tokenizer
    byte_level: bool
    added: frozenset[str]  # tokens written as plain text, outside the spelling

    @classmethod
    def of(cls, folder: Path) -> "Spelling":
        """Raises CheckpointError for a damaged tokenizer.json, or a kind whose tokens no string follows from."""
        tokenizer = TextTokenizer.load(folder).tokenizer
        try:
            raw = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
            added = frozenset(item["content"] for item in raw.get("added_tokens", []))
            parts = json.dumps([raw.get("pre_tokenizer"), raw.get("decoder")])
            kind = raw["model"]["type"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}/tokenizer.json: {error!r}; the file is damaged, restore it") from None
        byte_level = '"ByteLevel"' in parts
        sentencepiece = kind in ("BPE", "Unigram") and any("▁" in word for word in tokenizer.get_vocab(False))
        if not byte_level and not sentencepiece:
            raise CheckpointError(
                f"{folder}/tokenizer.json: a {kind} model, neither byte-level nor sentencepiece's; rows can be carried "
                "over between those two kinds, use a parent with one of them"
            )
        return cls(Path(folder), tokenizer, byte_level, added)

    @cached_property
    def words(self) -> dict[int, str]:
        return {index: word for word, index in self.tokenizer.get_vocab(True).items()}

    def token_bytes(self, index: int) -> bytes:
        """What a token stands for; empty for an id without a token."""
        word = self.words.get(index, "")
        if word in self.added:
            return word.encode()
        if self.byte_level:
            return bytes(LETTERS[letter] for letter in word) if all(letter in LETTERS for letter in word) else b""
        if single := _BYTE.fullmatch(word):
            return bytes([int(single[1], 16)])
        return word.replace("▁", " ").encode()

    def cut(self, piece: bytes) -> list[int]:
        """Ids that the tokenizer's model makes of a piece; empty where it knows none or has to say unknown."""
        if self.byte_level:
            return self._ids("".join(_LETTER_OF[byte] for byte in piece))
        try:
            return self._ids(piece.decode().replace(" ", "▁"))
        except UnicodeDecodeError:  # part of a character
            found = [self.tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in piece]
            return [] if None in found else found

    def _ids(self, spelled: str) -> list[int]:
        if not spelled:
            return []
        ids = [token.id for token in self.tokenizer.model.tokenize(spelled)]
        return [] if self._unknown in ids else ids

    @cached_property
    def _unknown(self) -> int | None:
        name = getattr(self.tokenizer.model, "unk_token", None)
        return None if name is None else self.tokenizer.token_to_id(name)


def pieces(ours: Spelling, theirs: Spelling, ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which of their tokens each of our tokens is made of.

    Args:
        ids: N of our ids.

    Returns:
        int64 [N + 1] and int64 [M]: token n is made of ``found[offsets[n] : offsets[n + 1]]``, of none where they have
        no word for it.
    """
    cuts = [theirs.cut(ours.token_bytes(index)) for index in ids]
    offsets = np.zeros(len(cuts) + 1, np.int64)
    np.cumsum([len(cut) for cut in cuts], out=offsets[1:])
    return offsets, np.array([index for cut in cuts for index in cut], np.int64)
