"""A JSON array (LLaVA's own files) as its elements, a little at a time."""

import json
import re
from collections.abc import Iterator
from typing import TextIO

from jam.errors import DataError

CHUNK = 1 << 20  # characters read at once
ELEMENT = 1 << 26  # characters of one element; a file whose brackets do not close is not read whole to find that out
_SPACE = re.compile(r"[ \t\r\n]*")


def elements(file: TextIO) -> Iterator[tuple[int, str]]:
    """Line (from 1) and text of every element.

    Raises:
        DataError: no array, or one that cannot be read any further.
    """
    text = _Text(file)
    if text.next() != "[":
        raise DataError("not a JSON array; mend the file")
    text.take(1)
    if text.next() == "]":
        text.take(1)
    else:
        while True:
            text.next()
            yield text.line, text.take(text.end_of_value())
            separator = text.next()
            text.take(1)
            if separator == "]":
                break
            if separator != ",":
                raise DataError(
                    f"line {text.line}: found {separator or 'the end'!r} where a comma or ] is due; mend it"
                )
    if text.next():
        raise DataError(f"line {text.line}: something follows the array; mend the file")


class _Text:
    """What was read and not yet taken."""

    def __init__(self, file: TextIO):
        self.file, self.decoder = file, json.JSONDecoder()
        self.buffer, self.at, self.line = "", 0, 1

    def next(self) -> str:
        """The next character that is no space, still there; empty at the end."""
        while True:
            self.take(_SPACE.match(self.buffer, self.at).end() - self.at)
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._more():
                return ""

    def take(self, size: int) -> str:
        taken = self.buffer[self.at : self.at + size]
        self.at += size
        self.line += taken.count("\n")
        return taken

    def end_of_value(self) -> int:
        """Characters of the value that begins here."""
        while True:
            try:
                end = self.decoder.raw_decode(self.buffer, self.at)[1]
            except json.JSONDecodeError as error:
                if len(self.buffer) - self.at > ELEMENT or not self._more():
                    raise DataError(f"line {self.line}: not valid JSON ({error.msg}); mend the file") from None
            except (ValueError, RecursionError) as error:  # a number of thousands of digits; endless nesting
                raise DataError(f"line {self.line}: not usable JSON ({error}); mend the file") from None
            else:
                if end < len(self.buffer) or not self._more():  # a number may go on
                    return end - self.at

    def _more(self) -> bool:
        kept = self.buffer[self.at :]
        new = self.file.read(max(CHUNK, len(kept)))
        self.buffer, self.at = kept + new, 0
        return bool(new)
