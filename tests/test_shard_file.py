"""Weights on their way to disk: every byte, whatever the file system thinks of direct writes."""

import errno
import hashlib
import os
from collections.abc import Callable
from io import FileIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from jam import shard_file
from jam.shard_file import PAST_CACHE, ROOM, ShardFile


class NoDirectOpen(FileIO):
    """A file system that refuses the flag."""

    def __init__(self, path: Path, mode: str, opener: Callable | None = None) -> None:
        if opener is not None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        super().__init__(path, mode)


class NoDirectWrite(FileIO):
    """A disk whose blocks are larger than a page: takes one room, then refuses a direct write."""

    rooms = 0

    def write(self, data: memoryview) -> int:
        direct = shard_file.fcntl.fcntl(self, shard_file.fcntl.F_GETFL) & PAST_CACHE
        self.rooms += 1
        if direct and self.rooms > 1:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return super().write(data)


class ShortWrite(FileIO):
    """Takes less than it is given, and an odd number of bytes."""

    def write(self, data: memoryview) -> int:
        return super().write(data[: max(1, len(data) - 4097)])


def written(path: Path, pieces: list[bytes], hashed: bool = True) -> str | None:
    file = ShardFile(path, hashed)
    for piece in pieces:
        file.append(piece)
    return file.finish()


@pytest.mark.parametrize("kind", [FileIO, NoDirectOpen, NoDirectWrite, ShortWrite])
@pytest.mark.parametrize("size", [0, 1, 4096, ROOM - 1, ROOM, ROOM + 1, 3 * ROOM + 8192, 3 * ROOM + 5])
def test_every_byte_arrives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type, size: int):
    monkeypatch.setattr(shard_file, "FileIO", kind)
    random = np.random.default_rng(size)
    data = random.bytes(size)
    cuts = [0, *sorted(random.integers(0, size + 1, 6).tolist()), size]
    pieces = [data[start:stop] for start, stop in pairwise(cuts)]
    assert written(tmp_path / "file", pieces) == hashlib.sha256(data).hexdigest()
    assert (tmp_path / "file").read_bytes() == data


def test_a_longer_file_of_the_name_leaves_nothing(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    assert written(tmp_path / "file", [b"new"], hashed=False) is None
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EINVAL])
def test_what_a_write_meets_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    class Full(FileIO):
        def write(self, data: memoryview) -> int:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shard_file, "FileIO", Full)
    file = ShardFile(tmp_path / "file", hashed=True)
    with pytest.raises(OSError) as caught:
        for _ in range(3):
            file.append(bytes(ROOM))
    assert caught.value.errno == number
    file.drop()


def test_an_open_that_is_refused_for_another_reason_is_raised(tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        ShardFile(tmp_path / "no folder" / "file", hashed=False)
