"""The header of a safetensors file, believed in nothing that the file's size does not prove.

A file is eight bytes of header length, the header (a JSON object of tensors with type, shape and byte range), and the
data. ``read_header`` refuses any header that does not describe the file's bytes once each, in plain types, under names
that can be printed. Nothing larger than the header is allocated.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from jam.errors import CheckpointError
from jam.floats import STORED

MAX_HEADER = 100 << 20  # the format's own limit
MAX_RANK = 32  # numpy's oldest limit; weights have four axes at most
MAX_ELEMENTS = 1 << 60  # of a tensor without its empty axes: numpy counts bytes in 64 bits
ITEM_BYTES = {
    **{name: dtype.itemsize for name, dtype in STORED.items()},
    **{"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "C64": 8},
    **{name: 1 for name in ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")},
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


def shown(name: object) -> str:
    """A name out of a file, as an error may print it: on one line, whatever it holds.

    >>> shown("a.weight"), shown("a" + chr(10) + "b")
    ('a.weight', "'a\\\\nb'")
    """
    text = name if isinstance(name, str) and name.isprintable() else ascii(name)
    return text if len(text) <= 200 else f"{text[:197]}..."


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; json alone keeps the last of two equal keys in silence. Raises ValueError."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"{shown(twice)} stands there twice")
    return result


def read_header(file: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, proven to lie inside it without a gap.

    Raises:
        CheckpointError: damaged header, unknown type, or a file of another size than the header implies.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise CheckpointError(
                f"{file}: {size} bytes, shorter than its header of {length} bytes; the file is truncated or no "
                "safetensors file, fetch it again"
            )
        text = stream.read(length)
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=unique_keys)
        if not isinstance(raw, dict):
            raise ValueError(f"a {type(raw).__name__} in place of an object")
        raw.pop("__metadata__", None)
        infos = [_info(file, name, entry, 8 + length) for name, entry in raw.items()]
    except (ValueError, RecursionError) as error:
        reason = shown(str(error) or type(error).__name__)
        raise CheckpointError(f"{file}: bad safetensors header ({reason}); fetch the file again") from None
    at = 8 + length
    for info in sorted(infos, key=lambda info: (info.begin, info.end)):
        if info.begin != at or info.end - info.begin != prod(info.shape) * ITEM_BYTES[info.dtype]:
            raise CheckpointError(f"{file}: tensor {info.name} has wrong offsets in the header; fetch the file again")
        at = info.end
    if size != at:
        state = "truncated" if size < at else "damaged"
        raise CheckpointError(f"{file}: {size} bytes, its header says {at}; the file is {state}, fetch it again")
    return infos


def _info(file: Path, name: str, entry: Any, data: int) -> TensorInfo:
    """One entry of the header; ``data`` is where the tensors' bytes begin. Raises ValueError, CheckpointError."""
    if not name or not name.isprintable():
        raise ValueError(f"a tensor named {shown(name)}; names must be printable")
    if not isinstance(entry, dict):
        raise ValueError(f"tensor {shown(name)} is no object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str):
        raise ValueError(f"tensor {shown(name)} has type {shown(dtype)}")
    if not (isinstance(shape, list) and len(shape) <= MAX_RANK and all(map(_whole, shape))):
        raise ValueError(f"tensor {shown(name)} has no shape of whole numbers")
    if prod(side for side in shape if side) > MAX_ELEMENTS:
        raise ValueError(f"tensor {shown(name)} has a shape of more than 2^60 elements")
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(map(_whole, offsets))):
        raise ValueError(f"tensor {shown(name)} has no two offsets")
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"{file}: tensor {shown(name)} has unknown type {shown(dtype)}; use {', '.join(STORED)}")
    return TensorInfo(name, dtype, tuple(shape), file, data + offsets[0], data + offsets[1])


def _whole(value: object) -> bool:
    """A whole number that a file's size could be; JSON's true is none."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
