"""Headers that lie: ten thousand damaged files are each read exactly or refused in one line, whatever they claim."""

import copy
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jam.checkpoint import WEIGHTS, open_checkpoint
from jam.errors import CheckpointError
from jam.floats import STORED
from jam.header import ITEM_BYTES, read_header

TENSORS = {"a.weight": ("F32", [3, 2]), "b.weight": ("BF16", [4]), "c": ("F16", []), "empty": ("F32", [0, 5])}


def sound() -> tuple[dict, bytes]:
    """A header and the data that it describes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in TENSORS.items():
        size = int(np.prod(shape, dtype=int)) * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return header, bytes(range(at))


def packed(text: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


ODD: list[Callable[[random.Random], Any]] = [
    lambda draw: draw.choice([0, 1, -1, 2, 7, 24, 25, 32, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**40]),
    lambda draw: draw.randrange(-40, 80),
    lambda draw: draw.choice([True, False, None, 1.5, 1e999, "3", "", [], {}, [[1]], {"a": 1}, [0] * 100]),
    lambda draw: draw.choice(["F32", "BF16", "F16", "F64", "I8", "F8_E4M3", "F4", "f32", "\0", "F32\n"]),
    lambda draw: [draw.choice([0, 1, 2, 3, 2**20, 2**40, 2**62, -3]) for _ in range(draw.randrange(5))],
    lambda draw: [draw.randrange(-5, 60) for _ in range(draw.randrange(1, 4))],
]


def spoil_value(header: dict, draw: random.Random) -> None:
    """Another value somewhere in the tree."""
    entry = header[draw.choice(list(TENSORS))]
    key = draw.choice(["dtype", "shape", "data_offsets"])
    if isinstance(entry[key], list) and entry[key] and draw.random() < 0.6:
        entry[key][draw.randrange(len(entry[key]))] = draw.choice(ODD)(draw)
    else:
        entry[key] = draw.choice(ODD)(draw)


def spoil_tree(header: dict, draw: random.Random) -> None:
    """A tensor or a key lost, renamed, added or swapped."""
    name = draw.choice(list(TENSORS))
    match draw.randrange(6):
        case 0:
            del header[name]
        case 1:
            header[draw.choice(["", "\0", "a\nb", "x" * 500, "\ud800", "../x", "é", "__metadata__"])] = header.pop(name)
        case 2:
            del header[name][draw.choice(list(header[name]))]
        case 3:
            header["more"] = copy.deepcopy(header[name])
        case 4:
            header[name] = draw.choice(ODD)(draw)
        case 5:
            other = draw.choice(list(TENSORS))
            header[name]["data_offsets"] = header[other]["data_offsets"]


def damaged(draw: random.Random) -> bytes:
    """One damaged file."""
    header, data = sound()
    for _ in range(draw.choice([0, 1, 1, 1, 2, 3])):
        try:
            draw.choice([spoil_value, spoil_value, spoil_tree])(header, draw)
        except (KeyError, TypeError, IndexError):  # the second spoils what the first has removed
            continue
    text = json.dumps(header).encode()
    match draw.randrange(8):
        case 0:  # bytes
            raw = bytearray(text)
            for _ in range(draw.randrange(1, 5)):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
            text = bytes(raw)
        case 1:  # a key twice
            text = text[:-1] + b', "a.weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]}}'
        case 2:  # nested without end
            text = draw.choice([b"[", b'{"a":']) * draw.choice([10, 100_000])
        case 3:
            text = draw.choice([b"", b"[]", b"null", b"3", b'"x"', b"\xef\xbb\xbf{}", "{}".encode("utf-16")])
    whole = packed(text, data)
    match draw.randrange(6):
        case 0:  # the length
            length = draw.choice([0, 1, len(text) - 1, len(text) + 1, len(whole), 2**31, 2**63, 2**64 - 1])
            whole = struct.pack("<Q", max(0, length)) + whole[8:]
        case 1:
            whole = whole[: draw.randrange(len(whole) + 1)]
        case 2:
            whole += bytes(draw.randrange(1, 9))
    return whole


def test_ten_thousand_damaged_headers_are_read_exactly_or_refused(tmp_path: Path):
    file, draw, accepted, reasons = tmp_path / WEIGHTS, random.Random(0), 0, set()
    (tmp_path / "config.json").write_text("{}")
    for number in range(10_000):
        data = damaged(draw)
        file.write_bytes(data)
        try:
            infos = read_header(file)
        except CheckpointError as error:
            assert str(error).isprintable() and len(str(error)) < 1000, number
            reasons.add(str(error).split(":")[1][:16])
            continue
        accepted += 1
        begin = 8 + int.from_bytes(data[:8], "little")
        assert sum(info.end - info.begin for info in infos) == len(data) - begin, number
        assert len({info.name for info in infos}) == len(infos), number
        if all(info.dtype in STORED for info in infos):
            checkpoint = open_checkpoint(tmp_path)
            for info in infos:  # what is read is what the file has there
                assert checkpoint.raw(info.name).tobytes() == data[info.begin : info.end], number
    assert 200 < accepted < 5000 and len(reasons) > 10, (accepted, reasons)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "w": 3}', "w stands there twice"),
        (b'{"w": {"dtype": "F32", "dtype": "F16", "shape": [1], "data_offsets": [0, 4]}}', "dtype stands there twice"),
        (b'{"w\\u0000": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', r"'w\\x00'; names must be printable"),
        (b'{"w": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "no shape of whole numbers"),
        (b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', "no shape of whole numbers"),
        (b'{"w": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}', "no shape of whole numbers"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}', "no two offsets"),
        (b'{"w": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}', "has type"),
        (b'{"w": {"dtype": "F32", "shape": [0, 4611686018427387904], "data_offsets": [0, 0]}}', "more than 2.60"),
        (b'{"w": ' * 100_000, "maximum recursion|Expecting"),
        (b"[]", "a list in place of an object"),
    ],
)
def test_a_header_that_lies_is_named(tmp_path: Path, text: bytes, message: str):
    (tmp_path / WEIGHTS).write_bytes(packed(text, bytes(4)))
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(tmp_path / WEIGHTS)
    assert str(caught.value).isprintable()
