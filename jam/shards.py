"""Writing checkpoint folders: tensors stream into safetensors shards, and the folder appears when whole.

``ShardWriter`` fills the shards block of rows by block of rows in a temporary folder beside the target, puts everything
on disk and renames the folder. Whatever ends the process before, nothing stands under the final name; the next
writer of the same target removes what a killed one left. Knows nothing of models; torch is not imported.
"""

import contextlib
import errno
import glob
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from jam.checkpoint import WEIGHTS, Checkpoint, row_blocks, write_json
from jam.errors import CheckpointError, JamError
from jam.floats import STORED, all_finite, from_float32, not_finite

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return prod(self.shape) * STORED[self.dtype].itemsize


@dataclass
class ShardWriter:
    """Streams tensors into a folder that appears under its name only when whole.

    Use as a context manager; ``write`` takes the tensors in the order of ``specs``, each as consecutive blocks of rows;
    other files go into ``folder``; ``finish`` checks, fsyncs and renames. Leaving without ``finish`` removes all.

    Args:
        out: the final folder, which must not exist or be empty.
        specs: every tensor, in writing order.
        side_bytes: room that other files will need, for the check before the first byte.

    Raises:
        JamError: ``out`` is taken, or the disk is full or too small; nothing is left then.
    """

    out: Path
    specs: Sequence[TensorSpec]
    shard_bytes: int = 5_000_000_000
    side_bytes: int = 0
    weights_name: str = WEIGHTS
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.out = Path(os.path.abspath(self.out))
        check_output(self.out)
        self.folder = self.out.with_name(f".{self.out.name}.tmp-{os.getpid()}")
        self.shards = self._plan_shards()
        self._file: BinaryIO | None = None
        self._queue = iter([(name, spec) for name, specs in self.shards.items() for spec in specs])
        self._shard, self._spec, self._rows = "", None, 0

    def _plan_shards(self) -> dict[str, list[TensorSpec]]:
        groups: list[list[TensorSpec]] = [[]]
        filled = 0
        for spec in self.specs:
            if groups[-1] and filled + spec.bytes > self.shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(spec)
            filled += spec.bytes
        if len(groups) == 1:
            return {self.weights_name: groups[0]}
        stem = self.weights_name.removesuffix(".safetensors")
        count = len(groups)
        return {f"{stem}-{at:05d}-of-{count:05d}.safetensors": group for at, group in enumerate(groups, 1)}

    def __enter__(self) -> "ShardWriter":
        remove_stale(self.out)
        needed = sum(spec.bytes for spec in self.specs) + self.side_bytes
        self.out.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.out.parent).free
        if needed > free:
            raise self._full(needed, free)
        self.folder.mkdir()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a full disk fails once more here; the bytes are given up anyway
                self._file.close()
        if self.folder.is_dir():
            shutil.rmtree(self.folder)
        if isinstance(error, OSError) and error.errno in _FULL:
            needed = sum(spec.bytes for spec in self.specs) + self.side_bytes
            raise self._full(needed, shutil.disk_usage(self.out.parent).free) from None

    def _full(self, needed: int, free: int) -> JamError:
        return JamError(
            f"{self.out}: disk full, {needed} bytes are needed and {free} are free; "
            "nothing was written, free space or choose another output folder"
        )

    def write(self, name: str, rows: np.ndarray) -> None:
        """Append float32 ``rows`` (a block along the first axis; 0-d for a scalar) to tensor ``name``.

        Raises:
            CheckpointError: values overflow the tensor's type.
        """
        spec = self._current(name)
        self.append(name, encode(rows, spec))

    def append(self, name: str, stored: np.ndarray) -> None:
        """Append rows in the tensor's own type, as ``encode`` gives them or as another file has them."""
        spec = self._current(name)
        assert stored.shape[1:] == spec.shape[1:] and stored.ndim == len(spec.shape), (name, stored.shape, spec.shape)
        assert stored.dtype == STORED[spec.dtype], (name, stored.dtype, spec.dtype)
        self._file.write(np.ascontiguousarray(stored).data)
        self._rows += len(stored) if spec.shape else 1
        if self._rows == (spec.shape[0] if spec.shape else 1):
            self._spec, self._rows = None, 0

    def _current(self, name: str) -> TensorSpec:
        if self._spec is None:
            self._next()
        assert self._spec is not None and self._spec.name == name, (name, self._spec)
        return self._spec

    def _next(self) -> None:
        shard, self._spec = next(self._queue)
        if shard != self._shard:
            self._close_shard()
            self._shard = shard
            self._file = (self.folder / shard).open("wb")
            self._file.write(_header(self.shards[shard]))

    def _close_shard(self) -> None:
        if self._file is not None:
            _fsync(self._file)
            self._file.close()
            self._file = None

    def finish(self) -> None:
        """Everything to disk, then the folder under its name."""
        assert self._spec is None and next(self._queue, None) is None, "a tensor was not written whole"
        self._close_shard()
        if len(self.shards) > 1:
            mapping = {spec.name: shard for shard, specs in self.shards.items() for spec in specs}
            total = sum(spec.bytes for spec in self.specs)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(mapping.items()))}
            write_json(self.folder / f"{self.weights_name}.index.json", index)
        sync_tree(self.folder)
        os.rename(self.folder, self.out)  # replaces an empty folder, fails on a filled one
        _fsync_folder(self.out.parent)


def copy_tensors(source: Checkpoint, folder: Path, rows: Mapping[str, np.ndarray]) -> None:
    """A checkpoint's configuration and tensors, bit for bit, as ``config.json`` and one ``model.safetensors``.

    Args:
        folder: made if absent.
        rows: tensors whose rows are written in another order, and that order.

    Raises:
        CheckpointError: NaN or infinite values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", source.config)
    sizes = {name: (info.dtype, info.shape, info.end - info.begin) for name, info in source.tensors.items()}
    with (folder / WEIGHTS).open("wb") as file:
        file.write(_header_of(sizes))
        for name, info in source.tensors.items():
            if name in rows:
                file.write(source.finite(name)[rows[name]].data)
            elif info.dtype in STORED:
                for block in row_blocks(info.shape):
                    file.write(source.finite(name, block).data)
            else:  # counters of whole numbers
                with info.file.open("rb") as stored:
                    stored.seek(info.begin)
                    file.write(stored.read(info.end - info.begin))


def encode(rows: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """float32 rows in a tensor's own type. Raises CheckpointError when values overflow it."""
    stored = from_float32(rows, spec.dtype)
    if not all_finite(stored, spec.dtype):
        raise CheckpointError(
            f"tensor {spec.name}: {not_finite(stored, spec.dtype)} values overflow {spec.dtype}; choose dtype=bfloat16 "
            "or float32"
        )
    return stored


def check_output(out: Path) -> None:
    """Raises CheckpointError unless ``out`` can become a new folder: absent, or an empty folder."""
    if out.is_dir():
        if found := sorted(out.iterdir()):
            raise CheckpointError(
                f"{out}: the output folder is not empty (it holds {found[0].name}); a new or empty one is required, "
                "remove it or choose another"
            )
    elif out.exists() or out.is_symlink():
        raise CheckpointError(f"{out}: the output is a file; an empty or new folder is required, choose another name")


def remove_stale(out: Path) -> None:
    """Remove what killed writers of ``out`` left behind: temporary siblings whose process is gone."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.tmp-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(folder)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _header(specs: Sequence[TensorSpec]) -> bytes:
    return _header_of({spec.name: (spec.dtype, spec.shape, spec.bytes) for spec in specs})


def _header_of(sizes: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """A file's header from type, shape and bytes of its tensors in their order."""
    raw: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, length) in sizes.items():
        raw[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(raw, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
    return len(text).to_bytes(8, "little") + text


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below ``folder``, itself included."""
    for parent, _, files in os.walk(folder):
        for name in files:
            with open(os.path.join(parent, name), "rb") as file:
                os.fsync(file.fileno())
        _fsync_folder(Path(parent))


def _fsync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
