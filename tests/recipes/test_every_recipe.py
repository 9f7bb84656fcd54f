"""Every recipe file runs: itself, through the command line, made small by overrides. A new one needs a row here."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from jam.cli import main
from jam.models.load import load_bundle
from tests.recipes.runs import RECIPES, train
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross

SMALL = [
    *("scratch.num_hidden_layers=2", "scratch.hidden_size=32", "scratch.num_attention_heads=4"),
    *("scratch.intermediate_size=64", "scratch.max_position_embeddings=128"),
]
# recipe -> the model that it is run on, overrides
TRAINING: dict[str, tuple[str, list[str]]] = {
    "pretrain": ("cross", []),
    "interleaved": ("cross", []),
    "cross_only": ("cross", []),
    "lora_one_gpu": ("open", []),
    "anole_rows": ("chameleon", ["optim.groups.0.rows=[[288, 304]]"]),
    "cm3leon_350m": ("image", SMALL),
    "cm3leon_760m": ("image", SMALL),
    "cm3leon_7b": ("image", SMALL),
    "mini/text_parent": ("text", []),
    "mini/image_parent": ("image", []),
    "mini/image_parent_2": ("image", []),
    "mini/chat": ("cross", []),
    "mini/chat_2": ("cross", []),
    "smollm2/tower": ("image", ["optim.groups.0.rows=[[0, 288]]"]),
    "smollm2/tune": ("open", ["optim.groups.0.rows=[[5, 6]]"]),
}
MERGES: dict[str, list[str]] = {
    "merge_uniform": [],
    "merge_width": [],
    "merge_cross": [],
    "merge_extend": [],
    "smollm2/merge": ["cross.pairs=[[2, 2], [4, 4]]"],
}


@pytest.fixture(autouse=True)
def fresh_precision(monkeypatch):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # which remembers a process's precision


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("recipes")
    text, image = tiny_pair(root)
    return {
        "text": text,
        "image": image,
        "cross": tiny_cross(root / "cross", text, image),
        "open": tiny_cross(root / "open", text, image, gate=0.5),
        "chameleon": tiny_pair(root / "other", family="chameleon", tie_word_embeddings=False)[1],
    }


def test_every_recipe_file_is_run_here():
    found = {path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml")}
    found = {name for name in found if not name.startswith("launch/")}  # accelerate's; tests/flows/test_launch.py
    assert found == TRAINING.keys() | MERGES.keys()


@pytest.mark.parametrize("name", TRAINING)
def test_a_training_recipe_trains_and_leaves_a_model(models, tmp_path, name):
    model, overrides = TRAINING[name]
    final = train(name, models[model], tmp_path, *overrides)
    lines = [json.loads(line) for line in (final.parent / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 3 and lines[-1]["grad_norm"] > 0
    bundle = load_bundle(final)
    assert (bundle.image is None) == (model == "text")
    before, after = load_file(models[model] / "model.safetensors"), load_file(final / "model.safetensors")
    assert before.keys() == after.keys() or "scratch" in " ".join(overrides)
    assert any(after[key].shape != tensor.shape or not torch.equal(after[key], tensor) for key, tensor in before.items()
               if key in after)  # fmt: skip


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_recipe_merges(models, tmp_path, name):
    parents = [f"text={models['text']}", f"image={models['image']}", f"out={tmp_path / 'out'}"]
    assert main(["merge", str(RECIPES / f"{name}.yaml"), *parents, *MERGES[name]]) == 0
    assert load_bundle(tmp_path / "out").image is not None
