"""The training recipes on tiny networks: each trains exactly what it says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from PIL import Image

from finetune.recipe import FinetuneRecipe
from finetune.run import run_finetune
from jam.layouts.chameleon import chameleon_vocabulary
from jam.models.load import load_bundle
from jam.recipe import load_recipe
from tests.laws.test_training_laws import final_weights
from tests.layouts.test_chameleon import release
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def fresh_precision(monkeypatch):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # which remembers a process's precision


def train(name: str, model: Path, tmp_path: Path, *overrides: str) -> Path:
    """Three steps of a recipe as it stands, but for model, length and files."""
    pictures = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    rows: dict[str, list[dict]] = {"text": [], "captions": [], "conversations": []}
    for number, pixels in enumerate(pictures):
        file = f"{number}.png"
        Image.fromarray(pixels).save(tmp_path / file)
        picture = [{"type": "image", "path": file}]
        turns = [{"role": "user", "content": "Draw a cat."}, {"role": "assistant", "content": picture}]
        rows["text"].append({"text": f"line {number} of the red cat"})
        rows["captions"].append({"image": file, "caption": f"the red cat {number}"})
        rows["conversations"].append({"messages": turns})
    changes = [f"model={model}", f"output_dir={tmp_path / name}", "train.tokens=null", "train.steps=3"]
    changes += ["data.seq_len=64", "train.micro_batch_size=2", "train.global_batch_size=4", "optim.warmup=0"]
    for kind in load_recipe(RECIPES / f"{name}.yaml", FinetuneRecipe).data.mix:
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[kind]))
        changes.append(f"data.mix.{kind}.path={path}")
    return run_finetune(load_recipe(RECIPES / f"{name}.yaml", FinetuneRecipe, [*changes, *overrides]))


def moved(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def test_cross_only_moves_every_tensor_of_the_blocks_and_none_besides(tmp_path):
    model = tiny_cross(tmp_path / "fused", *tiny_pair(tmp_path), gate=0.5)
    before = final_weights(model)
    found = moved(before, final_weights(train("cross_only", model, tmp_path)))
    assert found == {name for name in before if name.startswith("cross.")}


def test_cross_only_opens_the_gates_of_a_fresh_merge(tmp_path):
    model = tiny_cross(tmp_path / "fused", *tiny_pair(tmp_path))
    before = final_weights(model)
    found = moved(before, final_weights(train("cross_only", model, tmp_path)))
    assert {name for name in before if name.endswith(".gate")} < found <= {n for n in before if n.startswith("cross.")}


def test_anole_rows_moves_the_heads_rows_of_the_codes_and_none_besides(tmp_path):
    _, model = tiny_pair(tmp_path, family="chameleon", tie_word_embeddings=False)
    span = load_bundle(model).vocabulary.image_span
    head = f"{{match: '^lm_head\\.', lr_mul: 1.0, rows: [[{span.start}, {span.stop}]]}}"
    rest = "{match: '.', lr_mul: 0.0}"
    before = final_weights(model)
    after = final_weights(train("anole_rows", model, tmp_path, f"optim.groups=[{head}, {rest}]"))
    assert moved(before, after) == {"lm_head.weight"}
    rows = (before["lm_head.weight"] != after["lm_head.weight"]).any(1).nonzero()[:, 0].tolist()
    assert rows == list(range(span.start, span.stop))
    groups = load_recipe(RECIPES / "anole_rows.yaml", FinetuneRecipe).optim.groups
    assert [(g.match, g.lr_mul) for g in groups] == [(r"^lm_head\.", 1.0), (".", 0.0)]  # as trained here
    codes = chameleon_vocabulary(release(), 65_536)[0].image_span
    assert groups[0].rows == ((codes.start, codes.stop),)


def test_lora_on_one_gpu_leaves_a_plain_folder_and_an_adapter(tmp_path):
    model = tiny_cross(tmp_path / "fused", *tiny_pair(tmp_path), gate=0.5)
    final = train("lora_one_gpu", model, tmp_path)
    found = moved(final_weights(model), final_weights(final))
    assert found and not any("norm" in name or name.endswith("gate") for name in found)
    assert {"text.model.decoder.embed_tokens.weight", "cross.0.text.q_proj.weight"} < found
    base = load_bundle(model)
    PeftModel.from_pretrained(base.model, final / "adapter")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        expected = load_bundle(final).model(ids).logits
        torch.testing.assert_close(base.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
