"""Reading checkpoint folders: headers first, tensors by slices. Writing them is ``jam.shards``.

``open_checkpoint`` parses config.json and the safetensors headers alone and proves from them and from the file sizes
that every tensor is whole; ``Checkpoint.read`` then yields float32 rows and refuses NaN and infinity.

Bounded memory: nothing here holds more than the rows asked for. No pickle is ever opened, and torch is not imported.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path

import numpy as np

from jam.errors import CheckpointError
from jam.floats import STORED, all_finite, not_finite, to_float32

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK = 1 << 17  # elements that a streaming step reads at once: as float32 they stay in a core's cache
_MAX_HEADER = 100 << 20  # the format's own limit
_ITEM_BYTES = {
    **{name: dtype.itemsize for name, dtype in STORED.items()},
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4},
    **{"U64": 8, "I64": 8},
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``begin`` and ``end`` are byte offsets in ``file``."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose headers are sound. ``tensors`` is in the order of the names."""

    path: Path
    config: dict
    tensors: dict[str, TensorInfo]
    _files: dict[Path, FileIO] = field(default_factory=dict, repr=False, compare=False)  # open while this object lives

    @property
    def parameters(self) -> int:
        return sum(prod(info.shape) for info in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        return tuple(sorted({info.dtype for info in self.tensors.values()}))

    def raw(self, name: str, rows: slice | None = None) -> np.ndarray:
        """Stored values (bfloat16 as uint16 bits) of a tensor, or of a contiguous slice of its first axis.

        Raises:
            CheckpointError: no such tensor, a type that is no plain float, or a file cut short since it was opened.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path}: no tensor {name}; a whole checkpoint is required, restore the folder")
        info = self.tensors[name]
        if info.dtype not in STORED:
            raise CheckpointError(
                f"{self.path}: tensor {name} is {info.dtype}; {', '.join(STORED)} are read, dequantize the checkpoint"
            )
        start, stop, _ = (rows or slice(None)).indices(info.shape[0] if info.shape else 1)
        shape = (stop - start, *info.shape[1:]) if info.shape else ()
        width = prod(info.shape[1:])
        offset = info.begin + start * width * STORED[info.dtype].itemsize
        values = np.empty(shape, STORED[info.dtype])
        if not self._fill(values, info.file, offset):
            raise CheckpointError(f"{info.file}: tensor {name} ends early; the file is truncated, fetch it again")
        return values

    def _fill(self, values: np.ndarray, path: Path, offset: int) -> bool:
        """Read a file's bytes from ``offset`` into an array; False if the file ends first. Threads may call it."""
        file = self._files.get(path)
        if file is None:
            file = self._files.setdefault(path, FileIO(path))
        room = memoryview(values.reshape(-1).view(np.uint8))
        while room:
            count = os.preadv(file.fileno(), [room], offset)
            if count == 0:
                return False
            room, offset = room[count:], offset + count
        return True

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """float32 values of a tensor, or of a contiguous slice of its first axis.

        Raises:
            CheckpointError: as ``raw``, or values that are NaN or infinite (counted over the whole tensor).
        """
        stored = self.finite(name, rows)
        return to_float32(stored, self.tensors[name].dtype)

    def finite(self, name: str, rows: slice | None = None) -> np.ndarray:
        """As ``raw``. Raises CheckpointError for NaN and infinity, counted over the whole tensor."""
        stored, info = self.raw(name, rows), self.tensors[name]
        if not all_finite(stored, info.dtype):
            bad = sum(not_finite(self.raw(name, block), info.dtype) for block in row_blocks(info.shape))
            raise CheckpointError(
                f"{info.file}: tensor {name} has {bad} of {prod(info.shape)} values that are NaN or infinite; "
                "finite weights are required, use an earlier checkpoint"
            )
        return stored

    def gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        """float32 rows of a matrix by number, in any order, through the file's pages; errors as ``read``."""
        info = self.tensors[name]
        self.raw(name, slice(0, 1))  # proves type and place
        pages = np.memmap(info.file, STORED[info.dtype], "r", info.begin, info.shape)
        stored = pages[rows]
        if not all_finite(stored, info.dtype):
            self.finite(name)  # counts them over the whole tensor and raises
        return to_float32(stored, info.dtype)

    def identity(self) -> str:
        """sha256 over the configuration and the headers: names, types and shapes. Reads no weights."""
        head = [(info.name, info.dtype, info.shape) for info in self.tensors.values()]
        return hashlib.sha256(json.dumps([self.config, head], sort_keys=True).encode()).hexdigest()

    def digest(self) -> str:
        """sha256 over names, types, shapes and every stored value, however they are spread over shards."""
        total = hashlib.sha256()
        for name, info in self.tensors.items():
            total.update(json.dumps([name, info.dtype, info.shape]).encode())
            for block in row_blocks(info.shape):
                total.update(self.raw(name, block).tobytes())
        return total.hexdigest()


def row_blocks(shape: Sequence[int], elements: int = BLOCK) -> Iterator[slice]:
    """Slices of the first axis that hold at most ``elements`` each, one row at least; one slice for a scalar.

    >>> [(block.start, block.stop) for block in row_blocks((5, 10), 20)]
    [(0, 2), (2, 4), (4, 5)]
    """
    rows = shape[0] if shape else 1
    step = max(1, elements // max(1, prod(shape[1:])))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def read_json(path: Path) -> dict:
    """A JSON object. Raises CheckpointError when the file is missing, damaged, or holds something else."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: no {path.name}; a whole checkpoint folder is required, restore it"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}; the file cannot be read as JSON, restore it") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}; a JSON object is required, restore the file")
    return raw


def write_json(path: Path, value: object) -> None:
    """Write JSON so that the file of that name is always whole: a temporary sibling, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_checkpoint(path: Path) -> Checkpoint:
    """Read the configuration and the headers of a checkpoint folder.

    Raises:
        CheckpointError: the folder, config.json or a shard is missing; a shard is shorter or longer than its header
            says; a header does not parse; an index and its shards disagree; only pickle weights are there.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give the folder of a checkpoint with config.json and weights")
    if not (path / "config.json").is_file() and (pickles := _pickles(path)):
        raise CheckpointError(
            f"{path}: no config.json, and weights as pickles ({pickles[0]}); a folder of safetensors is required, make "
            f"one with `jam convert {path} --out FOLDER`"
        )
    config = read_json(path / "config.json")
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(path):
        for info in read_header(file):
            if info.name in tensors:
                raise CheckpointError(
                    f"{path}: tensor {info.name} is in {tensors[info.name].file.name} and in {file.name}; "
                    "each tensor must be stored once, remove the stale shard"
                )
            tensors[info.name] = info
    if (path / INDEX).is_file() and not (path / WEIGHTS).is_file():
        _check_index(path, tensors)
    return Checkpoint(path, config, dict(sorted(tensors.items())))


def _pickles(path: Path) -> list[str]:
    """Files of a folder, or of the models that Meta puts into one, that look like pickles of weights."""
    patterns = ("*.bin", "*.pt", "*.pth", "*.ckpt", "models/*/*.pth")
    return sorted(str(file.relative_to(path)) for pattern in patterns for file in path.glob(pattern))


def _weight_files(path: Path) -> list[Path]:
    """The shards that belong to the checkpoint; transformers' rule: one file wins over an index."""
    if (path / WEIGHTS).is_file():
        return [path / WEIGHTS]
    if (path / INDEX).is_file():
        mapping = read_json(path / INDEX).get("weight_map")
        if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
            raise CheckpointError(f"{path / INDEX}: no weight_map of tensor to shard; restore the index")
        files = [path / name for name in sorted(set(mapping.values()))]
        if foreign := [file.name for file in files if file.parent != path]:
            raise CheckpointError(f"{path / INDEX}: shard {foreign[0]} lies outside the folder; restore the index")
        if missing := [file.name for file in files if not file.is_file()]:
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(files)} shards are missing, the first is {missing[0]}; "
                "fetch the whole checkpoint"
            )
        return files
    if pickles := _pickles(path):
        raise CheckpointError(
            f"{path}: weights only as {pickles[0]}, a pickle, which can run code when opened; safetensors required, "
            f"make them with `jam convert {path} --out FOLDER`"
        )
    raise CheckpointError(f"{path}: neither {WEIGHTS} nor {INDEX}; a checkpoint with weights is required, restore them")


def _check_index(path: Path, tensors: dict[str, TensorInfo]) -> None:
    mapping = read_json(path / INDEX)["weight_map"]
    for name, shard in mapping.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(f"{path / shard}: no tensor {name}, which {INDEX} puts there; fetch the shard again")
    if extra := next((name for name in tensors if name not in mapping), None):
        raise CheckpointError(
            f"{tensors[extra].file}: tensor {extra} is not in {INDEX}; fetch the whole checkpoint again"
        )


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, proven to lie inside it without a gap.

    Raises:
        CheckpointError: damaged header, unknown type, or a file of another size than the header implies.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER):
            raise CheckpointError(
                f"{file}: {size} bytes, shorter than its header of {length} bytes; the file is truncated or no "
                "safetensors file, fetch it again"
            )
        text = stream.read(length)
    try:
        raw = json.loads(text)
        raw.pop("__metadata__", None)
        infos = []
        for name, entry in raw.items():
            shape = tuple(int(side) for side in entry["shape"])
            begin, end = entry["data_offsets"]
            infos.append(TensorInfo(name, str(entry["dtype"]), shape, file, 8 + length + begin, 8 + length + end))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: bad safetensors header ({error!r}); fetch the file again") from None
    at = 8 + length
    for info in sorted(infos, key=lambda info: (info.begin, info.end)):
        if info.dtype not in _ITEM_BYTES:
            raise CheckpointError(f"{file}: tensor {info.name} has unknown type {info.dtype}; save it as a float type")
        if info.begin != at or info.end - info.begin != prod(info.shape) * _ITEM_BYTES[info.dtype]:
            raise CheckpointError(f"{file}: tensor {info.name} has wrong offsets in the header; fetch the file again")
        at = info.end
    if size != at:
        state = "truncated" if size < at else "damaged"
        raise CheckpointError(f"{file}: {size} bytes, its header says {at}; the file is {state}, fetch it again")
    return infos
