"""The writer of folders: exact values, several shards, and nothing under the final name unless all of it."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jam.checkpoint import INDEX, open_checkpoint, row_blocks, write_json
from jam.errors import CheckpointError, JamError
from jam.shards import ShardWriter, TensorSpec

SPECS = [TensorSpec("first", "BF16", (6, 4)), TensorSpec("scalar", "F32", ()), TensorSpec("last", "F16", (10,))]
VALUES = {
    spec.name: np.random.default_rng(0).standard_normal(spec.shape, dtype=np.float32).reshape(spec.shape)
    for spec in SPECS
}


def write_all(writer: ShardWriter) -> None:
    for spec in SPECS:
        for block in row_blocks(spec.shape, 8):
            writer.write(spec.name, VALUES[spec.name][block] if spec.shape else VALUES[spec.name])
    write_json(writer.folder / "config.json", {"model_type": "opt"})


@pytest.mark.parametrize("shard_bytes", [1000, 50, 1])
def test_what_is_written_is_what_torch_reads(tmp_path: Path, shard_bytes: int):
    with ShardWriter(tmp_path / "out", SPECS, shard_bytes=shard_bytes) as writer:
        write_all(writer)
        writer.finish()
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == {1000: 1, 50: 2, 1: 3}[shard_bytes]
    assert (tmp_path / "out" / INDEX).exists() == (len(files) > 1)
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for spec, dtype in zip(SPECS, (torch.bfloat16, torch.float32, torch.float16), strict=True):
        assert torch.equal(read[spec.name], torch.tensor(VALUES[spec.name]).to(dtype))
    assert open_checkpoint(tmp_path / "out").tensors.keys() == read.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leaving_early_leaves_nothing(tmp_path: Path):
    for error in (ValueError, KeyboardInterrupt):
        with pytest.raises(error), ShardWriter(tmp_path / "out", SPECS) as writer:
            writer.write("first", VALUES["first"])
            assert writer.folder.is_dir()
            raise error
        assert not list(tmp_path.iterdir())


def test_an_unfinished_tensor_cannot_be_finished(tmp_path: Path):
    with pytest.raises(AssertionError), ShardWriter(tmp_path / "out", SPECS) as writer:
        writer.write("first", VALUES["first"][:3])
        writer.finish()
    assert not list(tmp_path.iterdir())


def test_refuses_a_taken_place_and_keeps_it(tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, message in (("full", r"not empty \(it holds mine.txt\)"), ("file", "is a file")):
        with pytest.raises(CheckpointError, match=message):
            ShardWriter(tmp_path / name, SPECS)
    assert (tmp_path / "full" / "mine.txt").read_text() == "x"


def test_refuses_a_nul_in_the_name(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"a\\x00b': a NUL, which no path may hold"):
        ShardWriter(tmp_path / "a\0b", SPECS)


def test_an_empty_folder_may_be_filled(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with ShardWriter(tmp_path / "out", SPECS) as writer:
        write_all(writer)
        writer.finish()
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_link_to_an_empty_folder_stands_for_it(tmp_path: Path):
    (tmp_path / "there").mkdir()
    (tmp_path / "out").symlink_to("there")
    with ShardWriter(tmp_path / "out", SPECS) as writer:
        write_all(writer)
        writer.finish()
    assert (tmp_path / "there" / "config.json").is_file() and (tmp_path / "out").is_symlink()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "there"]


def test_refuses_values_that_the_type_cannot_hold(tmp_path: Path):
    with (
        pytest.raises(CheckpointError, match="tensor w: 1 values overflow F16"),
        ShardWriter(tmp_path / "out", [TensorSpec("w", "F16", (2,))]) as writer,
    ):
        writer.write("w", np.float32([1.0, 1e6]))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    huge = [TensorSpec("w", "F32", (1 << 40, 1 << 20))]
    with (
        pytest.raises(JamError, match="disk full, 4611686018427387904 bytes are needed"),
        ShardWriter(tmp_path / "o", huge),
    ):
        pass

    def full(self: ShardWriter, name: str, rows: np.ndarray) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", full)
    with pytest.raises(JamError, match="disk full"), ShardWriter(tmp_path / "out", SPECS) as writer:
        monkeypatch.setattr("jam.shards.shutil.disk_usage", lambda path: SimpleNamespace(free=1))
        write_all(writer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [errno.EFBIG, errno.ENOSPC])
def test_a_disk_with_room_is_not_called_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int):
    def refused(self: ShardWriter, name: str, rows: np.ndarray) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ShardWriter, "write", refused)
    with pytest.raises(OSError) as caught, ShardWriter(tmp_path / "out", SPECS) as writer:
        write_all(writer)
    assert caught.value.errno == number and not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_removed_and_a_living_ones_kept(tmp_path: Path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale, living = tmp_path / f".out.tmp-{dead.pid}", tmp_path / f".out.tmp-{os.getppid()}"
    other = tmp_path / f".other.tmp-{dead.pid}"
    for folder in (stale, living, other):
        folder.mkdir()
    with ShardWriter(tmp_path / "out", SPECS) as writer:
        write_all(writer)
        writer.finish()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["out", living.name, other.name])


def test_a_folder_without_weights_is_whole_too(tmp_path: Path):
    with ShardWriter(tmp_path / "out", []) as writer:
        (writer.folder / "config.json").write_text("{}")
        writer.finish()
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["config.json"]
