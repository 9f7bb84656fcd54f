"""The joint vocabulary: whose ids it keeps, and the source of every row of both parents."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jam.checkpoint import WEIGHTS
from jam.errors import CheckpointError
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import IMAGE, TEXT, JamFile, Span, Vocabulary
from merge.plan import read_parent
from merge.rows import Table, tower_map
from merge.union import AVERAGED, NONE, Pair, joint_vocabulary
from tests.tiny import edit_json, tiny_pair, tiny_tokenizer

EMBED = "model.decoder.embed_tokens.weight"


def open_pair(folders: tuple[Path, Path]) -> Pair:
    return Pair(read_parent(folders[0], "text"), read_parent(folders[1], "image"))


def test_one_tokenizer_keeps_every_number(tmp_path: Path):
    union = open_pair(tiny_pair(tmp_path)).union
    assert union.same and union.vocabulary == JamFile.read(tmp_path / "image").vocabulary
    for side, size in ((union.text, 288), (union.image, 304)):
        assert side.source.tolist() == [*range(size), *[NONE] * (304 - size)]
    assert union.figures() == {"text_ids": 280, "copied": 280, "averaged": 0, "without_source": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"model.vocab.Ġt": 265, "model.vocab.he": 264},  # two ids change places
        {"normalizer": {"type": "Lowercase"}},
        {"model.merges": None},
    ],
)
def test_a_tokenizer_that_cuts_otherwise_is_another_tokenizer(tmp_path: Path, change: dict):
    folders = tiny_pair(tmp_path)
    if "model.merges" in change:  # the longer pieces stay in the vocabulary and are never produced
        change = {"model.merges": json.loads((folders[0] / "tokenizer.json").read_text())["model"]["merges"][:-1]}
    edit_json(folders[1] / "tokenizer.json", change)
    assert not open_pair(folders).one_tokenizer


def test_controls_with_other_numbers_make_another_vocabulary(tmp_path: Path):
    folders = tiny_pair(tmp_path)
    jam = JamFile.read(folders[0])
    JamFile(Vocabulary(jam.vocabulary.spans, {"bos": 0, "pad": 1, "eos": 7})).write(folders[0])
    union = open_pair(folders).union
    assert not union.same and union.vocabulary.controls["eos"] == 7 and union.image.source[7] == 2


def test_the_joint_ids_are_the_llms_then_new_controls_then_images():
    ours = Vocabulary((Span("control", 0, 3), Span("text", 3, 10), Span("control", 10, 12)), {"eos": 1, "pad": 11})
    names = {"bos": 0, "pad": 1, "eos": 2, "mask": 3, "begin_image": 4, "end_image": 4}
    theirs = Vocabulary((Span("control", 0, 8), Span("image", 8, 16), Span("text", 16, 20)), names, 4)
    joint = joint_vocabulary(ours, theirs)
    assert joint.spans == (*ours.spans, Span("control", 12, 15), Span("image", 15, 23))
    assert joint.controls == {"eos": 1, "pad": 11, "bos": 12, "mask": 13, "begin_image": 14, "end_image": 14}
    assert joint.codes_per_image == 4


def test_rows_of_other_tokenizers_are_copied_or_averaged_and_all_accounted_for(tmp_path: Path):
    folders = tiny_pair(tmp_path, text_merges=24, image_merges=12)
    pair = open_pair(folders)
    union, vocabulary = pair.union, pair.union.vocabulary
    text = TextTokenizer.load(folders[0])
    sentence = "the cat and the hat in the rain: ünïcode, <break> & 3.14"
    assert vocabulary.spans[:2] == pair.text.vocabulary.spans and vocabulary.size == 288 + 5 + 16
    assert max(text.encode(sentence)) < 288
    # the twelve merges that both have are copied, the other twelve are averaged over what the image parent cuts them to
    assert union.figures() == {"text_ids": 280, "copied": 268, "averaged": 12, "without_source": 0}
    assert (union.image.source[8:276] == np.arange(8, 276)).all() and (union.image.source[276:288] == AVERAGED).all()
    kinds, theirs = vocabulary.kinds(), pair.image.vocabulary
    assert (union.image.source[kinds == IMAGE] == theirs.image_ids(np.arange(16))).all()
    assert all(union.image.source[vocabulary.controls[name]] == index for name, index in theirs.controls.items())
    assert (union.text.source[:288] == np.arange(288)).all() and (union.text.source[288:] == NONE).all()

    stored = load_file(folders[1] / WEIGHTS)[EMBED]
    image = TextTokenizer.load(folders[1])
    table = Table(pair.image, EMBED, tower_map(union, pair.image, "tied"), union.image)
    for size in (7, 309):
        read = np.concatenate([table.read(slice(at, min(at + size, 309))) for at in range(0, 309, size)])
        for index in np.flatnonzero(kinds == TEXT)[256:].tolist():
            wanted = stored[image.encode(text.decode([index]))].astype(np.float64).mean(0)
            np.testing.assert_allclose(read[index], wanted, atol=1e-7)


def test_parents_that_cannot_be_one_pair_are_told_why(tmp_path: Path):
    folders = tiny_pair(tmp_path)
    assert "swap --text and --image" in str(open_pair((folders[1], folders[0])).obstacle())
    assert "use an image-text model" in str(open_pair((folders[0], folders[0])).obstacle())
    edit_json(folders[0] / "tokenizer.json", {"normalizer": {"type": "Lowercase"}})
    assert open_pair(folders).obstacle() is None
    other = tiny_pair(tmp_path / "other", image_merges=12)
    assert "both parents have image ids" in str(open_pair((folders[1], other[1])).obstacle())


def test_a_tokenizer_without_strings_is_refused(tmp_path: Path):
    folders = tiny_pair(tmp_path, image_merges=12)
    edit_json(folders[1] / "tokenizer.json", {"pre_tokenizer": None, "decoder": None})
    with pytest.raises(CheckpointError, match="neither byte-level nor sentencepiece's"):
        _ = open_pair(folders).union


def test_a_tokenizer_with_more_ids_than_the_vocabulary_is_refused(tmp_path: Path):
    _, image = tiny_pair(tmp_path, image_merges=4)
    tiny_tokenizer().save(str(image / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"names id 287, jam\.json has 284"):
        read_parent(image, "image")
