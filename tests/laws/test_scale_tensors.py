"""Tensor parallelism: matrices shared out over processes, by transformers' plans and ours, change no score."""

import json

import pytest

from jam.errors import CheckpointError
from jam.models.load import load_bundle
from tests.laws.ranks import launch
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross


def test_a_shared_out_network_scores_as_a_whole_one(tmp_path):
    text, image = tiny_pair(tmp_path, text_family="llama")
    llama = tiny_pair(tmp_path / "llama", family="llama", tie_word_embeddings=False)[1]
    least = {str(llama): 0.6, str(image): 0.3}  # OPT's attention and tables stay whole
    for tables in ("shared", "separate"):
        least[str(tiny_cross(tmp_path / tables, text, image, gate=0.5, tables=tables))] = 0.5
    launch(2, tmp_path / "ranks", "tests.laws.scale_tensors:scores", json.dumps(least))
    with pytest.raises(CheckpointError, match="tp_plan of 1 process"):
        load_bundle(llama, tp_plan="auto")


def test_heads_that_the_processes_do_not_divide_are_refused(tmp_path):
    launch(4, tmp_path / "ranks", "tests.laws.scale_tensors:refused", tiny_pair(tmp_path, family="llama")[1])
