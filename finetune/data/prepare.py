"""A source to a prepared folder (``finetune.data.shards``), restartable after every whole shard.

Stages: the key of the work and the whole shards of a run that was killed -> chunks of tokens in order
(``finetune.data.rendering``) -> shards, each fsynced, renamed and noted in a journal -> source.json -> the folder
appears by rename. A run that goes on begins with the chunk that its last whole shard ended in, and writes the same
bytes as one that was never killed.
"""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from finetune.data.readers.containers import files_of
from finetune.data.rendering import CHUNK, Outcome, Reading, Tokenizers, outcomes_of
from finetune.data.shards import FORMAT, RECORD, Counts, Identity, ShardWriter, dtype_for, read_counts, replace_file
from jam import __version__
from jam.errors import DataError
from jam.journal import JOURNAL, Journal, Lock, Shard, check_parents, partial_folder
from jam.shards import sync_path

LISTED = 20  # bad rows of one error


@dataclass(frozen=True)
class Job:
    """What is prepared, and how.

    Attributes:
        out: the folder to write; it appears when it is whole.
        shard_bytes: of ids in a shard; a longer document has one of its own.
        skip_bad: leave out rows that cannot be used, tell of them and count them; else the first chunk that has some
            ends the work.
        tell: takes a line for the user.
    """

    reading: Reading
    model: Tokenizers
    out: Path
    workers: int = 1
    shard_bytes: int = 10**9
    skip_bad: bool = False
    tell: Callable[[str], None] = lambda line: None

    @cached_property
    def identity(self) -> Identity:
        return Identity.of(self.model.path, self.model.vocabulary, self.model.image)

    @cached_property
    def dtype(self) -> str:
        return dtype_for(self.model.vocabulary)

    def key(self) -> str:
        """What a killed run must have had in common with this one to be gone on with."""
        source, reading = self.reading.source, self.reading
        files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files_of(source)]
        root = None if reading.media_root is None else str(reading.media_root.resolve())
        mapped = None if reading.image_map is None else reading.image_map.stat().st_mtime_ns
        settings = [reading.settings(), self.shard_bytes, self.skip_bad]
        return json.dumps([FORMAT, settings, str(source.resolve()), root, mapped, files, asdict(self.identity)])


@dataclass
class _Progress:
    """Whole shards so far, and the one that is being written."""

    job: Job
    folder: Path
    journal: Journal
    files: list[Shard]
    total: Counts
    writer: ShardWriter = field(init=False)

    def __post_init__(self) -> None:
        self._next()

    def _next(self) -> None:
        self.writer = ShardWriter(self.folder, len(self.files) // 2, self.job.dtype, self.job.model.vocabulary.kinds())

    @property
    def rows(self) -> int:
        """Read and dealt with, those of the open shard included."""
        return self.total.rows + self.writer.counts.rows

    def reach(self, rows: int) -> None:
        self.writer.counts.rows = rows - self.total.rows

    def close(self) -> None:
        """The open shard to disk, and a new one."""
        for shard in self.writer.finish():
            self.journal.add(shard)
            self.files.append(shard)
        counts = self.writer.counts
        self.job.tell(f"{self.writer.name}: {counts.documents:,} documents, {counts.tokens:,} tokens")
        self.total.add(counts)
        self._next()

    def take(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            self.job.tell(f"skipped: {outcome.error}")
            self.writer.counts.skipped += 1
        else:
            size = len(outcome.tokens) * np.dtype(self.job.dtype).itemsize
            if self.writer.bytes and self.writer.bytes + size > self.job.shard_bytes:
                self.close()
            self.writer.add(outcome.tokens, outcome.conversation)
        self.reach(outcome.number + 1)


def prepare(job: Job) -> Counts:
    """Writes a prepared source.

    Raises:
        DataError: bad rows, each with file and line; no documents; a folder that is there already; a full disk.
        JamError: another process writes the same folder.
    """
    out, source = job.out, job.reading.source
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise DataError(f"{out}: exists already; a new or empty folder is required, remove it or choose another")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; give data that is there")
    check_parents(out)
    key = job.key()
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    lock = Lock(out)
    lock.acquire()
    try:
        folder = partial_folder(out)
        files = _kept(folder, key)
        journal = Journal(folder)
        (folder / JOURNAL).unlink(missing_ok=True)
        journal.start(key, files)
        total = Counts()
        for index in sorted(folder.glob("shard-*.idx")):
            total.add(read_counts(index))
        if files:
            job.tell(f"going on after {len(files) // 2} whole shards with {total.documents:,} documents")
        progress = _Progress(job, folder, journal, files, total)
        try:
            _read(job, progress)
        finally:
            progress.writer.drop()
        _finish(job, progress)
    except OSError as error:  # what Python writes behind a buffer names no file
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DataError(
            f"{out}: could not be written ({error.strerror}); room on its disk is required, whole shards stay; free "
            "space and run again to go on after them"
        ) from error
    finally:
        lock.release()
    return progress.total


def _kept(folder: Path, key: str) -> list[Shard]:
    """Whole shards of an earlier run, from the first on without a gap; everything else there is removed."""
    found = {shard.name: shard for shard in Journal(folder).read(key) or []}
    kept: list[Shard] = []
    while {f"shard-{len(kept) // 2:05d}.bin", f"shard-{len(kept) // 2:05d}.idx"} <= found.keys():
        kept += [found[f"shard-{len(kept) // 2:05d}.{end}"] for end in ("bin", "idx")]
    if not kept:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for path in folder.iterdir():
        if path.name not in {shard.name for shard in kept}:
            path.unlink()
    return kept


def _read(job: Job, progress: _Progress) -> None:
    """Everything that is not in a whole shard yet, into shards."""
    start = progress.rows // CHUNK * CHUNK
    for end, outcomes in outcomes_of(job.reading, job.model, job.workers, start):
        new = [outcome for outcome in outcomes if outcome.number >= progress.rows]
        bad = [outcome.error for outcome in new if outcome.error and (outcome.torn or not job.skip_bad)]
        if bad:
            more = [f"... and {len(bad) - LISTED} more up to row {end}"] if len(bad) > LISTED else []
            raise DataError("\n".join([*bad[:LISTED], *more]))
        for outcome in new:
            progress.take(outcome)
        progress.reach(end)
    if progress.writer.counts.documents:
        progress.close()
    elif not progress.files:
        raise DataError(f"{job.reading.source}: no documents; at least one is required")
    else:
        progress.total.add(progress.writer.counts)  # rows at the end that were left out


def _finish(job: Job, progress: _Progress) -> None:
    """source.json, and the folder under its name."""
    record = {
        "format": FORMAT,
        "jam": __version__,
        "dtype": job.dtype,
        "hashes": asdict(job.identity),
        "reader": job.reading.settings(),
        "counts": asdict(progress.total),
        "files": [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in progress.files],
    }
    progress.writer.drop()
    replace_file(progress.folder / RECORD, (json.dumps(record, indent=2) + "\n").encode())
    (progress.folder / JOURNAL).unlink()
    sync_path(progress.folder)
    os.rename(progress.folder, job.out)
    sync_path(job.out.absolute().parent)
