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

CALLBACK = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
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
        try:
            with torch.serialization.safe_globals([argparse.Namespace, (Nothing, CALLBACK)]):
                root = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # whatever a foreign file makes torch say, the parent says it in one line
            first = error.__context__ or error  # torch wraps it in advice to load without the guard
            print(json.dumps({"path": path, "error": f"{type(first).__name__}: {first}"}), flush=True)
            return
        found: list[dict] = []
        tensors: list = []

        def walk(value: object, place: list[str], found: list = found, tensors: list = tensors) -> object:
            """Plain values as JSON, tensors set apart with the place where they stood."""
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

        files.append({"plain": walk(root, []), "tensors": found})
        tables.append(tensors)
    print(json.dumps({"files": files}), flush=True)
    for line in sys.stdin:
        file, index, start, stop = json.loads(line)
        tensor = tables[file][index]
        rows = (tensor[start:stop] if tensor.ndim else tensor).contiguous()
        sys.stdout.buffer.write(rows.reshape(-1).view(torch.uint8).numpy().data)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
