"""Reading checkpoint folders: headers first, tensors by slices. Writing them is ``jam.shards``.

``open_checkpoint`` parses config.json and the safetensors headers alone and proves from them and from the file sizes
that every tensor is whole; ``Checkpoint.read`` then yields float32 rows and refuses NaN and infinity.

Bounded memory: nothing here holds more than the rows asked for. No pickle is ever opened, and torch is not imported.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from io import FileIO
from math import prod
from pathlib import Path

import numpy as np

from jam.errors import CheckpointError
from jam.floats import STORED, all_finite, not_finite, to_float32
from jam.header import TensorInfo, read_header, shown, unique_keys

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
BLOCK = 1 << 17  # elements that a streaming step reads at once: as float32 they stay in a core's cache
_QUANTISED = ("F8", "I8", "U8", "I16", "U16", "I32", "U32")  # types that packed weights are kept in


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


def read_json(path: Path, hook: Callable[[list], dict] | None = None) -> dict:
    """A JSON object; ``hook`` as json's ``object_pairs_hook``. Raises CheckpointError when the file is missing,
    damaged, holds something else, or NaN or infinity, which are no JSON."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=hook, parse_constant=_no_number)
        json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair is no text, and could not be written again
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent}: no {path.name}; a whole checkpoint folder is required, restore it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}; the file cannot be read as JSON, restore it") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds a {type(raw).__name__}; a JSON object is required, restore the file")
    return raw


def _no_number(name: str) -> None:
    raise ValueError(f"a value is {name}, finite numbers are required")


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
            says; a header does not parse; an index and its shards disagree; a file is a link out of the folder; only
            pickle weights are there.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give the folder of a checkpoint with config.json and weights")
    if not (path / "config.json").is_file() and (pickles := _pickles(path)):
        raise CheckpointError(
            f"{path}: no config.json, and weights as pickles ({pickles[0]}); a folder of safetensors is required, make "
            f"one with `jam convert {path} --out FOLDER`"
        )
    check_place(path, path / "config.json")
    config = read_json(path / "config.json")
    tensors: dict[str, TensorInfo] = {}
    for file in _weight_files(path):
        check_place(path, file)
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
        mapping = _weight_map(path)
        if foreign := [name for name in mapping.values() if not _is_file_name(name)]:
            raise CheckpointError(
                f"{path / INDEX}: shard {shown(foreign[0])} lies outside the folder or is no name; restore the index"
            )
        files = [path / name for name in sorted(set(mapping.values()))]
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


def _weight_map(path: Path) -> dict[str, str]:
    check_place(path, path / INDEX)
    mapping = read_json(path / INDEX, unique_keys).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise CheckpointError(f"{path / INDEX}: no weight_map of tensor to shard; restore the index")
    return mapping


def _is_file_name(name: str) -> bool:
    return name.isprintable() and name == Path(name).name and name not in ("", "..")


def check_place(folder: Path, file: Path) -> None:
    """Raises CheckpointError for a file of a checkpoint that is a link to a place outside of the folder.

    A model from elsewhere could so bring a file of this machine into a result that is then published. The hub's cache
    is the one exception: its ``snapshots/<revision>`` hold links into the ``blobs`` of the same repository.
    """
    root, target = folder.resolve(), file.resolve()
    if target.is_relative_to(root):
        return
    for snapshot in (root, *root.parents):
        if snapshot.parent.name == "snapshots" and target.is_relative_to(snapshot.parent.parent / "blobs"):
            return
    raise CheckpointError(
        f"{file}: a link to {target}, outside of the checkpoint's folder; files of its own are required, copy it there"
    )


def check_floats(checkpoint: Checkpoint, ignored: tuple[str, ...] = ()) -> None:
    """Raises CheckpointError for a quantised checkpoint, whose stored numbers are not its weights.

    Args:
        ignored: endings of tensors that are no weights.
    """
    packed = [info for info in checkpoint.tensors.values() if info.dtype.startswith(_QUANTISED)]
    packed = [info for info in packed if not info.name.endswith(ignored)]
    if packed:
        found = f"tensor {packed[0].name} is {packed[0].dtype}"
    elif checkpoint.config.get("quantization_config"):
        found = "config.json has a quantization_config"
    else:
        return
    raise CheckpointError(
        f"{checkpoint.path}: {found}: the weights are quantised; plain {', '.join(STORED)} are required, dequantize "
        "the checkpoint or use the one it was made from"
    )


def _check_index(path: Path, tensors: dict[str, TensorInfo]) -> None:
    mapping = _weight_map(path)
    for name, shard in mapping.items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(
                f"{path / shard}: no tensor {shown(name)}, which {INDEX} puts there; fetch the shard again"
            )
    if extra := next((name for name in tensors if name not in mapping), None):
        raise CheckpointError(
            f"{tensors[extra].file}: tensor {extra} is not in {INDEX}; fetch the whole checkpoint again"
        )
