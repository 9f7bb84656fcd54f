"""Users' files as sources: what they become, and what is said of bad lines and bad images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finetune.data import sources
from finetune.data.sources import open_source, pieces
from finetune.loss import TokenLoss
from finetune.order.cm3 import caption_span, mask_spans
from finetune.order.pack import Placed, collate
from finetune.recipe import LossSection
from finetune.recipe import Source as SourceRecipe
from jam.document import CodesPart, TextPart
from jam.errors import DataError
from jam.models.load import Bundle, load_bundle
from jam.tokens.image import open_image
from jam.tokens.render import parse, render
from tests.tiny import CODES_PER_IMAGE, tiny_pair
from tests.tiny_framed import framed_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return load_bundle(tiny_pair(tmp_path_factory.mktemp("pair"))[1])


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAM_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: list) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def source(kind: str, path: Path, bundle: Bundle, **extra):
    return open_source("mine", SourceRecipe(kind=kind, path=str(path), weight=1.0, **extra), bundle)


def picture(path: Path, size=(20, 12), colour="red") -> str:
    Image.new("RGB", size, colour).save(path)
    return path.name


def test_captions_and_conversations_become_documents_with_codes(tmp_path, bundle):
    name = picture(tmp_path / "a.png")
    captions = source("captions", write(tmp_path / "c.jsonl", [{"image": name, "caption": "a red thing"}]), bundle)
    text, codes = captions.make(0, 0.0).parts
    assert text == TextPart("a red thing") and len(codes.codes) == CODES_PER_IMAGE
    turns = [
        {"role": "user", "content": [{"type": "image", "path": name}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": "red"},
    ]
    chat = source("conversations", write(tmp_path / "d.jsonl", [{"messages": turns}]), bundle)
    parts = chat.make(0, 0.0).parts
    assert [type(p) for p in parts] == [CodesPart, TextPart, TextPart]
    assert parts[0].codes == codes.codes and [p.loss for p in parts] == [0.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_images_with_sizes_are_learnt_as_squares(tmp_path, kind):
    """Captions of a model whose images carry size and row ends: rendered, masked, packed, and a loss on every token."""
    sized = framed_bundle(tmp_path / "model", kind, torch.float32)
    rows = [{"image": picture(tmp_path / "a.png"), "caption": "a red thing"}]
    captions = source("captions", write(tmp_path / "c.jsonl", rows), sized)
    tokens = render(captions.make(0, 0.0), sized.vocabulary, sized.text)
    drawn = parse(tokens.ids.tolist(), sized.vocabulary, sized.text).parts[-1]
    assert drawn.grid == (2, 2) and drawn.codes == captions.make(0, 0.0).parts[-1].codes
    whole = mask_spans(tokens, caption_span(tokens), sized.vocabulary)
    assert len(whole) == len(tokens) + 2
    batch = collate([[Placed(tokens, 0), Placed(whole, 3)]], [0], 2 * len(tokens) + 5, 1)
    network = TokenLoss(sized, LossSection()).train()
    nats = network(batch)[0]
    learnt = (batch.labels >= 0) & (batch.weights > 0)
    assert (nats[learnt] > 0).all() and torch.isfinite(nats).all()
    nats.sum().backward()
    row = sized.vocabulary.controls["end_row"]
    assert sized.model.get_output_embeddings().weight.grad[row].abs().sum() > 0


@pytest.mark.parametrize("kind", ["captions", "conversations"])
def test_images_wait_for_the_tokenizer_at_its_own_size(tmp_path, bundle, kind, monkeypatch):
    """A data set's photographs were once all held as they are; a few thousand filled the memory."""
    Image.effect_noise((300, 200), 90).convert("RGB").save(tmp_path / "b.png")
    turns = [{"role": "assistant", "content": [{"type": "image", "path": "b.png"}]}]
    row = {"image": "b.png", "caption": "noise"} if kind == "captions" else {"messages": turns}
    sizes, real = [], sources.encode_cached

    def spy(tokenizer, keys, open_one, progress=None):
        sizes.extend(open_one(number).size for number in range(len(keys)))
        return real(tokenizer, keys, open_one, progress)

    monkeypatch.setattr(sources, "encode_cached", spy)
    mine = source(kind, write(tmp_path / "c.jsonl", [row]), bundle)
    assert sizes == [(bundle.image.resolution,) * 2]
    (whole,) = bundle.image.encode([open_image(tmp_path / "b.png")]).tolist()
    assert mine.make(0, 0.0).parts[-1].codes == tuple(whole)


def test_all_bad_lines_are_reported_with_file_and_line(tmp_path, bundle):
    rows = [{"text": "good"}, "{not json", {"txt": "misspelt"}, {"text": 3}, "[1, 2]"]
    path = write(tmp_path / "t.jsonl", rows)
    with pytest.raises(DataError) as caught:
        source("text", path, bundle)
    lines = str(caught.value).split("\n")
    assert [line.split(":")[1] for line in lines] == ["2", "3", "4", "5"]
    assert all(line.startswith(str(path)) for line in lines)


@pytest.mark.parametrize("kind", ["missing", "broken", "huge", "animated", "not an image"])
def test_a_bad_image_is_named_with_its_line(tmp_path, bundle, kind):
    path = tmp_path / "bad.png"
    if kind == "broken":
        picture(path, (60, 60))
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "huge":
        Image.new("1", (13_000, 13_000)).save(path)
    elif kind == "animated":
        path = tmp_path / "bad.webp"
        frames = [Image.new("RGB", (9, 9), c) for c in ("red", "blue")]
        frames[0].save(path, save_all=True, append_images=frames[1:])
    elif kind == "not an image":
        path.write_text("hello")
    good = {"image": picture(tmp_path / "good.png"), "caption": "fine"}
    rows = write(tmp_path / "c.jsonl", [good, {"image": path.name, "caption": "bad"}])
    with pytest.raises(DataError, match=rf"c\.jsonl:2: .*{path.name}: ") as caught:
        source("captions", rows, bundle)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "caf\xe9"}', "not UTF-8"),
        (b'{"text": "\\ud800 half a pair"}', "not UTF-8"),
        (b"[" * 100_000, "not usable JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not usable JSON"),
    ],
    ids=["latin-1", "surrogate", "nested", "number"],
)
def test_a_line_that_is_no_text_is_named(tmp_path, bundle, line, expected):
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=rf"t\.jsonl:2: {expected}") as caught:
        source("text", tmp_path / "t.jsonl", bundle)
    assert "\n" not in str(caught.value)


def test_a_conversation_without_an_answer_is_refused(tmp_path, bundle):
    rows = [{"messages": [{"role": "user", "content": "hello?"}]}]
    with pytest.raises(DataError, match=r"d\.jsonl:1: no turn of the assistant"):
        source("conversations", write(tmp_path / "d.jsonl", rows), bundle)


def test_images_beside_the_messages_take_their_places(tmp_path, bundle):
    """As jam data prepare reads them; they were once refused here."""
    picture(tmp_path / "a.png")
    turns = [{"role": "user", "content": "draw"}, {"role": "assistant", "content": "here <image>"}]
    rows = [{"messages": turns, "images": ["a.png"]}, {"messages": [turns[0], {"role": "assistant", "content": "no"}]}]
    rows += [{"image": "a.png", "conversations": [{"from": "gpt", "value": "<image>"}]}]
    talk = source("conversations", write(tmp_path / "d.jsonl", rows), bundle)
    kinds = [[type(part) for part in talk.make(index, 0.0).parts] for index in range(3)]
    assert kinds == [[TextPart, TextPart, CodesPart], [TextPart, TextPart], [CodesPart]]
    assert talk.make(0, 0.0).parts[-1].codes == talk.make(2, 0.5).parts[0].codes
    assert [talk.where(index) for index in range(3)] == [f"{tmp_path}/d.jsonl:{line}" for line in (1, 2, 3)]
    for bad, images in (("<image> <image>", ["a.png"]), ("<image>", [])):
        rows = [{"messages": [turns[0], {"role": "assistant", "content": bad}], "images": images}]
        with pytest.raises(DataError, match=r"d\.jsonl:1: \d places for images .* and \d images"):
            source("conversations", write(tmp_path / "d.jsonl", rows), bundle)


def test_a_recipe_reads_folders_and_tables_too(tmp_path, bundle):
    (tmp_path / "folder").mkdir()
    picture(tmp_path / "folder/a.png")
    (tmp_path / "folder/metadata.csv").write_text("file_name,text\na.png,a red thing\n")
    mine = source("captions", tmp_path / "folder", bundle)
    assert mine.make(0, 0.0).parts[0] == TextPart("a red thing") and mine.where(0).endswith("metadata.csv:2")
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    lines = source("text", tmp_path / "t.txt", bundle)
    assert lines.size == 2 and lines.where(1) == f"{tmp_path}/t.txt:3"


def test_the_content_of_a_source_is_its_files_and_its_pictures(tmp_path, bundle):
    rows = write(tmp_path / "c.jsonl", [{"image": picture(tmp_path / "a.png"), "caption": "x"}])
    first = source("captions", rows, bundle).content
    assert first == source("captions", rows, bundle).content and len(first) == 64
    Image.effect_noise((20, 12), 90).convert("RGB").save(tmp_path / "a.png")
    repainted = source("captions", rows, bundle).content
    write(rows, [{"image": "a.png", "caption": "y"}])
    assert len({first, repainted, source("captions", rows, bundle).content}) == 3


def test_documents_are_left_out_by_number(tmp_path, bundle):
    path = write(tmp_path / "t.jsonl", [{"text": f"line {number}"} for number in range(5)])
    assert source("text", path, bundle, skip=(1, 3)).skip == {1, 3}
    with pytest.raises(DataError, match="skip names document 5 of 5"):
        source("text", path, bundle, skip=(5,))
    with pytest.raises(DataError, match="skip names every document"):
        source("text", path, bundle, skip=(0, 1), limit=2)


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistakes(tmp_path, bundle):
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n{"text": "two"}\r\n')
    mine = source("text", tmp_path / "t.jsonl", bundle)
    assert [mine.make(index, 0.0).parts[0].text for index in range(mine.size)] == ["one", "two"]


@pytest.mark.parametrize("kind", ["captions", "conversations"])
@pytest.mark.parametrize("way", ["above", "absolute", "link", "nul"])
def test_images_outside_the_data_folder_are_refused(tmp_path, bundle, kind, way):
    (tmp_path / "data").mkdir()
    picture(tmp_path / "out.png")
    (tmp_path / "data/link.png").symlink_to(tmp_path / "out.png")
    name = {"above": "../out.png", "absolute": str(tmp_path / "out.png"), "link": "link.png", "nul": "a\0b.png"}[way]
    turns = [{"role": "assistant", "content": [{"type": "image", "path": name}]}]
    row = {"image": name, "caption": "x"} if kind == "captions" else {"messages": turns}
    with pytest.raises(DataError, match=r"d\.jsonl:1: image .* lies outside"):
        source(kind, write(tmp_path / "data/d.jsonl", [row]), bundle)


def test_a_damaged_cache_is_made_anew_and_a_full_one_is_said(tmp_path, bundle, monkeypatch):
    path = write(tmp_path / "c.jsonl", [{"image": picture(tmp_path / "a.png"), "caption": "x"}])
    expected = source("captions", path, bundle).make(0, 0.0)
    (cached,) = (tmp_path / "cache").iterdir()
    cached.write_bytes(cached.read_bytes()[:-2])
    assert source("captions", path, bundle).make(0, 0.0) == expected
    cached.unlink()

    def full(file, codes):
        Path(file).write_bytes(b"half")
        raise OSError("4 requested and 0 written")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError, match="JAM_CACHE"):
        source("captions", path, bundle)
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_and_empty_files_are_refused(tmp_path, bundle):
    with pytest.raises(DataError, match="no such data file"):
        source("text", tmp_path / "none.jsonl", bundle)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no documents"):
        source("text", tmp_path / "empty.jsonl", bundle)


def test_a_long_text_is_cut_without_losing_a_token(tmp_path, bundle):
    words = " ".join(f"word{number}" for number in range(80))
    long = source("text", write(tmp_path / "t.jsonl", [{"text": words}]), bundle)
    whole = pieces(long, bundle, 0, 0.0, 10_000)[0]
    parts = pieces(long, bundle, 0, 0.0, 64)
    assert len(parts) > 3 and all(len(p) <= 64 for p in parts)
    assert np.array_equal(np.concatenate([p.ids[1:] for p in parts]), whole.ids[1:])
    assert all(p.ids[0] == bundle.vocabulary.controls["bos"] for p in parts)


def test_a_document_with_an_image_is_never_cut(tmp_path, bundle):
    rows = [{"image": picture(tmp_path / "a.png"), "caption": "word " * 60}]
    long = source("captions", write(tmp_path / "c.jsonl", rows), bundle)
    with pytest.raises(DataError, match=r"document 0 has \d+ tokens .* raise data\.seq_len"):
        pieces(long, bundle, 0, 0.0, 32)


def test_loss_weights_of_a_source_apply_by_modality(tmp_path, bundle):
    rows = write(tmp_path / "c.jsonl", [{"image": picture(tmp_path / "a.png"), "caption": "x"}])
    halved = source("captions", rows, bundle, loss={"text": 0.5, "image": 2.0})
    tokens = pieces(halved, bundle, 0, 0.0, 64)[0]
    assert set(tokens.weights[1:][tokens.heads[1:] == 0]) == {0.5}
    assert set(tokens.weights[tokens.heads == 1]) == {2.0}


def test_joined_conversations_fit_and_end_in_the_one_asked_for(tmp_path: Path, bundle: Bundle) -> None:
    """Always the same others before it, as many as the sequence holds."""
    turns = [f"{word} and the other" for word in ("cat", "hat", "rain", "train", "thin", "tin")]
    lines = [
        {"messages": [{"role": "user", "content": turn}, {"role": "assistant", "content": turn[:3]}]} for turn in turns
    ]
    talk = source("conversations", write(tmp_path / "talk.jsonl", lines), bundle, joined=3)
    user, counts = bundle.vocabulary.controls["user"], set()
    for index in range(6):
        for draw in (0.1, 0.4, 0.7):
            (tokens,), (again,) = (pieces(talk, bundle, index, draw, 512) for _ in range(2))
            own = render(talk.make(index, draw), bundle.vocabulary, bundle.text).ids.tolist()
            assert tokens.ids.tolist() == again.ids.tolist() and tokens.ids[1 - len(own) :].tolist() == own[1:]
            counts.add(int((tokens.ids == user).sum()))
            (short,) = pieces(talk, bundle, index, draw, len(own))
            assert short.ids.tolist() == own
    assert counts == {1, 2, 3}


def test_turns_of_one_speaker_are_never_joined(tmp_path: Path, bundle: Bundle) -> None:
    """Neither a last word of the user before a question, nor a reply before the assistant's opening."""
    said = {who: {"role": who, "content": who} for who in ("user", "assistant")}
    shapes = [["user", "assistant", "user"], ["assistant", "user", "assistant"]]
    lines = [{"messages": [said[who] for who in shape]} for shape in shapes]
    talk = source("conversations", write(tmp_path / "talk.jsonl", lines), bundle, joined=3)
    alone = [len(render(talk.make(index, 0.5), bundle.vocabulary, bundle.text)) for index in range(2)]
    for draw in np.arange(0.05, 1.0, 0.1).tolist():
        # the first ends with the user, so the second follows nothing; the second opens with the assistant
        assert [len(pieces(talk, bundle, index, draw, 512)[0]) for index in range(2)] in (
            alone,
            [alone[0] + alone[1] - 1, alone[1]],  # before the first the second may stand: it ends with the assistant
        )


def test_one_conversation_is_not_joined_with_itself(tmp_path: Path, bundle: Bundle) -> None:
    line = {"messages": [{"role": "user", "content": "a cat"}, {"role": "assistant", "content": "in it"}]}
    talk = source("conversations", write(tmp_path / "talk.jsonl", [line]), bundle, joined=3)
    own = render(talk.make(0, 0.5), bundle.vocabulary, bundle.text)
    assert all(len(pieces(talk, bundle, 0, draw, 512)[0]) == len(own) for draw in (0.1, 0.4, 0.7, 0.9))


def test_only_conversations_are_joined() -> None:
    with pytest.raises(ValueError, match="only conversations are joined"):
        SourceRecipe(kind="text", path="mini", weight=1.0, joined=2)
