"""How a process starts that reads what cannot be trusted: a Python file of jam, run alone, given next to nothing."""

import os
import sys
from pathlib import Path

_INHERITED = ("HOME", "LD_LIBRARY_PATH", "PATH", "SYSTEMROOT", "TMPDIR")  # what an interpreter needs to start


def command(program: Path, *arguments: str) -> list[str]:
    """The program under this interpreter; nothing beside it or in the environment can take the place of a module."""
    return [sys.executable, "-EPBs", "-Wignore", str(program), *arguments]


def environment() -> dict[str, str]:
    """Without the user's keys and tokens."""
    return {name: os.environ[name] for name in _INHERITED if name in os.environ} | {"OMP_NUM_THREADS": "1"}
