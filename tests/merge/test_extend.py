"""A text model with new rows for image codes: what a new row is, what stays, and what it is good for at once."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from jam.checkpoint import WEIGHTS
from jam.errors import CheckpointError, MergeError
from jam.models.load import load_bundle
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD
from jam.tokens.vocabulary import JamFile
from merge.recipe import MergeRecipe
from merge.run import run_merge
from tests import step_zero
from tests.tiny import CODES_PER_IMAGE, tiny_pair

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OLD = [0, 2, *range(8, 288)]  # what the text parent trained, without the pad row
CODES, NEW = slice(288, 304), [3, 4, 6, 7, *range(288, 304)]  # the closing control, 5, takes the row of eos in a head


def extended(tmp_path: Path, pair: tuple[Path, Path], out: str = "out", **choices) -> Path:
    seed = choices.pop("seed", 0)
    recipe = MergeRecipe(
        method="extend", text=pair[0], image=pair[1], out=tmp_path / out, dtype="float32", extend=choices, seed=seed
    )
    return run_merge(recipe, quiet=True)


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / WEIGHTS)


@pytest.fixture
def untied(tmp_path: Path) -> tuple[Path, Path]:
    """A Llama and an image parent of another family, another depth and another width."""
    changes = {"text_tie_word_embeddings": False, "image_hidden_size": 48, "image_num_hidden_layers": 2}
    return tiny_pair(tmp_path, text_family="llama", **changes)


def test_the_result_is_the_text_parents_class_and_its_text_is_the_parents(tmp_path, untied):
    out = extended(tmp_path, untied)
    ours, theirs = weights(out), weights(untied[0])
    for name, tensor in theirs.items():
        if name in (EMBED, HEAD):
            assert np.array_equal(ours[name][OLD], tensor[OLD])
        else:
            assert np.array_equal(ours[name], tensor)
    assert ours.keys() == theirs.keys() and ours[EMBED].shape == (304, 32)
    ids = torch.tensor([[0, *range(20, 60)]])
    parent, plain = (AutoModelForCausalLM.from_pretrained(path) for path in (untied[0], out))
    with torch.no_grad():
        assert torch.equal(plain(ids).logits[..., OLD], parent(ids).logits[..., OLD])
    bundle = load_bundle(out)
    assert bundle.image is not None and bundle.vocabulary == JamFile.read(untied[1]).vocabulary
    with torch.no_grad():
        scores = bundle.logits(ids, torch.full_like(ids, IMAGE_HEAD))[0]
    assert scores[0, -1].argmax() in range(288, 304) or scores[0, -1].argmax() == 5
    assert type(bundle.model).__name__ == "LlamaForCausalLM" and TEXT_HEAD == 0


def test_mean_rows(tmp_path, untied):
    for name, parent in ((EMBED, EMBED), (HEAD, HEAD)):
        rows = weights(untied[0])[parent][OLD].astype(np.float64)
        found = weights(extended(tmp_path, untied, f"out-{name}", table="mean"))[name][NEW]
        assert np.allclose(found, rows.mean(0), atol=1e-6)


def test_normal_rows_have_the_mean_and_the_spread_of_the_old_ones_column_by_column(tmp_path):
    pair = tiny_pair(tmp_path, text_family="llama", text_tie_word_embeddings=False)
    draws = [weights(extended(tmp_path, pair, f"out{seed}", seed=seed)) for seed in range(16)]
    for name in (EMBED, HEAD):
        rows = weights(pair[0])[name][OLD].astype(np.float64)
        new = np.concatenate([draw[name][NEW] for draw in draws]).astype(np.float64)
        error = rows.std(0) / np.sqrt(len(new))
        assert (abs(new.mean(0) - rows.mean(0)) < 5 * error).all()
        assert np.allclose(new.std(0) / rows.std(0), 1.0, atol=0.2)
        assert len(np.unique(new, axis=0)) == len(new)  # no two alike
    assert np.array_equal(draws[0][EMBED], weights(extended(tmp_path, pair, "again"))[EMBED])


def test_rows_of_the_image_parent(tmp_path):
    pair = tiny_pair(tmp_path, text_family="llama", tie_word_embeddings=False)
    ours = weights(extended(tmp_path, pair, table="parent", head="parent"))
    image = weights(pair[1])
    assert np.array_equal(ours[EMBED][NEW], image["model.decoder.embed_tokens.weight"][NEW])
    assert np.array_equal(ours[HEAD][CODES], image[HEAD][CODES])
    assert np.array_equal(ours[EMBED][OLD], weights(pair[0])[EMBED][OLD])


def test_a_head_of_zeros_beside_a_table_by_chance(tmp_path, untied):
    ours = weights(extended(tmp_path, untied, table="normal", head="zero"))
    assert not ours[HEAD][NEW].any() and ours[EMBED][NEW].any(1).all()
    bundle = load_bundle(tmp_path / "out")
    ids = torch.tensor([[0, 9, 10, 5]])
    with torch.no_grad():
        scores = bundle.logits(ids, torch.full_like(ids, IMAGE_HEAD))[0][0, -1, 288:]
    assert not scores.any()  # every code is as likely


def test_another_tokenizer_keeps_the_text_parents_words(tmp_path):
    pair = tiny_pair(tmp_path, text_family="llama", image_merges=12)
    out = extended(tmp_path, pair)
    vocabulary = JamFile.read(out).vocabulary
    assert vocabulary.image_span.stop == vocabulary.size and len(weights(out)[EMBED]) == vocabulary.size
    assert (out / "tokenizer.json").read_bytes() == (pair[0] / "tokenizer.json").read_bytes()
    assert load_bundle(out).vocabulary.converses


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_an_image_tokenizer_is_image_parent_enough(tmp_path, family):
    """A plain LLM and a VQGAN, neither of which knows of jam."""
    text, image = tiny_pair(tmp_path, text_family=family, tie_word_embeddings=False)
    (text / "jam.json").unlink()
    out = extended(tmp_path, (text, image / "image_tokenizer"), head="zero")
    bundle = load_bundle(out)
    vocabulary = bundle.vocabulary
    assert vocabulary.codebook_size == 16 and vocabulary.codes_per_image == 4 and vocabulary.converses
    assert {"mask", "infill", "begin_image", "end_image"} <= vocabulary.controls.keys()
    ours, theirs = weights(out), weights(text)
    assert np.array_equal(ours[EMBED][: len(theirs[EMBED])], theirs[EMBED]) and len(ours[EMBED]) == vocabulary.size
    assert (out / "image_tokenizer" / WEIGHTS).read_bytes() == (image / "image_tokenizer" / WEIGHTS).read_bytes()
    fates = json.loads((out / "report.json").read_text())["inputs"]["image"]
    assert fates and all(fate.startswith("to image_tokenizer/") for fate in fates.values())
    assert step_zero.draws(bundle) == CODES_PER_IMAGE
    with pytest.raises(CheckpointError, match=r"jam\.json|tokenizer\.json"):
        run_merge(MergeRecipe(method="cross", text=text, image=image / "image_tokenizer", out=tmp_path / "no"))


def test_rows_of_an_image_parent_without_a_network_are_refused(tmp_path):
    text, image = tiny_pair(tmp_path, text_family="llama", tie_word_embeddings=False)
    with pytest.raises(MergeError, match=r"extend\.table is parent"):
        extended(tmp_path, (text, image / "image_tokenizer"), table="parent")


def test_every_row_and_every_tensor_is_accounted_for(tmp_path, untied):
    report = json.loads((extended(tmp_path, untied, head="zero") / "report.json").read_text())
    assert report["rows"][EMBED]["counts"] == {"text row": 283, "new: normal around the mean of text rows": 21}
    assert report["rows"][HEAD]["counts"] == {"text row": 283, "new: zero": 20, "new: text eos row": 1}
    fates = report["inputs"]["image"]
    assert fates and all(fate.startswith("left out: the vocabulary") for fate in fates.values())


@pytest.mark.parametrize(
    ("changes", "choices", "message"),
    [
        ({"image_hidden_size": 48}, {"table": "parent"}, "extend.table is parent, and the width is 32 .* and 48"),
        ({}, {"head": "zero"}, "the text parent's head is its table; remove extend.head"),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, changes, choices, message):
    pair = tiny_pair(tmp_path, text_family="llama", **changes)
    with pytest.raises(MergeError, match=message):
        extended(tmp_path, pair, **choices)
