"""Pickle checkpoints as tables of tensors, read by a process of its own (``unpickle.py``).

``Pickles`` starts that process with the paths and nothing else, reads which tensors there are, and asks for rows of
them as numpy arrays. What the process refuses or cannot read comes back as one line. This file opens no pickle.
"""

import json
import re
import subprocess
import textwrap
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from jam.child import command, environment
from jam.errors import CheckpointError
from jam.floats import STORED, all_finite
from jam.header import shown

_FOREIGN = re.compile(r"(?:GLOBAL|call reduce for|instantiate|but got) (?:unrecognized \w+ )?(\S+)")  # torch's words


@dataclass(frozen=True)
class PickledTensor:
    """A tensor of a pickle; ``same`` is equal for tensors that are one memory (tied weights)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    index: int
    same: str


class Pickles:
    """Several pickles, open together; use as a context manager.

    Attributes:
        plain: each file's content with tensors replaced by None, ``argparse.Namespace`` as a mapping.

    Raises:
        CheckpointError: a pickle that asks for code, is damaged, or holds no tensors.
    """

    def __init__(self, paths: Sequence[Path]):
        self.paths = [Path(path) for path in paths]
        program = Path(__file__).with_name("unpickle.py")
        self._process = subprocess.Popen(
            command(program, *(str(path.resolve()) for path in self.paths)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        self._said = b""
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        try:
            self._read_tables()
        except BaseException:
            self.close()
            raise

    def _listen(self) -> None:
        """The end of what the process says of itself; a pipe that nobody empties would hold it up for good."""
        while chunk := self._process.stderr.read1(1 << 16):
            self._said = (self._said + chunk)[-2000:]

    def _read_tables(self) -> None:
        line = self._process.stdout.readline()
        if not line:
            raise self._broken()
        answer = json.loads(line)
        if "error" in answer:
            raise _refusal(answer["path"], answer["error"])
        self.plain: list = [file["plain"] for file in answer["files"]]
        self._tensors = [
            [(tuple(entry["place"]), entry["dtype"], tuple(entry["shape"]), entry["same"]) for entry in file["tensors"]]
            for file in answer["files"]
        ]

    def state(self, file: int = 0) -> dict[str, PickledTensor]:
        """The weights of a file by name: under ``state_dict`` or ``model`` where it has one, else its own tensors.

        Raises:
            CheckpointError: no tensors there, two of one name, or a name that cannot be printed.
        """
        plain = self.plain[file]
        key = next((key for key in ("state_dict", "model") if isinstance(plain, dict) and plain.get(key)), None)
        prefix = () if key is None else (key,)
        found = {}
        for index, (place, dtype, shape, same) in enumerate(self._tensors[file]):
            if len(place) == len(prefix) + 1 and place[: len(prefix)] == prefix:
                if not place[-1] or not place[-1].isprintable():
                    raise CheckpointError(
                        f"{self.paths[file]}: a tensor named {shown(place[-1])}; names must be printable, rename it"
                    )
                if place[-1] in found:
                    raise CheckpointError(
                        f"{self.paths[file]}: two tensors are named {place[-1]}; names must differ, rename one"
                    )
                found[place[-1]] = PickledTensor(place[-1], dtype, shape, file, index, same)
        if not found:
            raise CheckpointError(
                f"{self.paths[file]}: no table of named tensors, alone or under state_dict or model; a checkpoint with "
                "weights is required, use another file"
            )
        return found

    def raw(self, tensor: PickledTensor, rows: slice | None = None) -> np.ndarray:
        """Stored values (bfloat16 as uint16 bits), or those of a contiguous slice of the first axis.

        Raises:
            CheckpointError: a type that is no plain float, NaN or infinity, or a process that ended.
        """
        if tensor.dtype not in STORED:
            raise CheckpointError(
                f"{self.paths[tensor.file]}: tensor {tensor.name} is {tensor.dtype}; {', '.join(STORED)} are read, "
                "convert a checkpoint of float weights"
            )
        start, stop, _ = (rows or slice(None)).indices(tensor.shape[0] if tensor.shape else 1)
        shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
        values = np.empty(shape, STORED[tensor.dtype])
        if values.size == 0:
            return values
        try:
            request = json.dumps([tensor.file, tensor.index, start, stop]) + "\n"
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._broken() from None
        room = memoryview(values.reshape(-1).view(np.uint8))
        while room:
            count = self._process.stdout.readinto(room)
            if not count:
                raise self._broken()
            room = room[count:]
        if not all_finite(values, tensor.dtype):
            raise CheckpointError(
                f"{self.paths[tensor.file]}: tensor {tensor.name} has NaN or infinite values; finite weights are "
                "required, use an earlier checkpoint"
            )
        return values

    def _broken(self) -> CheckpointError:
        code = self._process.wait()
        self._listener.join()
        said = self._said.decode("utf-8", "replace").strip().splitlines()
        reason = f"it was ended by signal {-code}" if code < 0 else f"it ended with {code}"
        last = f": {shown(said[-1])}" if said else ""
        return CheckpointError(
            f"{', '.join(path.name for path in self.paths)}: the process that reads pickles stopped ({reason}{last}); "
            "a whole file and enough memory are required, check both and try again"
        )

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._listener.join()
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            try:
                pipe.close()
            except BrokenPipeError:  # a request that the ended process did not take
                continue

    def __enter__(self) -> "Pickles":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _refusal(path: str, error: str) -> CheckpointError:
    reason = " ".join(error.split())
    if named := _FOREIGN.search(reason):
        return CheckpointError(
            f"{path}: the pickle asks for {shown(named[1])}, which is no weight and could run code; it was not loaded, "
            "a file of tensors and plain values is required, ask its owner for safetensors"
        )
    first = re.split(r"(?<=[.!?])\s", reason, maxsplit=1)[0].rstrip(".")
    return CheckpointError(
        f"{path}: cannot be read as a pickle of weights; the file is truncated, damaged or none that torch.save wrote, "
        f"fetch it again (torch says: {shown(textwrap.shorten(first, 200, placeholder=' ...'))})"
    )
