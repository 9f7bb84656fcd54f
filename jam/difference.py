"""A trained model as its base plus a difference: one safetensors file with what training changed.

A fused model of shipped parents repeats every weight that they already hold; what is worth storing is the change. The
file holds ``tuned - base`` for each tensor that differs, as bfloat16 or as 8-bit whole numbers with one scale a row (of
a tensor of which few rows differ, those rows alone), and in its header the digest of the base, so that it is never laid
over another. ``apply_difference`` streams base + difference, in float32, to a new folder in the base's own types. The
result is the tuned model up to rounding, not bit for bit. Knows nothing of models; torch is not imported.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from jam.checkpoint import INDEX, WEIGHTS, Checkpoint, open_checkpoint, row_blocks
from jam.errors import CheckpointError
from jam.floats import STORED, from_float32, not_finite, to_float32
from jam.header import TensorInfo, read_header
from jam.shards import ShardWriter, TensorSpec

FORMAT = "jam-difference-1"
SCALE = "::scale"  # suffix of the scales of an 8-bit tensor, float32 [rows]
ROWS = "::rows"  # suffix of the numbers of the rows that are stored, int64, rising; all rows without it
Precision = Literal["bfloat16", "int8"]
_BYTES = {"I8": 1, "BF16": 2, "F32": 4, "I64": 8}


def write_difference(base: Path, tuned: Path, out: Path, precision: Precision = "bfloat16") -> dict:
    """Write ``tuned - base`` to the file ``out``, which appears when whole.

    Args:
        base, tuned: checkpoint folders with the same tensors.
        precision: "bfloat16" keeps 8 bits of each change; "int8" half the bytes, with steps of the row's largest change
            over 127.

    Returns:
        Figures: tensors, changed, bytes, base (digest), relative_error (norm of what rounding loses over the norm of
        the change).

    Raises:
        CheckpointError: a damaged folder, unequal tensors, or a difference that overflows.
    """
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    _check_alike(before, after)
    found = {name: _changed_rows(before, after, name) for name in before.tensors}
    changed = {name: rows for name, rows in found.items() if rows.size}
    entries: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, rows in changed.items():
        shape = before.tensors[name].shape
        if 2 * len(rows) <= (shape[0] if shape else 1):
            shape = (len(rows), *shape[1:])
            entries[name + ROWS] = ("I64", (len(rows),))
        if precision == "int8":
            entries[name] = ("I8", shape)
            entries[name + SCALE] = ("F32", (shape[0] if shape else 1,))
        else:
            entries[name] = ("BF16", shape)
    digest = before.digest()
    header = _header(entries, {"format": FORMAT, "base": digest, "precision": precision})
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    lost = total = 0.0
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(header)
            for name, rows in changed.items():
                if name + ROWS in entries:
                    file.write(rows.astype("<i8").data)
                kept = rows if name + ROWS in entries else None
                for error, size in _write_tensor(file, before, after, name, kept, precision):
                    lost, total = lost + error, total + size
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return {
        "tensors": len(before.tensors),
        "changed": len(changed),
        "bytes": out.stat().st_size,
        "base": digest,
        "relative_error": (lost / total) ** 0.5 if total else 0.0,
    }


def apply_difference(base: Path, difference: Path, out: Path) -> Path:
    """Write base + difference as a checkpoint folder ``out`` with the base's types and side files.

    Raises:
        CheckpointError: a damaged input, a difference made for another base, or ``out`` not empty.
        JamError: the disk is full.
    """
    checkpoint, stored = open_checkpoint(base), _open(difference)
    if stored.base != (found := checkpoint.digest()):
        raise CheckpointError(
            f"{difference}: made for base {stored.base[:12]}, {base} is {found[:12]}; the very same base is required, "
            "merge it again with the recipe and version that it was made with"
        )
    specs = [TensorSpec(info.name, info.dtype, info.shape) for info in checkpoint.tensors.values()]
    sides = _side_files(checkpoint)
    with ShardWriter(out, specs, side_bytes=sum(file.stat().st_size for file in sides)) as writer:
        for spec in specs:
            for block in row_blocks(spec.shape):
                rows = checkpoint.read(spec.name, block)
                writer.write(
                    spec.name,
                    rows + stored.rows(spec.name, block, spec.shape[1:]) if spec.name in stored.tensors else rows,
                )
        for file in sides:
            target = writer.folder / file.relative_to(checkpoint.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        writer.finish()
    return out


@dataclass(frozen=True)
class _Difference:
    base: str
    tensors: dict[str, TensorInfo]

    def rows(self, name: str, block: slice, width: tuple[int, ...]) -> np.ndarray:
        """float32 change of a block of rows, each of shape ``width``."""
        if name + ROWS not in self.tensors:
            return self._stored(name, block)
        info = self.tensors[name + ROWS]
        numbers = _stored_rows(info, slice(0, info.shape[0]), np.dtype("<i8"))
        first, last = np.searchsorted(numbers, [block.start, block.stop]).tolist()
        result = np.zeros((block.stop - block.start, *width), np.float32)
        if first < last:
            result[numbers[first:last] - block.start] = self._stored(name, slice(first, last))
        return result

    def _stored(self, name: str, block: slice) -> np.ndarray:
        info = self.tensors[name]
        if info.dtype != "I8":
            return to_float32(_stored_rows(info, block, STORED[info.dtype]), info.dtype)
        scales = _stored_rows(self.tensors[name + SCALE], block, STORED["F32"])
        whole = _stored_rows(info, block, np.dtype("i1")).astype(np.float32)
        return whole * scales.reshape(-1, *[1] * (whole.ndim - 1)) if whole.ndim else whole * scales[0]


def _stored_rows(info: TensorInfo, block: slice, dtype: np.dtype) -> np.ndarray:
    shape = (block.stop - block.start, *info.shape[1:]) if info.shape else ()
    offset = info.begin + block.start * prod(info.shape[1:]) * dtype.itemsize
    return np.fromfile(info.file, dtype, prod(shape), offset=offset).reshape(shape)


def _open(file: Path) -> _Difference:
    if not file.is_file():
        raise CheckpointError(f"{file}: no such difference file; restore it or use a whole checkpoint")
    tensors = {info.name: info for info in read_header(file)}
    with file.open("rb") as stream:
        metadata = json.loads(stream.read(int.from_bytes(stream.read(8), "little"))).get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"{file}: format {metadata.get('format')!r}; {FORMAT} is required, make it with this version"
        )
    return _Difference(metadata["base"], tensors)


def _check_alike(before: Checkpoint, after: Checkpoint) -> None:
    for name in sorted(before.tensors.keys() ^ after.tensors.keys()):
        has, lacks = (before, after) if name in before.tensors else (after, before)
        raise CheckpointError(f"{lacks.path}: no tensor {name}, which {has.path} has; both must be the same model")
    for name, info in before.tensors.items():
        if info.shape != after.tensors[name].shape:
            raise CheckpointError(
                f"{after.path}: tensor {name} is {list(after.tensors[name].shape)}, in {before.path} "
                f"{list(info.shape)}; both must be the same model"
            )


def _changed_rows(before: Checkpoint, after: Checkpoint, name: str) -> np.ndarray:
    """int64, the numbers of the rows that differ, in order; a scalar is one row."""
    found = []
    for block in row_blocks(before.tensors[name].shape):
        ours, theirs = before.read(name, block), after.read(name, block)
        differs = (ours != theirs).reshape(block.stop - block.start, -1).any(axis=1)
        found.append(block.start + np.flatnonzero(differs))
    return np.concatenate(found)


def _write_tensor(
    file: BinaryIO, before: Checkpoint, after: Checkpoint, name: str, chosen: np.ndarray | None, precision: Precision
) -> Iterator[tuple[float, float]]:
    """Write one tensor, or the chosen rows of it; yields (squared loss, squared size) of every block."""
    scales = []
    for block in row_blocks(before.tensors[name].shape):
        change = after.read(name, block) - before.read(name, block)
        if chosen is not None:
            change = change[chosen[(chosen >= block.start) & (chosen < block.stop)] - block.start]
            if not len(change):
                continue
        if precision == "int8":
            rows = change.reshape(len(change) if change.ndim else 1, -1)
            scale = np.abs(rows).max(axis=1) / np.float32(127)
            whole = np.rint(np.divide(rows, scale[:, None], where=scale[:, None] > 0, out=np.zeros_like(rows)))
            scales.append(scale)
            file.write(whole.astype("i1").data)
            kept = (whole * scale[:, None]).reshape(change.shape)
        else:
            stored = from_float32(change, "BF16")
            if count := not_finite(stored, "BF16"):
                raise CheckpointError(
                    f"tensor {name}: {count} differences overflow bfloat16; the training has diverged"
                )
            file.write(np.ascontiguousarray(stored).data)
            kept = to_float32(stored, "BF16")
        yield float(np.square(kept - change, dtype=np.float64).sum()), float(np.square(change, dtype=np.float64).sum())
    if scales:
        file.write(np.concatenate(scales).astype("<f4").data)


def _header(entries: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    raw: dict = {"__metadata__": metadata}
    at = 0
    for name, (dtype, shape) in entries.items():
        size = prod(shape) * _BYTES[dtype]
        raw[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(raw, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _side_files(checkpoint: Checkpoint) -> list[Path]:
    """Every file of a checkpoint folder but its own weights."""
    weights = {info.file for info in checkpoint.tensors.values()} | {
        checkpoint.path / name for name in (WEIGHTS, INDEX)
    }
    return sorted(file for file in checkpoint.path.rglob("*") if file.is_file() and file not in weights)
