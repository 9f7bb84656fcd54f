"""The tensor tables against transformers' own models, and the refusals of what they do not describe."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from jam.checkpoint import WEIGHTS, open_checkpoint
from jam.errors import CheckpointError
from jam.models.families import FAMILIES, check_tensors, family_of
from jam.models.tower import network_class
from jam.models.traits import trait
from tests.tiny import tiny_config, tiny_parent

CHANGES = [
    {},
    {"attention_bias": True, "mlp_bias": True},
    {"tie_word_embeddings": False, "head_dim": 24},
    {"num_key_value_heads": 4, "hidden_size": 48},
]
OPT_CHANGES = [{"enable_bias": True, "layer_norm_elementwise_affine": True}, {"tie_word_embeddings": False}]
VARIANTS = [
    *((family, changes) for family in FAMILIES for changes in CHANGES if family != "opt"),
    *(("opt", changes) for changes in [{}, *OPT_CHANGES]),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_card_promises_the_auto_class_where_it_knows_the_family(family: str):
    assert FAMILIES[family].automatic == (family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_every_tensor_of_transformers_is_claimed_with_its_shape(family: str, changes: dict):
    config = tiny_config(family, vocab_size=96, **changes)
    with torch.device("meta"):
        model = network_class(family)(config)
    stored = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if config.tie_word_embeddings:
        del stored["lm_head.weight"]
    found, saved = FAMILIES[family], config.to_dict()
    sizes = found.sizes(saved)
    assert {name: found.shape(sizes, axes) for name, axes in found.tensors(saved).items()} == stored


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_what_old_transformers_left_out_means_its_default(family: str, changes: dict):
    """transformers 4 saved only the keys that differ from the defaults."""
    config = tiny_config(family, vocab_size=96, **changes)
    whole, default = config.to_dict(), type(config)().to_dict()
    brief = {key: value for key, value in whole.items() if key == "model_type" or value != default.get(key)}
    found = FAMILIES[family]
    assert found.sizes(brief) == found.sizes(whole) and found.tensors(brief) == found.tensors(whole)
    assert all(trait(brief, key) == trait(whole, key) for key in found.alike)


def test_absent_keys_mean_what_transformers_means(tmp_path: Path):
    """Older transformers saved only the keys that differ from its defaults."""
    folder = tiny_parent(tmp_path, False, 0, "opt", enable_bias=True, layer_norm_elementwise_affine=True)
    config = json.loads((folder / "config.json").read_text())
    for key in FAMILIES["opt"].defaults:
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    assert len(check_tensors(checkpoint, family_of(checkpoint.config, "here"))) == len(checkpoint.tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=torch.zeros(3)), r"tensor extra \[3\] is no part of a opt model"),
        (lambda t: t.pop("model.decoder.layers.1.fc2.weight"), r"layers\.1\.fc2\.weight \[32, 64\] is missing"),
        (lambda t: t.update({"model.decoder.layers.0.fc1.weight": torch.zeros(64, 31)}), r"is \[64, 31\], config.json"),
    ],
)
def test_refuses_tensors_that_the_config_does_not_describe(tmp_path: Path, change: Callable, message: str):
    folder = tiny_parent(tmp_path, False, 0)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=message):
        check_tensors(checkpoint, family_of(checkpoint.config, "here"))


@pytest.mark.parametrize("layers", [10**9, 10**30, 10**4000])
def test_layers_beyond_the_tensors_are_refused_before_their_names_are_made(tmp_path: Path, layers: int):
    folder = tiny_parent(tmp_path, False, 0)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"more layers|num_hidden_layers is above"):
        check_tensors(checkpoint, family_of(checkpoint.config, "here"))


def test_a_head_beside_a_tied_config_is_left_out(tmp_path: Path):
    folder = tiny_parent(tmp_path, False, 0)
    tensors = load_file(folder / WEIGHTS)
    save_file(tensors | {"lm_head.weight": torch.zeros(288, 32)}, folder / WEIGHTS)
    checkpoint = open_checkpoint(folder)
    assert "lm_head.weight" not in check_tensors(checkpoint, family_of(checkpoint.config, "here"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "mamba"}, "model type 'mamba'; known families are opt, llama"),
        ({}, "model type None"),
        ({"model_type": "opt", "hidden_size": 64, "word_embed_proj_dim": 32}, "word_embed_proj_dim 32 differs"),
        ({"model_type": "opt", "do_layer_norm_before": False}, "only pre-norm"),
        ({"model_type": "opt", "_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
    ],
)
def test_refuses_unknown_families_and_variants(config: dict, message: str):
    with pytest.raises(CheckpointError, match=message):
        family_of(config, "here")


@pytest.mark.parametrize("value", [None, 0, "32", True, 1.5])
def test_refuses_a_size_that_is_no_size(value: object):
    config = {"model_type": "opt", "hidden_size": value, "num_hidden_layers": 2, "num_attention_heads": 2}
    config |= {"ffn_dim": 8, "vocab_size": 9, "max_position_embeddings": 4}
    with pytest.raises(CheckpointError, match="hidden_size is"):
        FAMILIES["opt"].sizes(config)


def test_rope_is_read_in_both_spellings():
    base = {"model_type": "llama"}
    old = base | {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = base | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert trait(old, "rope") == trait(new, "rope") != trait(base, "rope")


def test_two_rotary_speeds_are_read_in_both_spellings():
    base = {"model_type": "gemma3_text"}
    linear = {"rope_type": "linear", "factor": 8.0}
    old = base | {"rope_theta": 5e5, "rope_local_base_freq": 7e3, "rope_scaling": linear}
    new = {
        "full_attention": linear | {"rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
    }
    assert trait(old, "rope") == trait(base | {"rope_parameters": new}, "rope") != trait(base, "rope")


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("llama", {"rope_parameters": PLAIN, "rope_scaling": YARN}),
        ("llama", {"rope_parameters": PLAIN, "rope_scaling": YARN | {"rope_theta": 2e4}}),
        ("llama", {"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2.0}}),
        ("llama", {"rope_parameters": PLAIN, "rope_scaling": None}),
        (
            "gemma3_text",
            {
                "rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN | {"rope_theta": 1e4}},
                "rope_scaling": YARN,
            },
        ),
    ],
)
def test_a_rope_scaling_beside_rope_parameters_means_what_transformers_means(family: str, given: dict):
    theirs = CONFIG_MAPPING[family](**copy.deepcopy(given)).rope_parameters
    ours = trait({"model_type": family} | given, "rope")
    nested = family == "gemma3_text"
    for kind in ("full_attention", "sliding_attention") if nested else (None,):
        own, other = (found[kind] if kind else found for found in (ours, theirs))
        assert {"partial_rotary_factor": 1.0} | other == own | ({"type": other["type"]} if "type" in other else {})


@pytest.mark.parametrize(
    "given",
    [
        {"rope_scaling": "yarn"},
        {"rope_parameters": [1]},
        {"rope_theta": "abc"},
        {"rope_theta": 10**400},
        {"rope_parameters": {"rope_theta": None}, "rope_theta": None},
        {"rope_scaling": {"rope_type": 7}},
        {"partial_rotary_factor": "x"},
    ],
)
def test_rotary_settings_of_other_types_are_refused(given: dict):
    with pytest.raises(CheckpointError, match=r"here/config\.json: .* required"):
        trait({"model_type": "llama"} | given, "rope", "here/config.json")


@pytest.mark.parametrize(
    ("family", "given"),
    [
        ("mistral", {"sliding_window": "8"}),
        ("mistral", {"sliding_window": 0}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": [1]}),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"]}),
        ("gemma2", {"sliding_window_pattern": 0}),
        ("gemma2", {"layer_types": "full_attention"}),
        ("gemma2", {"layer_types": ["full_attention", "Sliding_Attention", "full_attention"]}),
        ("mistral", {"layer_types": [1, None, {}]}),
        ("qwen2", {"use_sliding_window": "false"}),
        ("smollm3", {"no_rope_layer_interval": 0}),
        ("smollm3", {"no_rope_layers": [1]}),
        ("smollm3", {"no_rope_layers": 1}),
        ("smollm3", {"no_rope_layers": ["0", [0], 1]}),
    ],
)
def test_settings_of_layers_of_other_types_are_refused(family: str, given: dict):
    key = "rotary_layers" if family == "smollm3" else "windows"
    config = {"model_type": family, "num_hidden_layers": 3}
    assert len(trait(config, key)) == 3
    with pytest.raises(CheckpointError, match=next(reversed(given))):
        trait(config | given, key)
