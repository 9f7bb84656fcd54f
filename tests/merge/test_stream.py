"""Values that a merge only places go from file to file as they are stored; the result is what float32 gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jam.checkpoint import WEIGHTS, Checkpoint
from merge.plan import Placing
from merge.recipe import MergeRecipe
from merge.run import run_merge
from tests.tiny import tiny_pair

METHODS = (
    {"method": "width", "width": {"off_diagonal": "zero"}, "family": "opt"},
    {"method": "width", "width": {"off_diagonal": "copy"}},
    {"method": "width", "width": {"off_diagonal": "zero"}},
    {"method": "width", "width": {"off_diagonal": "average"}},
    {"method": "cross"},
    {"method": "uniform"},
)


def stored_as(folder: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


@pytest.mark.parametrize("stored", [("bfloat16", "bfloat16"), ("float16", "float16"), ("float32", "bfloat16")])
@pytest.mark.parametrize(
    "changes", METHODS, ids=lambda changes: "-".join(map(str, changes.get("width", changes).values()))
)
def test_placed_values_are_those_that_float32_gives(
    tmp_path: Path, changes: dict, stored: tuple[str, str], monkeypatch: pytest.MonkeyPatch
):
    family = changes.get("family", "llama")
    changes = {key: value for key, value in changes.items() if key != "family"}
    text, image = tiny_pair(tmp_path, family=family)
    for folder, dtype in zip((text, image), stored, strict=True):
        stored_as(folder, getattr(torch, dtype))
    recipe = MergeRecipe(text=text, image=image, out=tmp_path / "placed", dtype=stored[1], **changes)
    floats, read = [], Checkpoint.read

    def counted(checkpoint: Checkpoint, name: str, rows: slice | None = None) -> np.ndarray:
        floats.append(name)
        return read(checkpoint, name, rows)

    monkeypatch.setattr(Checkpoint, "read", counted)
    run_merge(recipe, quiet=True)
    converted = [name for name in floats if "layers.1.self_attn.q_proj" in name]  # others are sampled for doubts
    computes = changes["method"] == "uniform" or changes.get("width") == {"off_diagonal": "average"}
    assert bool(converted) == (computes or stored[0] != stored[1])
    monkeypatch.setattr(Placing, "keeps", lambda rule, dtype: False)
    run_merge(recipe.model_copy(update={"out": tmp_path / "computed"}), quiet=True)
    assert (tmp_path / "placed" / WEIGHTS).read_bytes() == (tmp_path / "computed" / WEIGHTS).read_bytes()
