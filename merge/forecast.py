"""What a merge will cost, from doing a little of it: bytes, memory, and time on this machine.

Blocks at equal distances over the whole plan are computed by the very stream that a merge uses and written to an
unnamed file on the output's disk, which vanishes. Time grows with bytes from there. It is an estimate: a page cache
that is warm or cold, and other work on the machine, move it.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jam.checkpoint import row_blocks
from jam.digest import sha256_rate
from jam.memory import anonymous_bytes
from jam.shard_file import ShardFile
from jam.shards import TensorSpec
from merge.cross import SharedTable
from merge.plan import Job, Plan
from merge.rows import Table
from merge.stream import BLOCK, Piece, stored_block, streamed

BLOCKS = 256  # blocks of a sample: enough to even out a disk, few enough for a fraction of a second


@dataclass(frozen=True)
class Forecast:
    """``seconds`` is None with ``reason`` where no sample can stand for the work."""

    read: int
    write: int
    memory: int | None
    seconds: float | None
    sampled: int
    reason: str = ""


def forecast(plan: Plan, specs: list[TensorSpec], read: int, folder: Path, hashed: bool, started: float) -> Forecast:
    """Do a sample of the plan's work.

    Args:
        read: bytes of the input files.
        folder: where the sample is written; an existing one on the output's disk.
        hashed: whether every byte is hashed too.
        started: seconds that this process has lived, which a merge spends too.
    """
    write = sum(spec.bytes for spec in specs)
    if write > shutil.disk_usage(folder).free:
        return Forecast(read, write, anonymous_bytes(), None, 0, "the disk is too small")
    if any(isinstance(job.rule, SharedTable) for job in plan.jobs):
        reason = "cross.tables=shared solves for a whole table at once"
        return Forecast(read, write, None, None, 0, reason)
    pairs = list(zip(plan.jobs, specs, strict=True))
    chosen, began = list(_sample(pairs)), time.perf_counter()
    for job, spec in {job.name: (job, spec) for job, spec, _ in chosen}.values():
        if any(isinstance(part, Table) for part in vars(job.rule).values()):  # it reads the whole table once
            stored_block(job, spec, slice(0, 1))
    once = time.perf_counter() - began
    seconds, sampled = _timed(chosen, folder, write)
    seconds += started + once
    if hashed:
        seconds += (read + write) / sha256_rate() / min(2, os.cpu_count() or 1)
    return Forecast(read, write, anonymous_bytes(), seconds, sampled)


def _timed(sample: list[Piece], folder: Path, write: int) -> tuple[float, int]:
    """Seconds that writing so many bytes would take, and the sample's bytes.

    Threads, fresh memory and the last flush cost once; only what the later blocks took grows with the bytes.
    """
    began, done = time.perf_counter(), 0
    marks = []  # seconds and bytes when a block is handed on
    file = _unnamed(folder)
    try:
        for _, stored in streamed([sample]):
            file.append(stored.reshape(-1).view("u1").data)
            done += stored.nbytes
            marks.append((time.perf_counter() - began, done))
        file.finish()
    finally:
        file.drop()
    whole = time.perf_counter() - began
    (warm, before), (last, _) = marks[len(marks) // 4], marks[-1]
    if before == done:
        return whole * write / done, done
    rate = (last - warm) / (done - before)
    return whole - last + warm + rate * (write - before), done


def _unnamed(folder: Path) -> ShardFile:
    """A file without a name, which vanishes with this process whatever ends it."""
    handle, name = tempfile.mkstemp(dir=folder)
    os.close(handle)
    try:
        return ShardFile(Path(name), hashed=False)
    finally:
        os.unlink(name)


def _sample(pairs: list[tuple[Job, TensorSpec]]) -> Iterator[Piece]:
    """Blocks at equal distances over the plan's bytes, each once."""
    total = sum(spec.bytes for _, spec in pairs)
    wanted, at, number = max(1, total // BLOCKS), 0, 0
    for job, spec in pairs:
        for block in row_blocks(job.shape, BLOCK):
            begin = at
            at += spec.bytes * (block.stop - block.start) // (job.shape[0] if job.shape else 1)
            if begin <= number * wanted < at:
                number = at // wanted + 1
                yield job, spec, block
