"""Networks of new weights: their shape, their initialisation, their folder, and that a resumed run is the same one."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finetune.recipe import FinetuneRecipe, ScratchSection
from finetune.run import run_finetune
from finetune.saving.resume import changed_settings, fixed_settings
from finetune.scratch import cm3leon_weights, fresh_network, scratch_bundle, scratch_config
from jam.errors import CheckpointError, RecipeError, RunError
from jam.layouts import open_model
from jam.models.families import FAMILIES, check_tensors, family_of
from jam.models.load import load_bundle
from jam.models.tower import network_class
from jam.recipe import load_recipe
from jam.tokens.vocabulary import JamFile, Span, Vocabulary
from tests.laws.test_data_laws import recipe_for
from tests.laws.test_training_laws import StopAfter, final_weights
from tests.tiny import edit_json, tiny_pair, tiny_parent
from tests.tiny_cross import tiny_cross

RECIPES = Path(__file__).parents[2] / "recipes"
SHAPE = {
    "num_hidden_layers": 3,
    "hidden_size": 24,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
}


def recipe_of(tmp_path: Path, out: str = "run", **scratch) -> FinetuneRecipe:
    raw = recipe_for(tmp_path).model_dump(mode="json")
    raw |= {"output_dir": str(tmp_path / out), "scratch": SHAPE | scratch, "save": {"every": 2, "keep": 2}}
    return FinetuneRecipe.model_validate(raw)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_the_sections_shape_and_nothing_of_the_folders_weights(tmp_path, family):
    folder = tiny_parent(tmp_path / "folder", True, 0, family)
    for shard in folder.glob("*.safetensors"):
        shard.unlink()  # not read
    section = ScratchSection(**SHAPE, num_key_value_heads=None if family == "opt" else 1)
    bundle = scratch_bundle(folder, section, seed=0)
    config = scratch_config(folder, section, bundle.vocabulary)
    sizes = FAMILIES[family].sizes(config)
    assert (sizes.layers, sizes.model, sizes.heads, sizes.ffn, sizes.positions) == tuple(SHAPE.values())
    assert sizes.vocab == bundle.vocabulary.size and sizes.head_dim == 12
    bundle.model.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved/config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "jam.json"):
        shutil.copy(folder / name, tmp_path / "saved" / name)
    checkpoint = open_model(tmp_path / "saved").checkpoint
    assert check_tensors(checkpoint, family_of(checkpoint.config, "here"))


def test_weights_follow_the_seed_and_leave_the_generator_alone(tmp_path):
    _, folder = tiny_pair(tmp_path)
    section = ScratchSection(**SHAPE)
    config = scratch_config(folder, section, JamFile.read(folder).vocabulary)
    state = torch.get_rng_state()
    one, again, other = (fresh_network(config, section, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert not torch.equal(one["model.decoder.layers.0.fc1.weight"], other["model.decoder.layers.0.fc1.weight"])
    hollow = fresh_network(config, section, 0, hollow=True)
    assert all(parameter.is_meta for parameter in hollow.parameters())
    assert [name for name, _ in hollow.named_parameters()] == list(
        dict(fresh_network(config, section, 0).named_parameters())
    )


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_the_classes_own_initialisation_has_the_sections_deviation(tmp_path, family):
    folder = tiny_parent(tmp_path, True, 0, family)
    for std in (0.01, 0.04):
        model = scratch_bundle(folder, ScratchSection(**SHAPE | {"hidden_size": 128}, init_std=std), 0).model
        found = {n: p.std().item() for n, p in model.named_parameters() if p.dim() == 2}
        assert all(value == pytest.approx(std, rel=0.1) for value in found.values())


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_cm3leons_initialisation(tmp_path, family):
    folder = tiny_parent(tmp_path, True, 0, family)
    section = ScratchSection(**SHAPE | {"hidden_size": 128}, init="cm3leon")
    model = scratch_bundle(folder, section, 0).model
    outputs = ("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")
    for name, parameter in model.named_parameters():
        if name.endswith(outputs):
            assert not parameter.any(), name
        elif "embed_positions" in name:
            assert parameter.std().item() == pytest.approx(0.0002, rel=0.02)
        elif parameter.dim() == 2:
            # a normal that is cut at 3 deviations keeps 98.66 % of its own
            assert parameter.std().item() == pytest.approx(0.006 * 0.9866, rel=0.02), name
            assert parameter.abs().max() <= 0.018
    pad = model.config.pad_token_id
    assert not model.get_input_embeddings().weight[pad].any()
    states = model(torch.arange(20)[None], output_hidden_states=True).hidden_states
    assert torch.equal(states[0], states[-2])  # every block begins as the identity


def test_the_mini_parents_weights_are_drawn_as_they_were():
    """The first numbers of the initialisation that the shipped parents were trained from."""
    section = ScratchSection(**SHAPE)
    settings = {"model_type": "opt", "vocab_size": 64, "hidden_size": 8, "word_embed_proj_dim": 8, "ffn_dim": 16}
    settings |= {"num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 16, "pad_token_id": 1}
    settings |= {"enable_bias": False, "layer_norm_elementwise_affine": False}
    model = fresh_network(settings, section, 0)
    cm3leon_weights(model, 0.006, 2)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter)
        if "embed_positions" in name:
            expected.normal_(std=0.0002, generator=generator)
        elif not name.endswith(("out_proj.weight", "fc2.weight")):
            torch.nn.init.trunc_normal_(expected, std=0.006, a=-0.018, b=0.018, generator=generator)
        if "embed_tokens" in name:
            expected[1] = 0
        assert torch.equal(parameter, expected), name


def test_a_run_from_nothing_resumes_bit_for_bit_and_leaves_a_folder_of_its_own_shape(tmp_path):
    image = tiny_pair(tmp_path)[1]
    record = JamFile.read(image)
    (image / "merge.yaml").write_text("of other weights")
    JamFile(record.vocabulary, record.image_tokenizer, fusion={"method": "cross"}).write(image)
    whole = run_finetune(recipe_of(tmp_path, "whole", init="cm3leon", init_std=0.02))
    broken = recipe_of(tmp_path, "broken", init="cm3leon", init_std=0.02)
    for stop in (1, 3):
        with pytest.raises(KeyboardInterrupt):
            run_finetune(broken, reporter=StopAfter(stop))
    resumed = run_finetune(broken)
    weights = final_weights(whole)
    assert all(torch.equal(tensor, final_weights(resumed)[name]) for name, tensor in weights.items())
    config = json.loads((whole / "config.json").read_text())
    assert (config["hidden_size"], config["ffn_dim"], config["num_hidden_layers"]) == (24, 40, 3)
    assert config["init_std"] == 0.02 and config["vocab_size"] == record.vocabulary.size
    assert not (whole / "merge.yaml").exists() and JamFile.read(whole).fusion is None
    assert "from nothing" in (whole / "README.md").read_text()
    bundle = load_bundle(whole)
    assert bundle.image is not None and bundle.model.config.hidden_size == 24
    plain = AutoModelForCausalLM.from_pretrained(whole)
    assert torch.equal(plain(torch.arange(9)[None]).logits, bundle.model(torch.arange(9)[None]).logits)
    assert run_finetune(recipe_for(tmp_path, model=str(whole), output_dir=str(tmp_path / "on"))).is_dir()
    with pytest.raises(RunError, match=r"scratch\.init_std: was 0\.02, is 0\.03"):
        run_finetune(recipe_of(tmp_path, "broken", init="cm3leon", init_std=0.03))


def test_a_record_from_before_there_was_a_scratch_section_is_no_run_from_nothing(tmp_path):
    tiny_pair(tmp_path)
    recipe = recipe_of(tmp_path)
    old = {key: value for key, value in fixed_settings(recipe).items() if key != "scratch"}
    assert [line.split(":")[0] for line in changed_settings(old, recipe)] == ["scratch"]
    plain = recipe_for(tmp_path)
    assert (
        changed_settings({k: v for k, v in fixed_settings(plain).items() if k not in ("scratch", "lora")}, plain) == []
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {"dropuot": 0.1}}, "dropuot is no setting of a opt model"),
        ({"config": {"ffn_dim": 7}}, "ffn_dim is set by other keys"),
        ({"config": {"activation_function": "none such"}}, "transformers refuses"),
        ({"hidden_size": 25}, "no multiple of num_attention_heads 2"),
    ],
)
def test_a_shape_that_cannot_be_is_refused_in_one_line(tmp_path, change, message):
    tiny_pair(tmp_path)
    with pytest.raises(RunError, match=message) as found:
        run_finetune(recipe_of(tmp_path, **change))
    assert "\n" not in str(found.value)


def test_what_does_not_go_with_new_weights_is_refused(tmp_path):
    text, image = tiny_pair(tmp_path)
    with pytest.raises(RunError, match="a jam_cross; one network"):
        scratch_bundle(tiny_cross(tmp_path / "fused", text, image), ScratchSection(**SHAPE), 0)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe_of(tmp_path).model_dump(mode="json") | {"lora": {"r": 2}}))
    with pytest.raises(RecipeError, match="remove one of the two"):
        load_recipe(file, FinetuneRecipe)
    (image / "jam.json").unlink()
    with pytest.raises(CheckpointError, match=r"no jam\.json"):
        run_finetune(recipe_of(tmp_path))


# layers, width and rate of the paper's table 3
CM3LEON = {"350m": (24, 1024, 6e-4, 0.35e9), "760m": (24, 1536, 5e-4, 0.76e9), "7b": (32, 4096, 1.2e-4, 7e9)}


@pytest.mark.parametrize("size", CM3LEON)
def test_the_cm3leon_recipes_have_the_papers_figures_and_count_their_parameters(tmp_path, size):
    layers, width, rate, named = CM3LEON[size]
    path = RECIPES / f"cm3leon_{size}.yaml"
    recipe = load_recipe(path, FinetuneRecipe)
    scratch = recipe.scratch
    assert (scratch.num_hidden_layers, scratch.hidden_size, recipe.optim.lr) == (layers, width, rate)
    assert (recipe.data.seq_len, scratch.max_position_embeddings, recipe.optim.warmup) == (4096, 4096, 1500)
    assert recipe.train.global_batch_size * recipe.data.seq_len == 2**23  # 8M
    folder = tiny_parent(tmp_path, True, 0)
    counts = []
    for rows in (56_320, 56_320 + 8_192):
        vocabulary = Vocabulary((Span("control", 0, 8), Span("text", 8, rows)), {"bos": 0, "pad": 1, "eos": 2})
        config = scratch_config(folder, scratch, vocabulary)
        settings = {key: value for key, value in config.items() if key != "dtype"}
        with torch.device("meta"):
            model = network_class("opt")(AutoConfig.for_model(**settings))
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    assert abs(counts[0] / named - 1) < 0.05
    written = path.read_text()
    for count in counts:
        assert f"{count:,}" in written
    assert re.search(rf"{counts[0] * 16 / 1e9:.1f} GB", written)


def test_a_folder_with_another_tokenizer_is_refused(tmp_path):
    _, image = tiny_pair(tmp_path)
    edit_json(image / "image_tokenizer/config.json", {"n_embed": 8})
    with pytest.raises(CheckpointError):
        scratch_bundle(image, ScratchSection(**SHAPE), 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dropout": "x"}, "transformers refuses the configuration"),
        ({"dropout": 2.0}, "transformers refuses the configuration"),
        ({"pad_token_id": 99_999}, "transformers refuses the configuration"),
        ({"dtype": "int8"}, "dtype is 'int8'; one of float32"),
    ],
)
def test_a_setting_that_makes_no_network_is_one_line_before_the_first_step(tmp_path, config, message):
    tiny_pair(tmp_path)
    with pytest.raises(RunError, match=message) as caught:
        run_finetune(recipe_of(tmp_path, config=config))
    assert "\n" not in str(caught.value) and not list((tmp_path / "run").glob("checkpoint-*"))
