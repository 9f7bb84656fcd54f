"""Errors that a user can mend.

The command line prints ``str(error)`` as one line and exits with code 2; a traceback means a bug of ours.
Every message has three parts: what was found, what is required, what to do.
"""


class JamError(Exception):
    """Base of every error that is the user's to mend."""

    exit_code = 2


class RecipeError(JamError):
    """A recipe or an override that does not parse; the message lists every mistake with file and line."""


class CheckpointError(JamError):
    """A checkpoint folder that is missing, truncated, damaged or of an unknown family."""


class DataError(JamError):
    """A data line, a document or an image that cannot be used; names file and line where there is one."""


class MergeError(JamError):
    """Parents that the asked method cannot fuse."""


class GenerationError(JamError):
    """A prompt or a decoding setting that the model cannot serve."""


class RunError(JamError):
    """A run folder that is in use, foreign, or recorded under other settings."""
