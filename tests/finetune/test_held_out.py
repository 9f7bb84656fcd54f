"""What the shipped data holds out: fixed, spread, and never from the training split."""

from finetune.data import mini_data
from finetune.data.held_out import held_out_captions, held_out_pictures, held_out_texts
from jam.document import CodesPart, TextPart
from jam.tokens.image import ImageTokenizer
from tests.tiny import tiny_pair


def test_pictures_are_of_different_labels_and_held_out():
    for split in ("combination", "label"):
        rows = held_out_pictures(split, 8)
        assert len({row["label"] for row in rows}) == 8
        assert {row["split"] for row in rows} == {split}
        assert len({row["style"] for row in rows}) > 1
        assert rows == held_out_pictures(split, 8)
    trained = {row["label"] for row in mini_data.image_rows() if row["split"] == "train"}
    assert not {row["label"] for row in held_out_pictures("label", 8)} & trained
    assert {row["label"] for row in held_out_pictures("combination", 8)} <= trained


def test_texts_are_of_their_split_and_about_the_asked_size():
    validation, test = held_out_texts("validation", 20_000), held_out_texts("test", 20_000)
    assert set(validation) <= set(mini_data.texts("validation")) and set(test) <= set(mini_data.texts("test"))
    assert not set(validation) & set(test)
    assert all(10_000 < sum(len(text.encode()) for text in texts) < 40_000 for texts in (validation, test))


def test_captions_of_the_test_split_hold_both_kinds(tmp_path, monkeypatch):
    monkeypatch.setenv("JAM_CACHE", str(tmp_path / "cache"))
    _, image = tiny_pair(tmp_path)
    tokenizer = ImageTokenizer.load(image / "image_tokenizer")
    documents = held_out_captions("test", 6, tokenizer)
    captions = {mini_data.caption_for(row): row["split"] for row in mini_data.image_rows()}
    assert all(isinstance(d.parts[0], TextPart) and isinstance(d.parts[1], CodesPart) for d in documents)
    assert sorted(captions[d.parts[0].text] for d in documents) == ["combination"] * 3 + ["label"] * 3
