"""One file on its way to disk: appended to by one thread, flushed and hashed by others beside it."""

import contextlib
import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

from jam.digest import StreamHash

GATHERED = 256 << 10  # bytes of small pieces that are written at once
FLUSH = 256 << 20  # bytes after which the disk is set to work, while more are made

_sync = getattr(os, "fdatasync", os.fsync)  # macOS has none


@dataclass
class ShardFile:
    """A new file. ``finish`` returns when everything is on disk; ``drop`` gives it up."""

    path: Path
    hashed: bool
    _file: FileIO = field(init=False)
    _hash: StreamHash | None = field(init=False)
    _disk: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1), init=False)
    _flush: Future | None = field(default=None, init=False)
    _waiting: int = field(default=0, init=False)
    _small: bytearray = field(default_factory=bytearray, init=False)

    def __post_init__(self) -> None:
        # unbuffered: most pieces are large, and a copy into a buffer would cost a pass over every byte
        self._file = FileIO(self.path, "w")
        self._hash = StreamHash() if self.hashed else None

    def append(self, data: bytes | memoryview) -> None:
        """Write a piece, which must not change afterwards."""
        if self._hash is not None:
            self._hash.update(data)
        if len(self._small) + len(data) < GATHERED:
            self._small += data
            return
        self._write_small()
        self._write(memoryview(data))
        if self._waiting >= FLUSH and (self._flush is None or self._flush.done()):
            self._flushed()
            self._flush, self._waiting = self._disk.submit(_sync, self._file.fileno()), 0

    def _write_small(self) -> None:
        self._write(memoryview(self._small))
        self._small = bytearray()

    def _write(self, rest: memoryview) -> None:
        self._waiting += len(rest)
        while rest:  # a file may take fewer bytes at once than it is given
            rest = rest[self._file.write(rest) :]

    def _flushed(self) -> None:
        """Wait for a flush on its way; raises what it met, a full disk for one."""
        if self._flush is not None:
            self._flush.result()

    def finish(self) -> str | None:
        """Everything to disk; the SHA-256 in hexadecimal where one is wanted."""
        self._write_small()
        self._flushed()
        self._disk.shutdown()
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
