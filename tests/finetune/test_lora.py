"""Adapters over every kind of network: they start as the base, learn, resume, merge and reload."""

import json
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import PeftModel
from safetensors.torch import load_file

from finetune.lora import adapt, new_rows, targets
from finetune.loss import TokenLoss
from finetune.optim import build_optimizer
from finetune.recipe import FinetuneRecipe, LoraSection, LossSection, OptimSection
from finetune.run import run_finetune
from finetune.saving import checkpoint
from jam.errors import RecipeError, RunError
from jam.models.cross import LORA_TARGETS
from jam.models.load import Bundle, load_bundle
from jam.recipe import load_recipe
from tests.finetune.test_loss import batch_of
from tests.laws.test_data_laws import recipe_for
from tests.laws.test_training_laws import StopAfter, final_weights
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross

NAMES = ["opt", "untied", "llama", "gemma2", "chameleon", "separate", "apart", "shared"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("lora")
    text, image = tiny_pair(root)
    found = {"opt": image, "untied": tiny_pair(root / "untied", tie_word_embeddings=False)[1]}
    for family in ("llama", "gemma2", "chameleon", "phi3"):
        found[family] = tiny_pair(root / family, family=family)[1]
    for tables in ("separate", "shared"):
        found[tables] = tiny_cross(root / tables, text, image, gate=0.5, tables=tables)
    found["apart"] = tiny_cross(root / "apart", *tiny_pair(root / "two", tie_word_embeddings=False), gate=0.5)
    found["closed"] = tiny_cross(root / "closed", text, image)
    return found


def logits(bundle: Bundle) -> torch.Tensor:
    batch = batch_of()
    with torch.no_grad():
        return bundle.logits(batch.ids, batch.head_ids, attention_mask=batch.mask, position_ids=batch.positions)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_adapters_start_as_the_base_learn_and_reload(folders, name, method, tmp_path):
    bundle = load_bundle(folders[name])
    before = logits(bundle)
    base = {n: t.clone() for n, t in bundle.model.state_dict().items()}
    adapted = adapt(bundle, LoraSection(r=2, method=method, new_rows=True), seed=0)
    assert torch.equal(logits(bundle), before)  # bit for bit
    optimizer = build_optimizer(bundle.model, OptimSection(lr=0.05), adapters=True)
    network = TokenLoss(bundle, LossSection(chunk=7))
    assert network.narrow
    for _ in range(2):
        network(batch_of())[0].mean().backward()
        learnt = {n for n, p in bundle.model.named_parameters() if p.grad is not None}
        assert learnt == {n for n, p in bundle.model.named_parameters() if p.requires_grad}
        optimizer.step()
        optimizer.zero_grad()
    trained = logits(bundle)
    assert (trained - before).abs().max() > 1e-2
    adapted.save_pretrained(tmp_path)
    again = load_bundle(folders[name])
    again_model = PeftModel.from_pretrained(again.model, tmp_path)
    assert torch.equal(logits(again), trained)
    again.model = again_model.merge_and_unload()
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=1e-4)
    after = again.model.state_dict()
    assert after.keys() == base.keys()
    image, text = bundle.vocabulary.image_span, bundle.vocabulary.spans[1]
    for table in (n for n in after if "embed_tokens" in n or n == "shared.embed.weight"):
        assert torch.equal(after[table][text.start : text.stop], base[table][text.start : text.stop]), table
        assert (after[table][image.start : image.stop] != base[table][image.start : image.stop]).any(1).sum() > 3, table
    frozen = [n for n in after if "norm" in n or n.endswith("gate")]
    assert all(torch.equal(after[n], base[n]) for n in frozen)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_start_as_the_base_under_bf16(folders, method):
    bundle, batch = load_bundle(folders["llama"]), batch_of()
    network = TokenLoss(bundle, LossSection())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        before = network(batch)
        adapt(bundle, LoraSection(r=2, method=method), seed=0)
        assert torch.equal(network(batch), before)


def run_of(tmp_path: Path, model: Path, out: str, **changes) -> FinetuneRecipe:
    lora = {"r": 2, "dropout": 0.1, "new_rows": True} | changes.pop("lora", {})
    raw = recipe_for(tmp_path).model_dump(mode="json")
    raw |= {"model": str(model), "output_dir": str(tmp_path / out), "lora": lora, "save": {"every": 2, "keep": 2}}
    raw["optim"] |= {"lr": 0.02, "warmup": 0}
    raw["train"] |= changes
    return FinetuneRecipe.model_validate(raw)


@pytest.mark.parametrize(("name", "precision"), [("opt", "fp32"), ("llama", "bf16"), ("separate", "fp32")])
def test_a_run_leaves_merged_weights_and_an_adapter_and_resumes_bit_for_bit(
    folders, tmp_path, name, precision, monkeypatch
):
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # which remembers a process's precision
    whole = run_finetune(run_of(tmp_path, folders[name], "whole", precision=precision))
    broken = run_of(tmp_path, folders[name], "broken", precision=precision)
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run_finetune(broken, reporter=StopAfter(stop))
    resumed = run_finetune(broken)
    weights, base = final_weights(whole), final_weights(folders[name])
    assert weights.keys() == base.keys()
    assert all(torch.equal(tensor, final_weights(resumed)[key]) for key, tensor in weights.items())
    assert sum(not torch.equal(tensor, weights[key]) for key, tensor in base.items()) > 10
    kept = load_file(checkpoint.listed(whole.parent)[0] / "model.safetensors")
    assert kept and all("lora_" in key or "trainable_tokens_delta" in key for key in kept)
    onto = load_bundle(folders[name])
    PeftModel.from_pretrained(onto.model, whole / "adapter")
    torch.testing.assert_close(logits(onto), logits(load_bundle(whole)), rtol=1e-4, atol=1e-4)
    assert sorted(p.name for p in (whole / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    again = run_finetune(run_of(tmp_path, whole, "again", lora={"new_rows": False}, precision=precision))
    config = json.loads((again / "adapter/adapter_config.json").read_text())
    assert config["trainable_token_indices"] is None and config["base_model_name_or_path"] == str(whole)


def test_every_linear_map_is_a_target_but_heads(folders):
    models = {name: load_bundle(folders[name]).model for name in ("phi3", "llama", "separate", "shared")}
    leaves = {name: {n.split(".")[-1] for n in targets(model, None)} for name, model in models.items()}
    assert leaves["phi3"] == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert leaves["separate"] == leaves["shared"] <= set(LORA_TARGETS)
    assert leaves["llama"] == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(name.startswith("cross.") for name in targets(models["separate"], r"^cross\."))


def test_rows_of_a_towers_head_are_its_own(folders):
    for name in ("separate", "apart"):
        bundle = load_bundle(folders[name])
        rows, span = new_rows(bundle.model, bundle.vocabulary), bundle.vocabulary.image_span
        own = rows["text.lm_head"]
        assert len(rows) == 4 and (own == rows["text.model.decoder.embed_tokens"]) == (name == "separate")
        assert (max(own) < span.start) == (name == "apart") and max(rows["image.lm_head"]) == span.stop - 1


def test_what_does_not_hold_is_refused_in_one_line(folders, tmp_path):
    with pytest.raises(RunError, match=r"gate of cross\.0\.image is zero"):
        adapt(load_bundle(folders["closed"]), LoraSection(), seed=0)
    adapt(load_bundle(folders["closed"]), LoraSection(targets=r"^text\."), seed=0)
    with pytest.raises(RunError, match="matches no linear map"):
        adapt(load_bundle(folders["opt"]), LoraSection(targets="lm_head"), seed=0)
    raw = run_of(tmp_path, folders["opt"], "out").model_dump(mode="json")
    raw["optim"]["groups"] = [{"match": "embed", "lr_mul": 1.0, "rows": [[0, 4]]}]
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(raw))
    with pytest.raises(RecipeError, match=r"lora\.new_rows: true"):
        load_recipe(file, FinetuneRecipe)
    raw["optim"]["groups"] = [{"match": r"q_proj\.weight$", "lr_mul": 2.0}]  # of the base: frozen
    with pytest.raises(RunError, match="match no parameter"):
        run_finetune(FinetuneRecipe.model_validate(raw))


def test_a_rank_that_no_map_has_is_refused(folders):
    with pytest.raises(RunError, match="no map that it adapts has a rank above 32"):
        adapt(load_bundle(folders["opt"]), LoraSection(r=10**15), 0)
