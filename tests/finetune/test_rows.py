"""Rows that begin anew: what they are, that nothing else moves, and that a resumed run does not draw them again."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from finetune.recipe import FinetuneRecipe, OptimSection
from finetune.rows import fresh_rows
from finetune.run import run_finetune
from jam.errors import RecipeError, RunError
from jam.recipe import load_recipe
from tests.laws.test_data_laws import recipe_for
from tests.laws.test_training_laws import StopAfter, final_weights
from tests.tiny import randomize, tiny_pair

FIRST, STOP = 100, 600
HEAD = "lm_head.weight"


def network() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=700, tie_word_embeddings=False, **sizes))
    randomize(model, 3)
    with torch.no_grad():
        model.lm_head.weight.add_(torch.linspace(-1, 1, 16))  # a mean of each column's own
    return model


def optim(fresh: str | None, match: str = r"^lm_head\.", rows: list[list[int]] | None = None) -> OptimSection:
    group = {"match": match, "lr_mul": 1.0, "rows": rows or [[FIRST, 350], [350, STOP]], "fresh": fresh}
    return OptimSection.model_validate({"groups": [group]})


@pytest.mark.parametrize("fresh", ["mean", "normal", "zero", "he", None])
def test_what_a_fresh_row_is(fresh):
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fresh_rows(model, optim(fresh), seed=5)
    after, again = model.state_dict(), network()
    fresh_rows(again, optim(fresh), seed=5)
    assert torch.equal(after[HEAD], again.state_dict()[HEAD])
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items() if name != HEAD)
    kept = torch.ones(700, dtype=torch.bool)
    kept[FIRST:STOP] = False
    assert torch.equal(after[HEAD][kept], before[HEAD][kept])
    new, old = after[HEAD][FIRST:STOP], before[HEAD][kept]
    error = 5 / math.sqrt(len(new))
    match fresh:
        case None:
            assert torch.equal(new, before[HEAD][FIRST:STOP])
        case "zero":
            assert not new.any()
        case "mean":
            torch.testing.assert_close(new, old.mean(0).expand_as(new))
        case "normal":
            assert ((new.mean(0) - old.mean(0)).abs() < error * old.std(0)).all()
            torch.testing.assert_close(new.std(0) / old.std(0), torch.ones(16), atol=0.2, rtol=0)
        case "he":
            assert new.mean(0).abs().max() < error * math.sqrt(2 / 16)
            assert new.std().item() == pytest.approx(math.sqrt(2 / 16), rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [[0, 701]]}, r"fresh rows \[\[0, 701\]\] of lm_head"),
        ({"rows": [[0, 700]]}, "all rows of lm_head.weight begin anew"),
        ({"match": "norm"}, "name rows of a table or a head"),
    ],
)
def test_rows_that_are_none_are_refused(change, message):
    with pytest.raises(RunError, match=message):
        fresh_rows(network(), optim("mean", **change), seed=0)


def recipe_of(tmp_path: Path, out: str) -> FinetuneRecipe:
    raw = recipe_for(tmp_path).model_dump(mode="json")
    raw |= {"output_dir": str(tmp_path / out), "save": {"every": 2, "keep": 2}}
    raw["optim"]["groups"] = [{"match": "embed_tokens", "lr_mul": 1.0, "rows": [[288, 304]], "fresh": "normal"}]
    return FinetuneRecipe.model_validate(raw)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path):
    model = tiny_pair(tmp_path)[1]
    whole = run_finetune(recipe_of(tmp_path, "whole"))
    with pytest.raises(KeyboardInterrupt):
        run_finetune(recipe_of(tmp_path, "broken"), reporter=StopAfter(3))
    resumed = run_finetune(recipe_of(tmp_path, "broken"))
    ours, base = final_weights(whole), final_weights(model)
    assert all(torch.equal(tensor, final_weights(resumed)[name]) for name, tensor in ours.items())
    table = "model.decoder.embed_tokens.weight"
    assert (ours[table][288:] != base[table][288:]).all() and torch.equal(ours[table][:288], base[table][:288])


def test_fresh_without_rows_is_refused_in_the_recipe(tmp_path):
    raw = recipe_for(tmp_path).model_dump(mode="json")
    raw["optim"]["groups"] = [{"match": "embed", "lr_mul": 1.0, "fresh": "zero"}]
    (tmp_path / "recipe.yaml").write_text(json.dumps(raw))
    with pytest.raises(RecipeError, match="add rows"):
        load_recipe(tmp_path / "recipe.yaml", FinetuneRecipe)
