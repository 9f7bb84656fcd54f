"""The training recipes on tiny networks: each trains exactly what it says."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel

from finetune.recipe import FinetuneRecipe
from jam.layouts.chameleon import chameleon_vocabulary
from jam.models.load import load_bundle
from jam.recipe import load_recipe
from tests.laws.test_training_laws import final_weights
from tests.layouts.test_chameleon import release
from tests.recipes.runs import RECIPES, train
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross


@pytest.fixture(autouse=True)
def fresh_precision(monkeypatch):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # which remembers a process's precision


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
    vocabulary = chameleon_vocabulary(release(), 65_536)[0]
    record = json.loads((model / "jam.json").read_text())
    controls = record["vocabulary"]["controls"]
    record["vocabulary"]["controls"] = {name: id for name, id in controls.items() if name in vocabulary.controls}
    (model / "jam.json").write_text(json.dumps(record | {"unconditional": ["bos", "begin_image"]}))
    span = load_bundle(model).vocabulary.image_span
    head = f"{{match: '^lm_head\\.', lr_mul: 1.0, rows: [[{span.start}, {span.stop}]], fresh: he}}"
    rest = "{match: '.', lr_mul: 0.0}"
    before = final_weights(model)
    after = final_weights(train("anole_rows", model, tmp_path, f"optim.groups=[{head}, {rest}]"))
    assert moved(before, after) == {"lm_head.weight"}
    rows = (before["lm_head.weight"] != after["lm_head.weight"]).any(1).nonzero()[:, 0].tolist()
    assert rows == list(range(span.start, span.stop))
    groups = load_recipe(RECIPES / "anole_rows.yaml", FinetuneRecipe).optim.groups
    expected = [(r"^lm_head\.", 1.0, "he"), (".", 0.0, None)]  # as trained here
    assert [(g.match, g.lr_mul, g.fresh) for g in groups] == expected
    codes = vocabulary.image_span
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
