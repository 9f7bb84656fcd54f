"""The process that opens pickles, and the only file of jam that does.

Run by path, alone: ``python unpickle.py FILE...``. It imports nothing of jam, is given nothing but the paths, leaves
the network where the system lets it, may write no file, and loads with ``weights_only=True``: a pickle that names
anything but tensors, plain containers and ``argparse.Namespace`` ends in an error before any of it runs. (The name of a
callback that taming's training runs left in their files stands for an empty class of this file.) Tensors stay in the
file (mapped) until they are asked for; a file of torch's old format is read whole.

Out: one line of JSON, then the bytes of what is asked. In: one line of JSON ``[file, tensor, start, stop]`` for rows
``start`` to ``stop`` of a tensor (``[file, tensor, 0, 1]`` for a scalar).
"""

import argparse
import ctypes
import json
import resource
import sys
import zipfile
from collections.abc import Iterator

CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
MAX_PICKLE = 64 << 20  # bytes of a zip's data.pkl: names and shapes, the numbers are in other members
MAX_DEPTH, MAX_VALUES = 64, 1 << 21  # of a pickle's plain content, whose parts may be one another's
NEW_NETWORK, NEW_USER = 0x40000000, 0x10000000  # flags of Linux' unshare


class Nothing:
    """What ``CALLBACK`` is read as."""


def leave_network() -> bool:
    """Into a network of its own without a way out, where the system allows it; before any thread starts."""
    unshare = getattr(ctypes.CDLL(None), "unshare", None)  # Linux only
    return unshare is not None and (unshare(NEW_NETWORK) == 0 or unshare(NEW_NETWORK | NEW_USER) == 0)


def write_no_files() -> None:
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE):
        resource.setrlimit(limit, (0, 0))


def check_members(path: str) -> None:
    """Raises ValueError, BadZipFile for a zip that would unpack to more than torch.save puts there."""
    with open(path, "rb") as stream:
        if stream.read(4) != b"PK\x03\x04":
            return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
                raise ValueError(f"{member.filename!r} in it is compressed, which torch.save never does")
            if member.filename.endswith("data.pkl") and member.file_size > MAX_PICKLE:
                raise ValueError(f"its pickle has {member.file_size} bytes, {MAX_PICKLE} are the most that is read")


def main(paths: list[str]) -> None:
    leave_network()
    import torch

    write_no_files()  # torch itself tries a temporary file when it is loaded
    types = {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
    }
    files, tables = [], []
    for path in paths:
        found: list[dict] = []
        tensors: list = []
        left = iter(range(MAX_VALUES))

        def walk(
            value: object, place: list[str], found: list = found, tensors: list = tensors, left: Iterator = left
        ) -> object:
            """Plain values as JSON, tensors set apart with the place where they stood. Raises ValueError."""
            if len(place) > MAX_DEPTH or next(left, None) is None:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels, or more than {MAX_VALUES} values")
            if isinstance(value, torch.Tensor):
                shape, same = list(value.shape), [len(found)]
                dense = value.layout == torch.strided and not value.is_quantized
                if dense and value.numel():
                    same = [value.untyped_storage().data_ptr(), value.storage_offset(), shape, value.stride()]
                dtype = types.get(value.dtype, str(value.dtype)) if dense else str(value.layout)
                found.append({"place": place, "dtype": dtype, "shape": shape, "same": repr(same)})
                tensors.append(value.detach())
                return None
            if isinstance(value, argparse.Namespace):
                value = vars(value)
            if isinstance(value, dict):
                return {str(key): walk(item, [*place, str(key)]) for key, item in value.items()}
            if isinstance(value, list | tuple | set):
                return [walk(item, [*place, str(index)]) for index, item in enumerate(value)]
            return value if value is None or isinstance(value, str | int | float | bool) else str(value)

        try:
            check_members(path)
            with torch.serialization.safe_globals([argparse.Namespace, (Nothing, CALLBACK)]):
                root = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
            files.append(json.dumps({"plain": walk(root, []), "tensors": found}))
        except Exception as error:  # whatever a foreign file makes torch say, the parent says it in one line
            first = error.__context__ or error  # torch wraps it in advice to load without the guard
            print(json.dumps({"path": path, "error": f"{type(first).__name__}: {first}"[:2000]}), flush=True)
            return
        tables.append(tensors)
    print(f'{{"files": [{", ".join(files)}]}}', flush=True)
    for line in sys.stdin:
        file, index, start, stop = json.loads(line)
        tensor = tables[file][index]
        rows = (tensor[start:stop] if tensor.ndim else tensor).contiguous()
        sys.stdout.buffer.write(rows.reshape(-1).view(torch.uint8).numpy().data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
