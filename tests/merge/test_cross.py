"""Parts of the cross merge: where towers meet, new weights, the shared table."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

from jam.checkpoint import WEIGHTS
from jam.decode.options import default_options
from jam.errors import MergeError
from jam.models.heads import next_heads
from jam.models.load import load_bundle
from jam.tokens.vocabulary import JamFile
from merge.cross import exchanges
from merge.recipe import CrossSection, MergeRecipe
from merge.run import run_merge
from tests import step_zero
from tests.tiny import CODES_PER_IMAGE, tiny_pair


@pytest.mark.parametrize(
    ("depths", "every", "expected"),
    [
        ((8, 8), 2, [[2, 2], [4, 4], [6, 6], [8, 8]]),
        ((4, 6), 2, [[2, 3], [4, 6]]),
        ((6, 4), 1, [[2, 1], [3, 2], [5, 3], [6, 4]]),
        ((5, 32), 2, [[2, 13], [4, 26]]),
        ((3, 3), 4, []),
    ],
)
def test_layers_are_paired_in_proportion(depths: tuple[int, int], every: int, expected: list[list[int]]):
    assert exchanges(*depths, every) == expected


def test_pairs_always_go_forward():
    for shallow in range(1, 20):
        for deep in range(shallow, 60):
            for every in (1, 2, 4):
                pairs = exchanges(shallow, deep, every)
                assert len(pairs) == shallow // every
                assert all(a < b and c < d for (a, c), (b, d) in itertools.pairwise(pairs))
                assert not pairs or (pairs[0][1] >= 1 and pairs[-1][1] <= deep)


@pytest.mark.parametrize("changes", [{}, {"image_hidden_size": 24, "image_num_attention_heads": 4}])
def test_the_shared_table_gives_each_tower_its_parents_image_rows(tmp_path: Path, changes: dict):
    text, image = tiny_pair(tmp_path, **changes)
    out = tmp_path / "out"
    run_merge(MergeRecipe(method="cross", text=text, image=image, out=out, dtype="float32", cross={"tables": "shared"}))
    merged, name = load_file(out / WEIGHTS), "model.decoder.embed_tokens.weight"
    ours, theirs = load_file(text / WEIGHTS)[name], load_file(image / WEIGHTS)[name]
    table, into = merged["shared.embed.weight"], merged["shared.image_in.weight"]
    shared = [0, 1, 2, *range(8, 288)]
    assert np.array_equal(table[shared], ours[shared])
    image_only = [*range(3, 8), *range(288, 304)]
    assert np.allclose(table[image_only] @ into.T, theirs[image_only], atol=1e-4)
    width = theirs.shape[1]
    assert np.array_equal(merged["shared.project.weight"], np.eye(32, 32 + width))
    assert not any("embed_tokens" in tensor for tensor in merged)


@pytest.mark.parametrize("side", ["text", "image"])
def test_a_table_of_zeros_is_not_shared(tmp_path: Path, side: str):
    text, image = tiny_pair(tmp_path)
    stored = load_file(tmp_path / side / WEIGHTS)
    stored["model.decoder.embed_tokens.weight"][:] = 0
    save_file(stored, tmp_path / side / WEIGHTS)
    recipe = MergeRecipe(method="cross", text=text, image=image, out=tmp_path / "out", cross={"tables": "shared"})
    with pytest.raises(MergeError, match=rf"{side}: all rows of .* are zero"):
        run_merge(recipe)


def test_equal_tables_share_an_identity(tmp_path: Path):
    _, image = tiny_pair(tmp_path)
    out = tmp_path / "out"
    recipe = MergeRecipe(method="cross", text=image, image=image, out=out, dtype="float32", cross={"tables": "shared"})
    run_merge(recipe)
    assert np.allclose(load_file(out / WEIGHTS)["shared.image_in.weight"], np.eye(32), atol=1e-6)


def test_too_few_layers_for_an_exchange(tmp_path: Path):
    text, image = tiny_pair(tmp_path)
    recipe = MergeRecipe(method="cross", text=text, image=image, out=tmp_path / "out", cross={"every": 5})
    with pytest.raises(MergeError, match=r"cross\.every is 5 but the shallower tower has 4 layers"):
        run_merge(recipe)


def test_the_image_parents_own_sampling_goes_on(tmp_path: Path):
    text, image = tiny_pair(tmp_path)
    wanted = {"image_temperature": 0.0, "image_beams": 2}
    replace(JamFile.read(image), sampling=wanted).write(image)
    for method in ("uniform", "width", "cross"):
        run_merge(MergeRecipe(method=method, text=text, image=image, out=tmp_path / method))
        assert JamFile.read(tmp_path / method).sampling == wanted
        assert default_options(load_bundle(tmp_path / method)).image_beams == 2


def test_who_writes_the_text_says_how(tmp_path: Path):
    text, image = tiny_pair(tmp_path)
    replace(JamFile.read(text), sampling={"text_top_k": 3, "image_top_k": 4}).write(text)
    replace(JamFile.read(image), sampling={"text_temperature": 0.1, "image_top_k": 5}).write(image)
    wanted = {"cross": {"image_top_k": 5, "text_top_k": 3}, "width": {"text_temperature": 0.1, "image_top_k": 5}}
    for method, sampling in wanted.items():
        run_merge(MergeRecipe(method=method, text=text, image=image, out=tmp_path / method))
        assert JamFile.read(tmp_path / method).sampling == sampling


UNEVEN = [[1, 2], [4, 3], [5, 6]]  # in no proportion; text layer 6 stands after the last exchange
DEPTHS = {"text_num_hidden_layers": 6, "image_num_hidden_layers": 6, "image_hidden_size": 48, "image_merges": 12}


def test_pairs_by_hand_are_kept_and_the_towers_are_their_parents(tmp_path: Path):
    """The theorem of two towers with zero gates asks nothing of where they meet."""
    text, image = tiny_pair(tmp_path, text_family="llama", **DEPTHS)
    cross = {"pairs": UNEVEN}
    run_merge(MergeRecipe(method="cross", text=text, image=image, out=tmp_path / "fused", dtype="float32", cross=cross))
    fused, llm, painter = (load_bundle(folder, torch.float64) for folder in (tmp_path / "fused", text, image))
    assert fused.model.config.exchanges == UNEVEN and len(fused.model.cross) == 3
    found = step_zero.distances(fused, llm, painter)
    assert max(found.text, found.codes, found.caption) < 1e-9 and found.spread > 0.1
    assert step_zero.draws(fused) == CODES_PER_IMAGE

    for exchange in fused.model.cross:  # open gates: the blocks are there, and saved and reloaded the model is the same
        exchange.text.gate.data.fill_(0.3)
        exchange.image.gate.data.fill_(-0.2)
    ids = torch.tensor([[0, 20, 33, 40, 2, 11]])
    opened = fused.logits(ids, next_heads(ids, fused.vocabulary))[0]
    assert step_zero.distances(fused, llm, painter).text > 1e-3
    shutil.copytree(tmp_path / "fused", tmp_path / "again")
    fused.model.save_pretrained(tmp_path / "again")
    again = load_bundle(tmp_path / "again", torch.float64)
    assert again.model.config.exchanges == UNEVEN
    torch.testing.assert_close(again.logits(ids, next_heads(ids, again.vocabulary))[0], opened, rtol=0, atol=1e-9)


def test_pairs_in_proportion_by_hand_are_the_same_bytes(tmp_path: Path):
    text, image = tiny_pair(tmp_path)
    for name, cross in (("every", {}), ("pairs", {"pairs": [[2, 2], [4, 4]]})):
        run_merge(MergeRecipe(method="cross", text=text, image=image, out=tmp_path / name, cross=cross))
    for file in (WEIGHTS, "config.json"):
        assert (tmp_path / "every" / file).read_bytes() == (tmp_path / "pairs" / file).read_bytes()


@pytest.mark.parametrize(
    ("cross", "message"),
    [
        ({"pairs": [[1, 1]], "every": 1}, "pairs are given and every is 1"),
        ({"pairs": []}, "an empty list"),
        ({"pairs": [[2, 2], [2, 3]]}, r"pair \[2, 3\] follows \[2, 2\]"),
        ({"pairs": [[2, 2], [3, 1]]}, r"pair \[3, 1\] follows \[2, 2\]"),
        ({"pairs": [[0, 1]]}, "greater than or equal to 1"),
        ({"pairs": [[1]]}, "Field required"),
    ],
)
def test_pairs_that_are_none_are_refused(cross: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        CrossSection.model_validate(cross)


@pytest.mark.parametrize(("last", "side"), [([5, 4], "text"), ([4, 5], "image")])
def test_pairs_beyond_a_tower_are_refused(tmp_path: Path, last: list[int], side: str):
    text, image = tiny_pair(tmp_path)
    recipe = MergeRecipe(method="cross", text=text, image=image, out=tmp_path / "o", cross={"pairs": [[1, 1], last]})
    with pytest.raises(MergeError, match=rf"cross\.pairs has \[\d, \d\] but the {side} parent has 4 layers"):
        run_merge(recipe)
