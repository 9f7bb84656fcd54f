"""The place where a folder is made: locked by its living writer, remembered when the writer is killed.

``out`` is made in ``.<name>.partial`` beside it. ``Lock`` is a file beside both; the kernel drops the lock when the
process ends, however it ends, so that a crash leaves no lock behind. ``Journal`` is a file in the partial folder with
one JSON object a line: the key of the work, then one line for every shard that is whole and on disk.

A shard counts as whole by its size and its time of change, written down after fsync returned: from then on a kill or a
power cut cannot change it. A line that a kill cut short is dropped with its shard.
"""

import contextlib
import errno
import fcntl
import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from jam.errors import JamError

JOURNAL = "journal.jsonl"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def partial_folder(out: Path) -> Path:
    return out.with_name(f".{out.name}.partial")


def check_parents(out: Path) -> None:
    """Raises JamError unless ``out``, and what is made beside it, can be made; folders above it may be absent."""
    out = Path(os.path.realpath(out) if out.is_dir() else os.path.abspath(out))
    folder, names = out.parent, [partial_folder(out).name]
    while not os.path.lexists(folder):
        names.append(folder.name)
        folder = folder.parent
    todo = "a path below a folder that can be written is required, choose another output"
    if not folder.is_dir():
        raise JamError(f"{out}: {folder} is no folder; {todo}")
    try:
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(folder / name)  # too long a name
        with tempfile.TemporaryFile(dir=folder):  # asked of the system itself: permission bits do not say all
            pass
    except OSError as error:
        raise JamError(f"{out}: nothing can be made in {folder} ({error.strerror}); {todo}") from None


@dataclass
class Lock:
    """The right to write ``out``, held by one process at a time."""

    out: Path
    _handle: int | None = field(default=None, init=False)

    @property
    def path(self) -> Path:
        return self.out.with_name(f".{self.out.name}.lock")

    def acquire(self) -> None:
        """Raises JamError when another process holds it."""
        while self._handle is None:
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                raise JamError(
                    f"{self.out}: another process is writing this folder; one writer is allowed, wait for it or choose "
                    "another output folder"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    os.close(handle)
                    raise
                print(f"{self.out}: this file system has no locks; start no second writer", file=sys.stderr)
            if self._is_current(handle):
                self._handle = handle
            else:  # its last holder removed the file between our open and our lock
                os.close(handle)

    def _is_current(self, handle: int) -> bool:
        try:
            return os.path.samestat(os.fstat(handle), os.stat(self.path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """The file goes first: who opened it before finds that it is gone, and takes a new one."""
        if self._handle is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = None


@dataclass(frozen=True)
class Shard:
    """A file that is whole: its size in bytes, its time of change in ns, its SHA-256 where one was asked for."""

    name: str
    bytes: int
    changed: int
    sha256: str | None = None

    @classmethod
    def of(cls, file: Path, sha256: str | None = None) -> "Shard":
        stat = file.stat()
        return cls(file.name, stat.st_size, stat.st_mtime_ns, sha256)


@dataclass(frozen=True)
class Journal:
    """The journal of one partial folder."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / JOURNAL

    def start(self, key: str, shards: list[Shard]) -> None:
        """A new journal that knows ``shards``; the file of that name is always whole."""
        temporary = self.path.with_suffix(".tmp")
        lines = [{"key": key}, *(vars(shard) for shard in shards)]
        _append(temporary, "".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(self.path)

    def add(self, shard: Shard) -> None:
        _append(self.path, json.dumps(vars(shard)) + "\n")

    def read(self, key: str) -> list[Shard] | None:
        """The whole shards of earlier work under this key; None when there is no journal, or one of another key."""
        try:
            first, *lines = self.path.read_text(encoding="utf-8").split("\n")
            if json.loads(first) != {"key": key}:
                return None
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, RecursionError):
            return None
        shards = []
        for line in lines:
            try:
                shard = Shard(**json.loads(line))
                if Shard.of(self.folder / shard.name, shard.sha256) == shard:
                    shards.append(shard)
            except (ValueError, TypeError, OSError, RecursionError):  # cut short by the kill, as every last piece is
                continue
        return shards


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
