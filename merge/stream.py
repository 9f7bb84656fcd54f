"""A plan's jobs through bounded memory to disk, block by block, in the plan's order.

Two threads read and compute (numpy lets go of the interpreter), the caller's thread writes. A job's first block is
computed by the caller: it settles what a rule works out once (a table's mean, a fitted map). Jobs that a killed merge
has written whole are passed over, so that no rule may count on another job's having run.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from math import prod

import numpy as np

from jam.byte_bar import byte_bar
from jam.checkpoint import Checkpoint, row_blocks
from jam.errors import CheckpointError
from jam.floats import all_finite, from_float32, not_finite
from jam.shards import ShardWriter, TensorSpec
from merge.plan import Job, Placing, Plan

BLOCK = 1 << 19  # elements; smaller ones stay in a core's cache, and yet cost more (docs/decisions.md)
AHEAD = 8  # blocks computed before the first of them is written: bounds the memory, keeps both threads busy


Piece = tuple[Job, TensorSpec, slice]  # a block of rows of one tensor


def stream(plan: Plan, writer: ShardWriter) -> None:
    """Write every job that is not written yet; the bar counts bytes and is shown on a terminal only.

    Raises CheckpointError for values of a parent that are NaN or infinite, and for values that overflow their type.
    """
    with byte_bar("merging") as progress:
        task = progress.add_task("merging", total=sum(spec.bytes for spec in writer.specs))
        progress.advance(task, sum(spec.bytes for spec in writer.specs if spec.name in writer.written))
        jobs = zip(plan.jobs, writer.specs, strict=True)
        with closing(streamed(pieces(job, spec) for job, spec in jobs if spec.name not in writer.written)) as blocks:
            for spec, stored in blocks:
                writer.append(spec.name, stored)
                progress.advance(task, stored.nbytes)


def pieces(job: Job, spec: TensorSpec) -> Iterator[Piece]:
    """All of one job."""
    return ((job, spec, block) for block in row_blocks(job.shape, BLOCK))


def streamed(work: Iterable[Iterable[Piece]]) -> Iterator[tuple[TensorSpec, np.ndarray]]:
    """Stored blocks in the order of the work; of each group the first is computed by the caller, the others ahead."""
    waiting: deque[tuple[TensorSpec, Future]] = deque()
    with ThreadPoolExecutor(2) as pool:
        try:
            for group in work:
                for number, (job, spec, block) in enumerate(group):
                    future: Future = Future()
                    if number == 0:
                        future.set_result(stored_block(job, spec, block))
                    else:
                        future = pool.submit(stored_block, job, spec, block)
                    waiting.append((spec, future))
                    if len(waiting) > AHEAD:
                        spec, future = waiting.popleft()
                        yield spec, future.result()
            while waiting:
                spec, future = waiting.popleft()
                yield spec, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def stored_block(job: Job, spec: TensorSpec, block: slice) -> np.ndarray:
    """A block of a job's rows as it is stored; values that are only placed, in their own type, are not converted."""
    if isinstance(job.rule, Placing) and job.rule.keeps(spec.dtype):
        return job.rule.place(block, Checkpoint.finite)
    stored = _computed(job, spec, block)
    if not all_finite(stored, spec.dtype):
        blocks = row_blocks(job.shape, BLOCK)
        count = sum(not_finite(_computed(job, spec, rows), spec.dtype) for rows in blocks)
        raise CheckpointError(
            f"tensor {spec.name}: {count} of {prod(job.shape)} values overflow {spec.dtype}; choose dtype=bfloat16 or "
            "float32"
        )
    return stored


def _computed(job: Job, spec: TensorSpec, block: slice) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # values that overflow are counted and refused by name
        return from_float32(job.rule.rows(block), spec.dtype)
