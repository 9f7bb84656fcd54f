"""Reading folders header-first: what is whole is read exactly, and everything else is refused by name."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from jam.checkpoint import INDEX, WEIGHTS, open_checkpoint, read_json, row_blocks, write_json
from jam.errors import CheckpointError
from jam.floats import all_finite, from_float32, not_finite, to_float32


def folder_with(tmp: Path, tensors: dict[str, torch.Tensor], name: str = WEIGHTS) -> Path:
    tmp.mkdir(exist_ok=True)
    (tmp / "config.json").write_text('{"model_type": "opt"}')
    save_file(tensors, tmp / name)
    return tmp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_reads_what_torch_wrote(tmp_path: Path, dtype: torch.dtype):
    values = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    checkpoint = open_checkpoint(
        folder_with(tmp_path, {"b": values, "a": values[0].clone(), "scalar": values[1, 1].clone()})
    )
    assert list(checkpoint.tensors) == ["a", "b", "scalar"] and checkpoint.parameters == 25
    assert np.array_equal(checkpoint.read("b"), values.float().numpy())
    assert np.array_equal(checkpoint.read("b", slice(2, 5)), values[2:5].float().numpy())
    assert checkpoint.read("scalar").shape == () and checkpoint.read("scalar") == values[1, 1].float().item()


def test_floats_round_as_torch_does():
    numbers = torch.randn(4096, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 4, 4096)
    ties = torch.tensor([1.0, 1.00390625, 1.01171875, -1.00390625, 0.0, -0.0, 1e-45])  # halves between bfloat16 values
    values = torch.cat([numbers, ties])
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16), ("F32", torch.float32)):
        ours = to_float32(from_float32(values.numpy(), name), name)
        assert ours.tobytes() == values.to(dtype).float().numpy().tobytes(), name


def test_overflow_is_counted_where_torch_gives_infinity():
    values = torch.tensor([65503.0, 65519.0, 65520.0, -70000.0, 3.3e38, 3.39e38, 3.4e38])
    for name, dtype in (("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)):
        expected = int(values.to(dtype).isinf().sum())
        stored = from_float32(values.numpy(), name)
        assert not_finite(stored, name) == expected and all_finite(stored, name) == (expected == 0), name
    assert not_finite(from_float32(values.numpy(), "F16"), "F16") == 5
    assert all_finite(from_float32(values.numpy()[:6], "F32"), "F32")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_counts_values_that_are_no_numbers_over_the_whole_tensor(tmp_path: Path, bad: float):
    values = torch.zeros(10, 4, dtype=torch.bfloat16)
    values[2, 1] = values[9, 3] = bad
    checkpoint = open_checkpoint(folder_with(tmp_path, {"w": values}))
    assert checkpoint.read("w", slice(3, 9)).shape == (6, 4)
    with pytest.raises(CheckpointError, match=r"tensor w has 2 of 40 values that are NaN or infinite"):
        checkpoint.read("w", slice(0, 3))


def truncate(file: Path, keep: int) -> None:
    file.write_bytes(file.read_bytes()[:keep])


def test_refuses_a_shard_cut_anywhere(tmp_path: Path):
    """A checkpoint whose download stopped must not be merged: the header alone proves it, wherever the cut is."""
    folder = folder_with(tmp_path, {"w": torch.zeros(100, 10)})
    whole = (folder / WEIGHTS).read_bytes()
    for keep in (0, 4, 8, 40, len(whole) // 2, len(whole) - 1):
        truncate(folder / WEIGHTS, keep)
        with pytest.raises(CheckpointError, match="truncated"):
            open_checkpoint(folder)
        (folder / WEIGHTS).write_bytes(whole)
    open_checkpoint(folder)
    (folder / WEIGHTS).write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(folder)


def meta_layout(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "models" / "7b").mkdir(parents=True)
    (folder / "models" / "7b" / "consolidated.pth").touch()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json; a whole"),
        (meta_layout, r"no config.json, and weights as pickles \(models/7b/consolidated.pth\).*jam convert "),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text("[" * 100_000), "cannot be read as JSON"),
        (lambda f: (f / "config.json").write_text('{"rms_norm_eps": NaN}'), "a value is NaN"),
        (lambda f: (f / "config.json").write_text("[]"), "a JSON object is required"),
        (lambda f: (f / WEIGHTS).unlink(), f"neither {WEIGHTS} nor {INDEX}"),
        (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "a pickle, which can run code .*jam convert "),
        (lambda f: (f / WEIGHTS).write_bytes((3).to_bytes(8, "little") + b"{]}"), "bad safetensors header"),
    ],
)
def test_refuses_what_is_no_checkpoint(tmp_path: Path, change: Callable, message: str):
    folder = folder_with(tmp_path, {"w": torch.zeros(2)})
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def header_file(file: Path, entries: dict, data: bytes) -> None:
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}, "unknown type F7"),
        ({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}, "wrong offsets"),
        ({"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}, "wrong offsets"),
        ({"dtype": "F32", "shape": [2]}, "bad safetensors header"),
    ],
)
def test_refuses_a_header_that_lies(tmp_path: Path, entry: dict, message: str):
    folder = folder_with(tmp_path, {"w": torch.zeros(2)})
    header_file(folder / WEIGHTS, {"w": entry}, bytes(8))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def sharded(tmp: Path) -> Path:
    folder_with(tmp, {"a": torch.ones(3)}, "one.safetensors")
    folder_with(tmp, {"b": torch.zeros(2)}, "two.safetensors")
    write_json(tmp / INDEX, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    return tmp


def test_reads_shards_and_refuses_a_missing_one(tmp_path: Path):
    folder = sharded(tmp_path)
    assert open_checkpoint(folder).read("b").tolist() == [0, 0]
    (folder / "two.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards are missing, the first is two\.safetensors"):
        open_checkpoint(folder)


def test_refuses_an_index_that_does_not_match_its_shards(tmp_path: Path):
    folder = sharded(tmp_path)
    write_json(folder / INDEX, {"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}})
    with pytest.raises(CheckpointError, match="no tensor c"):
        open_checkpoint(folder)
    write_json(folder / INDEX, {"weight_map": {"a": "one.safetensors", "b": "../two.safetensors"}})
    with pytest.raises(CheckpointError, match="outside the folder"):
        open_checkpoint(folder)
    save_file({"b": torch.zeros(2), "stale": torch.zeros(1)}, folder / "two.safetensors")
    write_json(folder / INDEX, {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})
    with pytest.raises(CheckpointError, match="tensor stale is not in"):
        open_checkpoint(folder)


def test_refuses_a_tensor_that_two_shards_hold(tmp_path: Path):
    folder = sharded(tmp_path)
    save_file({"a": torch.ones(3), "b": torch.zeros(2)}, folder / "two.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor a is in one\.safetensors and in two\.safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../two.safetensors", "/etc/passwd", "a\0b", "a\nb", "x/two.safetensors"]
)
def test_an_index_names_files_of_its_folder_alone(tmp_path: Path, name: str):
    folder = sharded(tmp_path)
    write_json(folder / INDEX, {"weight_map": {"a": "one.safetensors", "b": name}})
    with pytest.raises(CheckpointError, match="lies outside the folder or is no name") as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable()


def test_refuses_an_index_with_a_tensor_twice(tmp_path: Path):
    folder = sharded(tmp_path)
    (folder / INDEX).write_text('{"weight_map": {"a": "one.safetensors", "a": "two.safetensors"}}')
    with pytest.raises(CheckpointError, match="a stands there twice"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS])
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path, name: str):
    folder = folder_with(tmp_path / "model", {"w": torch.ones(2)})
    (tmp_path / "elsewhere").mkdir()
    (folder / name).rename(tmp_path / "elsewhere" / name)
    (folder / name).symlink_to(tmp_path / "elsewhere" / name)
    with pytest.raises(CheckpointError, match=f"{name}: a link to .*elsewhere/{name}, outside of the"):
        open_checkpoint(folder)


def test_links_inside_the_folder_and_of_the_hub_cache_are_followed(tmp_path: Path):
    """The hub's cache: snapshots/<revision>/<file> -> ../../blobs/<hash>."""
    snapshot, blobs = tmp_path / "models--x--y/snapshots/abc", tmp_path / "models--x--y/blobs"
    blobs.mkdir(parents=True)
    folder_with(tmp_path / "made", {"w": torch.ones(2)})
    (snapshot / "sub").mkdir(parents=True)
    for number, name in enumerate(("config.json", WEIGHTS)):
        (tmp_path / "made" / name).rename(blobs / str(number))
        (snapshot / name).symlink_to(f"../../blobs/{number}")
        (snapshot / "sub" / name).symlink_to(f"../../../blobs/{number}")
    (tmp_path / "short").symlink_to(snapshot)
    for folder in (snapshot, snapshot / "sub", tmp_path / "short"):
        assert open_checkpoint(folder).read("w").tolist() == [1, 1]
    other = tmp_path / "models--x--z/blobs"
    other.mkdir(parents=True)
    (blobs / "1").rename(other / "1")
    (snapshot / WEIGHTS).unlink()
    (snapshot / WEIGHTS).symlink_to(other / "1")
    with pytest.raises(CheckpointError, match="outside of the"):
        open_checkpoint(snapshot)


def test_digest_sees_weights_and_identity_does_not(tmp_path: Path):
    first = open_checkpoint(folder_with(tmp_path / "a", {"w": torch.zeros(3)}))
    second = open_checkpoint(folder_with(tmp_path / "b", {"w": torch.ones(3)}))
    assert first.identity() == second.identity() and first.digest() != second.digest()


@pytest.mark.parametrize("shape", [(), (1,), (5, 3), (17,), (4, 100), (3, 2, 2)])
def test_row_blocks_cover_every_row_once(shape: tuple[int, ...]):
    rows = shape[0] if shape else 1
    blocks = list(row_blocks(shape, 10))
    assert [row for block in blocks for row in range(block.start, block.stop)] == list(range(rows))


def test_what_is_no_plain_file_or_no_text_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for a writer
    with pytest.raises(CheckpointError, match=r"no pipe\.json"):
        read_json(tmp_path / "pipe.json")
    (tmp_path / "half.json").write_text('{"a": ["\\ud800"]}')
    with pytest.raises(CheckpointError, match="surrogates not allowed"):
        read_json(tmp_path / "half.json")
