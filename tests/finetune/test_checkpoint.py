"""Writing tensors one after another."""

import errno
import hashlib

import pytest
import torch
from safetensors.torch import load_file

from finetune.saving import checkpoint
from finetune.scale.engines import Whole, whole


def test_a_file_holds_every_tensor_in_its_own_type(tmp_path):
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7).bfloat16(), "step": torch.tensor(4.0), "none": torch.ones(0)}
    tensors["turned"] = torch.arange(6).view(2, 3).T
    digest = checkpoint.write_tensors(tmp_path / "x", {name: whole(t) for name, t in tensors.items()}, True)
    found = load_file(tmp_path / "x")
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()


def test_a_disk_that_is_full_is_told_after_the_last_tensor_in_which_other_ranks_wait(tmp_path, monkeypatch):
    read = []

    def given(name: str) -> Whole:
        return Whole((2,), torch.float32, lambda: read.append(name) or torch.zeros(2))

    def full(self, data) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.ShardFile, "append", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_tensors(tmp_path / "x", {name: given(name) for name in "abc"}, True)
    assert read == ["a", "b", "c"]
    assert checkpoint.write_tensors(tmp_path / "y", {name: given(name) for name in "de"}, False) is None
    assert read == [*"abcde"] and not (tmp_path / "y").exists()
