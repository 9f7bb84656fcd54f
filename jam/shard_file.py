"""One file on its way to disk: appended to by one thread, written and hashed by others beside it.

Weights go past the page cache where the file system allows it (``O_DIRECT``). A checkpoint is written once and is often
larger than memory: copying it into fresh pages and writing these back costs more than all that a merge computes
(docs/decisions.md), and puts out of memory what is read next.
"""

import contextlib
import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from jam.digest import StreamHash

ROOM = 8 << 20  # bytes written at once; two rooms take turns
PAST_CACHE = getattr(os, "O_DIRECT", 0)  # macOS has none


@dataclass
class ShardFile:
    """A new file. ``finish`` returns when everything is on disk; ``drop`` gives it up."""

    path: Path
    hashed: bool
    _file: FileIO = field(init=False)
    _hash: StreamHash | None = field(init=False)
    _rooms: list[memoryview] = field(init=False)
    _filled: int = field(default=0, init=False)
    _disk: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _writing: Future | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        try:
            self._file = FileIO(self.path, "w", opener=lambda path, flags: os.open(path, flags | PAST_CACHE, 0o666))
        except OSError as error:
            # what file systems say that write through their cache only
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self._file = FileIO(self.path, "w")
        self._hash = StreamHash() if self.hashed else None
        # mapped, as direct writes start at a page's address
        kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self._rooms = [memoryview(mmap.mmap(-1, ROOM, flags=kind)) for _ in range(2)]

    def append(self, data: bytes | memoryview) -> None:
        """Take a piece, which must not change afterwards. Raises OSError for what an earlier piece met on the disk."""
        if self._hash is not None:
            self._hash.update(data)
        rest = memoryview(data)
        while rest:
            count = min(len(rest), ROOM - self._filled)
            self._rooms[0][self._filled : self._filled + count] = rest[:count]
            self._filled, rest = self._filled + count, rest[count:]
            if self._filled == ROOM:
                self._wait()
                self._writing = self._disk.submit(self._write, self._rooms[0])
                self._rooms.reverse()
                self._filled = 0

    def _write(self, rest: memoryview) -> None:
        while rest:  # a file may take fewer bytes at once than it is given
            try:
                rest = rest[self._file.write(rest) :]
            except OSError as error:
                # of a direct write: this disk's blocks are larger than a page, or a short write ended inside one
                if error.errno != errno.EINVAL or not self._through_cache():
                    error.filename = str(self.path)
                    raise

    def _through_cache(self) -> bool:
        """From here on by the page cache; False where it was so already."""
        flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
        fcntl.fcntl(self._file, fcntl.F_SETFL, flags & ~PAST_CACHE)
        return bool(flags & PAST_CACHE)

    def _wait(self) -> None:
        """For the room on its way; raises what it met, a full disk for one."""
        if self._writing is not None:
            self._writing.result()

    def finish(self) -> str | None:
        """Everything to disk; the SHA-256 in hexadecimal where one is wanted."""
        self._wait()
        self._disk.shutdown()
        self._through_cache()  # the last bytes fill no page
        self._write(self._rooms[0][: self._filled])
        os.fsync(self._file.fileno())
        self._file.close()
        return None if self._hash is None else self._hash.finish()

    def drop(self) -> None:
        """Close the file whatever happens; its bytes are given up."""
        self._disk.shutdown()
        if self._hash is not None:
            self._hash.drop()
        with contextlib.suppress(OSError):  # a full disk fails once more here
            self._file.close()
