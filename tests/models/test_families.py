"""The tensor tables against transformers' own models, and the refusals of what they do not describe."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jam.checkpoint import WEIGHTS, open_checkpoint
from jam.errors import CheckpointError
from jam.models.families import FAMILIES, check_tensors, family_of, rope
from tests.tiny import tiny_parent

VARIANTS = [
    ("opt", {}),
    ("opt", {"enable_bias": True, "layer_norm_elementwise_affine": True}),
    ("opt", {"tie_word_embeddings": False}),
    ("llama", {}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("family", "changes"), VARIANTS)
def test_every_tensor_of_transformers_is_claimed(tmp_path: Path, family: str, changes: dict):
    checkpoint = open_checkpoint(tiny_parent(tmp_path, False, 0, family, **changes))
    found = family_of(checkpoint.config, "here")
    assert check_tensors(checkpoint, found).keys() == checkpoint.tensors.keys()


def test_both_families_are_covered():
    assert {family for family, _ in VARIANTS} == FAMILIES.keys()


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
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    new = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}}
    assert rope(old) == rope(new) != rope({})
