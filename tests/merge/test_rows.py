"""Rows of the joint vocabulary: ownership, sources, and the refusal of vocabularies that do not fit."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jam.checkpoint import WEIGHTS
from jam.errors import CheckpointError
from jam.tokens.vocabulary import JamFile, Span, Vocabulary
from merge.plan import read_parent
from merge.rows import MEAN, ZERO, Table, describe, half_map, tower_labels, tower_map
from merge.union import Pair, owned
from tests.tiny import edit_json, tiny_pair

EMBED = "model.decoder.embed_tokens.weight"


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    return tiny_pair(tmp_path)


def open_pair(folders: tuple[Path, Path]) -> Pair:
    return Pair(read_parent(folders[0], "text"), read_parent(folders[1], "image"))


def test_a_parent_owns_its_text_images_and_named_controls(folders: tuple[Path, Path]):
    text, image = open_pair(folders).sides
    assert np.flatnonzero(~owned(text.vocabulary, 304)).tolist() == [*range(3, 8), *range(288, 304)]
    assert owned(image.vocabulary, 304).all()


@pytest.mark.parametrize(("use", "closing"), [("input", MEAN), ("head", 2), ("tied", 2)])
def test_foreign_rows_of_a_tower(folders: tuple[Path, Path], use: str, closing: int):
    pair = open_pair(folders)
    rows = tower_map(pair.union, pair.text, use)
    assert rows[:8].tolist() == [0, 1, 2, MEAN, MEAN, closing, MEAN, MEAN]
    assert rows[8:288].tolist() == list(range(8, 288)) and (rows[288:] == MEAN).all()
    assert tower_map(pair.union, pair.image, use).tolist() == list(range(304))
    labels = tower_labels(pair.union, rows, "text")
    assert labels[5] == ("foreign: mean of text rows" if closing == MEAN else "foreign: text eos row")
    assert labels[2] == labels[8] == "text row" and labels[300] == "foreign: mean of text rows"


def test_a_missing_half_is_zero_and_only_that(folders: tuple[Path, Path]):
    pair = open_pair(folders)
    rows = half_map(pair.union, pair.text)
    assert np.flatnonzero(rows == ZERO).tolist() == [*range(3, 8), *range(288, 304)]
    assert half_map(pair.union, pair.image).tolist() == list(range(304))


def test_table_reads_rows_in_any_order_and_block(folders: tuple[Path, Path]):
    pair = open_pair(folders)
    text = pair.text
    stored = load_file(text.path / WEIGHTS)[EMBED]
    source = np.array([5, 6, 7, MEAN, 2, 2, ZERO, 287, 0, 1])
    trained = stored[[0, 2, *range(8, 288)]]  # owned, without the pad row
    mean = trained.astype(np.float64).mean(0)
    for size in (1, 3, 10):
        table = Table(text, EMBED, source, pair.union.text)
        found = np.concatenate([table.read(slice(at, min(at + size, 10))) for at in range(0, 10, size)])
        plain = source >= 0
        assert np.array_equal(found[plain], stored[source[plain]])
        assert not found[6].any() and np.allclose(found[3], mean, atol=1e-7)


def test_a_table_is_read_whole_so_that_no_bad_row_hides(folders: tuple[Path, Path]):
    file = folders[0] / WEIGHTS
    tensors = load_file(file)
    tensors[EMBED][4, 0] = np.nan  # a reserved row, which no map asks for
    save_file(tensors, file)
    pair = open_pair(folders)
    with pytest.raises(CheckpointError, match=rf"{EMBED} has 1 of 9216 values"):
        Table(pair.text, EMBED, half_map(pair.union, pair.text), pair.union.text).read(slice(0, 1))


def test_a_parent_must_describe_all_its_rows(folders: tuple[Path, Path]):
    spans = (Span("control", 0, 8), Span("text", 8, 280))
    JamFile(Vocabulary(spans, {"bos": 0, "pad": 1, "eos": 2})).write(folders[0])
    with pytest.raises(CheckpointError, match=r"288 vocabulary rows, jam\.json 280 ids"):
        read_parent(folders[0], "text")


def test_a_parent_must_be_complete(folders: tuple[Path, Path]):
    (folders[0] / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        read_parent(folders[0], "text")
    (folders[0] / "jam.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither jam\.json nor tokenizer\.json"):
        read_parent(folders[0], "text")


def test_an_image_parent_needs_its_tokenizer_of_images(folders: tuple[Path, Path]):
    (folders[1] / "image_tokenizer" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no image_tokenizer/model\.safetensors"):
        read_parent(folders[1], "image")


def test_an_image_tokenizer_must_be_whole_and_its_codes_those_of_the_vocabulary(folders: tuple[Path, Path]):
    edit_json(folders[1] / "image_tokenizer" / "config.json", {"n_embed": 8})
    with pytest.raises(CheckpointError, match=r"codebook of 8 codes, jam\.json has 16"):
        read_parent(folders[1], "image")
    weights = folders[1] / "image_tokenizer" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        read_parent(folders[1], "image")


@pytest.mark.parametrize("change", [{"model_type": ["opt"]}, {"num_key_value_heads": "x"}, {"hidden_size": "32"}])
def test_a_configuration_of_other_types_is_refused(folders: tuple[Path, Path], change: dict):
    edit_json(folders[0] / "config.json", change)
    with pytest.raises(CheckpointError, match=str(folders[0])):
        read_parent(folders[0], "text")


def test_describe_loses_no_row():
    labels = ["a", "a", "b", "a"]
    found = describe(labels)
    assert found == {"counts": {"a": 3, "b": 1}, "ranges": [[0, 2, "a"], [2, 3, "b"], [3, 4, "a"]]}
