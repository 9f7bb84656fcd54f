"""Errors that a user can mend.

The command line prints ``str(error)`` as one line and exits with code 2; a traceback means a bug of ours.
Every message has three parts: what was found, what is required, what to do.
"""

import unicodedata

LONGEST = 2000  # letters of a line; a message may quote a file


def printable(text: str) -> str:
    """Text without control characters except tab and newline: a file or a model must not steer the terminal.

    >>> printable("a\\x1b[2Jb\\tc\\n")
    'a[2Jb\\tc\\n'
    """
    return "".join(letter for letter in text if letter in "\t\n" or unicodedata.category(letter) not in ("Cc", "Cs"))


def message_lines(error: "JamError") -> list[str]:
    """What is printed of an error: one line, or one for each mistake where the error lists several."""
    text = printable(str(error))
    lines = text.split("\n") if error.lists else [" ".join(text.split("\n"))]
    return [line if len(line) <= LONGEST else f"{line[: LONGEST // 2]} ... {line[-LONGEST // 2 :]}" for line in lines]


class JamError(Exception):
    """Base of every error that is the user's to mend."""

    exit_code = 2
    lists = False  # several mistakes, a line each
    told_elsewhere = False  # another process of the run prints it


class RecipeError(JamError):
    """A recipe or an override that does not parse; the message lists every mistake with file and line."""

    lists = True


class CheckpointError(JamError):
    """A checkpoint folder that is missing, truncated, damaged or of an unknown family."""


class DataError(JamError):
    """A data line, a document or an image that cannot be used; names file and line where there is one."""

    lists = True


class MergeError(JamError):
    """Parents that the asked method cannot fuse."""


class GenerationError(JamError):
    """A prompt or a decoding setting that the model cannot serve."""


class RunError(JamError):
    """A run folder that is in use, foreign, or recorded under other settings."""
