"""Writing checkpoint folders: tensors stream into safetensors shards, and the folder appears when whole.

``ShardWriter`` fills the shards block of rows by block of rows in a hidden folder beside the target, puts everything
on disk and renames the folder. Whatever ends the process before, nothing stands under the final name. The next writer
of the same target goes on after the last whole shard if it does the same work, and else removes what a killed one left
(``jam.journal``). Knows nothing of models; torch is not imported.
"""

import errno
import glob
import json
import os
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType

import numpy as np

from jam.checkpoint import WEIGHTS, Checkpoint, row_blocks, write_json
from jam.digest import sha256_of
from jam.errors import CheckpointError, JamError
from jam.floats import STORED, all_finite, from_float32, not_finite
from jam.journal import Journal, Lock, Shard, partial_folder
from jam.shard_file import ShardFile

SHARD_BYTES = 5_000_000_000  # a shard's greatest size; one tensor may be larger
_FULL = (errno.ENOSPC, errno.EDQUOT)
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
_INTERRUPTS = (KeyboardInterrupt, SystemExit)


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

    Use as a context manager; ``write`` takes the tensors in the order of ``specs`` without those in ``written``, each
    as consecutive blocks of rows; other files go into ``folder``; ``finish`` checks, fsyncs and renames. Leaving
    without ``finish`` removes all; an interrupt under a ``key`` leaves whole shards for the next writer, and so does a
    target that somebody else has filled meanwhile.

    Args:
        out: the final folder, which must not exist or be empty.
        specs: every tensor, in writing order.
        side_bytes: room that other files will need, for the check before the first byte.
        key: names the work with everything that decides its bytes. Shards that a killed writer under the same key has
            finished are kept, and their tensors are ``written``; None keeps nothing.
        hashed: work out every shard's SHA-256 on a thread of its own; they are in ``digests`` after ``close``.

    Raises:
        JamError: ``out`` is taken, another process writes it, or the disk is full or too small.
        OSError: the machine refuses for another reason.
    """

    out: Path
    specs: Sequence[TensorSpec]
    shard_bytes: int = SHARD_BYTES
    side_bytes: int = 0
    weights_name: str = WEIGHTS
    key: str | None = None
    hashed: bool = False
    folder: Path = field(init=False)
    written: set[str] = field(default_factory=set, init=False)
    digests: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        # a link to a folder stands for the folder, which the rename has to meet
        self.out = Path(os.path.realpath(self.out) if self.out.is_dir() else os.path.abspath(self.out))
        check_output(self.out)
        self.folder = partial_folder(self.out)
        self.shards = self._plan_shards()
        self._lock, self._journal = Lock(self.out), Journal(self.folder)
        self._file: ShardFile | None = None
        self._queue = iter([(name, spec) for name, specs in self.shards.items() for spec in specs])
        self._shard, self._spec, self._rows = "", None, 0
        self._taken = False

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
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        try:
            check_output(self.out)  # another writer may have finished since
            remove_stale(self.out)
            kept = self._kept()
            needed = self._bytes() + self.side_bytes
            free = shutil.disk_usage(self.out.parent).free
            if needed > free:
                raise self._full(needed, free, f"{len(kept)} whole shards are kept" if kept else "nothing was written")
            self.folder.mkdir(exist_ok=True)
            if self.key is not None:
                self._journal.start(self.key, kept)
        except BaseException as error:
            goes_on = isinstance(error, _INTERRUPTS) and self.key is not None and self._journal.read(self.key)
            if self.folder.is_dir() and not self.written and not goes_on:
                _remove(self.folder)
            self._lock.release()
            raise
        return self

    def _kept(self) -> list[Shard]:
        """The shards that stay from a killed writer of the same work; everything else of it is removed."""
        if not self.folder.is_dir() and not self.folder.is_symlink():
            return []
        own = self.key is not None and not self.folder.is_symlink()
        found = self._journal.read(self.key) if own else None
        if found is None:
            print(f"{self.out}: other work under this name was left unfinished; starting anew", file=sys.stderr)
        kept = [shard for shard in found or [] if shard.name in self.shards and self._holds(shard)]
        if not kept:
            _remove(self.folder)
            return []
        names = {shard.name for shard in kept} | {self._journal.path.name}
        for entry in self.folder.iterdir():
            if entry.name not in names:
                _remove(entry)
        self.written = {spec.name for shard in kept for spec in self.shards[shard.name]}
        self.digests = {shard.name: shard.sha256 for shard in kept if shard.sha256 is not None}
        queue = [item for item in self._queue if item[1].name not in self.written]
        self._queue = iter(queue)
        print(f"{self.out}: going on after {len(kept)} of {len(self.shards)} shards", file=sys.stderr)
        return kept

    def _holds(self, shard: Shard) -> bool:
        """Whether a shard is the one planned; with its hash where hashes are wanted, which is then checked."""
        header = _header(self.shards[shard.name])
        file = self.folder / shard.name
        if shard.bytes != len(header) + sum(spec.bytes for spec in self.shards[shard.name]):
            return False
        with file.open("rb") as stream:
            if stream.read(len(header)) != header:
                return False
        return not self.hashed or shard.sha256 == sha256_of(file)

    def _bytes(self) -> int:
        """Bytes of the tensors that are still to be written."""
        return sum(spec.bytes for spec in self.specs if spec.name not in self.written)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._file is not None:
                self._file.drop()
            if self.folder.is_dir() and not self._taken:
                if isinstance(error, _INTERRUPTS) and self.key is not None and self.written:
                    whole = sum(specs[-1].name in self.written for specs in self.shards.values())
                    print(f"{self.folder}: {whole} whole shards are kept; the same command goes on", file=sys.stderr)
                else:
                    _remove(self.folder)
            if isinstance(error, OSError) and error.errno in _FULL:
                self.written = set()  # all is removed, so that all of it must find room
                needed, free = self._bytes() + self.side_bytes, shutil.disk_usage(self.out.parent).free
                if needed > free:  # else a quota or a lack of inodes, of which the machine's own words say more
                    raise self._full(needed, free, "nothing is left") from None
        finally:
            self._lock.release()

    def _full(self, needed: int, free: int, state: str) -> JamError:
        return JamError(
            f"{self.out}: disk full, {needed} bytes are needed and {free} are free; {state}, free space or choose "
            "another output folder"
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
        self._file.append(np.ascontiguousarray(stored).reshape(-1).view(np.uint8).data)
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
            self._file = ShardFile(self.folder / shard, self.hashed)
            self._file.append(_header(self.shards[shard]))

    def _close_shard(self) -> None:
        if self._file is not None:
            sha256 = self._file.finish()
            self._file = None
            if sha256 is not None:
                self.digests[self._shard] = sha256
            if self.key is not None:
                sync_path(self.folder)
                self._journal.add(Shard.of(self.folder / self._shard, sha256))
            self.written |= {spec.name for spec in self.shards[self._shard]}

    def close(self) -> None:
        """The last shard to disk, and the index: every tensor must have been written."""
        assert self._spec is None and next(self._queue, None) is None, "a tensor was not written whole"
        self._close_shard()
        if len(self.shards) > 1:
            mapping = {spec.name: shard for shard, specs in self.shards.items() for spec in specs}
            total = sum(spec.bytes for spec in self.specs)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(mapping.items()))}
            write_json(self.folder / f"{self.weights_name}.index.json", index)

    def finish(self) -> None:
        """Everything to disk, then the folder under its name. Raises CheckpointError when that name was taken since."""
        self.close()
        sync_tree(self.folder, self.shards)
        shards = [Shard.of(self.folder / name, self.digests.get(name)) for name, specs in self.shards.items() if specs]
        self._journal.path.unlink(missing_ok=True)
        try:
            os.rename(self.folder, self.out)  # replaces an empty folder, fails on a filled one
        except OSError as error:
            if error.errno not in _TAKEN:
                raise
            state = "nothing is left, empty it and run the same command again"
            if self.key is not None:
                self._journal.start(self.key, shards)
                self._taken = True
                state = f"all {len(shards)} whole shards are kept, empty it and the same command goes on"
            raise CheckpointError(
                f"{self.out}: the output was filled during the work; an empty or new folder is required, {state}"
            ) from None
        sync_path(self.out.parent)


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
        file.write(header_of(sizes))
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
    if "\0" in str(out):
        raise CheckpointError(f"{str(out)!r}: a NUL, which no path may hold; remove it")
    if out.is_dir():
        if found := sorted(out.iterdir()):
            raise CheckpointError(
                f"{out}: the output folder is not empty (it holds {found[0].name}); a new or empty one is required, "
                "remove it or choose another"
            )
        if os.path.ismount(os.path.realpath(out)):  # which no rename replaces
            raise CheckpointError(f"{out}: the output is a mount point; a new folder is required, choose one inside it")
    elif out.exists() or out.is_symlink():
        raise CheckpointError(f"{out}: the output is a file; an empty or new folder is required, choose another name")


def remove_stale(out: Path) -> None:
    """Remove what killed writers of ``out`` left behind: temporary siblings whose process is gone."""
    for folder in out.parent.glob(f".{glob.escape(out.name)}.tmp-*"):
        pid = folder.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            _remove(folder)


def _remove(path: Path) -> None:
    """Whatever lies at ``path``, if anything; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _header(specs: Sequence[TensorSpec]) -> bytes:
    return header_of({spec.name: (spec.dtype, spec.shape, spec.bytes) for spec in specs})


def header_of(sizes: Mapping[str, tuple[str, tuple[int, ...], int]]) -> bytes:
    """A file's header from type, shape and bytes of its tensors in their order."""
    raw: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, length) in sizes.items():
        raw[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + length]}
        at += length
    text = json.dumps(raw, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
    return len(text).to_bytes(8, "little") + text


def sync_tree(folder: Path, done: Collection[str] = ()) -> None:
    """fsync every file and folder below ``folder``, itself included; files of the names in ``done`` are on disk.

    Files are synced side by side: on a busy disk each waits for the file system's journal, and so they wait together.
    """
    folders = [Path(parent) for parent, _, _ in os.walk(folder)]
    files = [file for parent in folders for file in parent.iterdir() if file.is_file() and file.name not in done]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(sync_path, files))
        list(pool.map(sync_path, folders))


def sync_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
