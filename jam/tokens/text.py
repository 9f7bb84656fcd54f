"""The text tokenizer: ``tokenizer.json`` through the ``tokenizers`` library, never importing transformers.

User text can never become a control id: a typed ``<break>`` is encoded as ordinary text. Control ids are written by
``jam.tokens.render`` alone.
"""

from pathlib import Path

from tokenizers import Tokenizer

from jam.errors import CheckpointError, DataError

WORD = "x"  # stands for the text before


class TextTokenizer:
    def __init__(self, tokenizer: Tokenizer):
        tokenizer.encode_special_tokens = True  # special tokens in user text are text
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path) -> "TextTokenizer":
        """Raises CheckpointError when the folder has no readable ``tokenizer.json``."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{folder}: no tokenizer.json; save the model's fast tokenizer into this folder")
        try:
            return cls(Tokenizer.from_file(str(path)))
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises bare Exception for a bad file, and panics below it
            raise CheckpointError(f"{path}: {error}; the file is damaged, restore it from its source") from None

    def encode(self, text: str, inside: bool = False) -> list[int]:
        """``inside``: the text goes on from another; Llama 2's tokenizer puts a space before one that does not.

        Raises:
            DataError: text that UTF-8 cannot hold.
        """
        if inside:
            start, ids = self.encode(WORD), self.encode(WORD + text)
            if ids[: len(start)] == start:  # else the stand-in became one with the text
                return ids[len(start) :]
        try:
            return self.tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError:  # a lone surrogate
            raise DataError(f"{text!r:.100}: not UTF-8; give text in UTF-8") from None

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [item.ids for item in self.tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids: list[int], inside: bool = False) -> str:
        """``inside``: the ids go on from others, and a space before them stays."""
        if inside:
            start = self.encode(WORD)
            return self.decode([*start, *ids]).removeprefix(self.decode(start))
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class TextStream:
    """Turns ids that arrive one by one into text that never splits a UTF-8 character.

    ``push`` returns the newly finished text; ``flush`` returns what is left, with U+FFFD where bytes are missing.
    ``inside`` is that of ``decode``.
    """

    def __init__(self, tokenizer: TextTokenizer, inside: bool = False):
        self.tokenizer, self.inside = tokenizer, inside
        self.ids: list[int] = []
        self.sent = ""

    def push(self, token: int) -> str:
        self.ids.append(token)
        # bytes that may still become a character decode to one U+FFFD at the end; all before it is final
        return self._send(self.tokenizer.decode(self.ids, self.inside).removesuffix("\ufffd"))

    def flush(self) -> str:
        return self._send(self.tokenizer.decode(self.ids, self.inside)) if self.ids else ""

    def _send(self, text: str) -> str:
        delta, self.sent = text[len(self.sent) :], text
        return delta
