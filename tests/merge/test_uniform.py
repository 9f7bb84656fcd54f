"""Shares of the uniform merge: by tensor pattern, and as a gradient over the layers."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file

from jam.checkpoint import WEIGHTS
from merge.recipe import MergeRecipe, UniformSection
from merge.run import run_merge
from merge.uniform import share
from tests.tiny import tiny_pair


def test_a_gradient_is_interpolated_over_the_layers():
    section = UniformSection(weight=[0.0, 0.5, 1.0])
    found = [share(section, f"model.layers.{layer}.mlp.up_proj.weight", 5, False) for layer in range(5)]
    assert found == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert share(section, "model.embed_tokens.weight", 5, True) == 0.0
    assert share(section, "model.norm.weight", 5, False) == share(section, "lm_head.weight", 5, False) == 1.0
    assert share(section, "model.layers.0.x", 1, False) == 0.0


def test_the_first_rule_that_matches_counts():
    rules = [{"match": r"self_attn", "weight": 0.9}, {"match": r"layers\.1\.", "weight": [0.0, 1.0]}]
    section = UniformSection(weight=0.25, rules=rules)
    names = ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.weight", "model.norm.weight")
    assert [share(section, name, 3, False) for name in names] == [0.9, 0.5, 0.25]


def test_every_tensor_takes_its_own_share(tmp_path: Path):
    text, image = tiny_pair(tmp_path, family="llama")
    uniform = {"weight": [0.0, 1.0], "rules": [{"match": "k_proj", "weight": 0.5}]}
    run_merge(
        MergeRecipe(method="uniform", text=text, image=image, out=tmp_path / "out", dtype="float32", uniform=uniform)
    )
    ours, theirs, merged = (load_file(folder / WEIGHTS) for folder in (text, image, tmp_path / "out"))
    for layer, wanted in ((0, theirs), (3, ours)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert np.array_equal(merged[name], wanted[name])
        name = f"model.layers.{layer}.self_attn.k_proj.weight"
        assert np.array_equal(merged[name], np.float32(0.5) * ours[name] + np.float32(0.5) * theirs[name])
    third = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_allclose(merged[third], ours[third] / 3 + theirs[third] * 2 / 3, atol=1e-6)


@pytest.mark.parametrize(
    ("uniform", "message"),
    [
        ({"weight": []}, "an empty list"),
        ({"weight": [0.5, 1.5]}, "1.5 is no share; a number from 0 to 1"),
        ({"weight": 2}, "2 is no share; a number from 0 to 1, or a list of them, is required"),
        ({"weight": True}, "True is no share"),
        ({"weight": [0.5] * 1001}, "a list of 1001 shares; 1000 or fewer"),
        ({"rules": [{"match": "a", "weight": []}]}, "an empty list"),
        ({"rules": [{"match": "a{99999999999}", "weight": 0.5}]}, "no regular expression"),
        ({"rules": [{"match": "(" * 3000 + ")" * 3000, "weight": 0.5}]}, "no regular expression"),
        ({"rules": [{"match": "(", "weight": 0.5}]}, "no regular expression"),
    ],
)
def test_shares_that_are_none_are_refused(uniform: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        UniformSection.model_validate(uniform)
