"""The shipped weights: positions are all trained, the image tokenizer holds its bar, the parts belong together."""

import json
import math

import numpy as np
import pytest
import torch

from finetune.data import mini_data
from finetune.loss import cross_entropy
from finetune.order.pack import Placed, collate
from jam.assets import IMAGE_PARENT, SHIPPED, TEXT_PARENT
from jam.decode.options import SamplingOptions, default_options
from jam.decode.stream import replies
from jam.difference import ROWS
from jam.document import CodesPart, Document, TextPart
from jam.fetch import fetched
from jam.header import read_header
from jam.models.load import Bundle, load_bundle
from jam.recipe import load_recipe
from jam.shipped import DIFFERENCE, RECIPE, shipped_model
from jam.tokens.render import IMAGE_HEAD, render
from jam.tokens.vocabulary import JamFile
from merge.recipe import MergeRecipe


@pytest.fixture(scope="module")
def image_parent() -> Bundle:
    return load_bundle(IMAGE_PARENT)


def held_out(count: int) -> list[dict]:
    rows = [row for row in mini_data.image_rows() if row["split"] in ("combination", "label")]
    return rows[:: len(rows) // count][:count]


def test_learned_positions_are_trained_alike(image_parent):
    """A start offset is drawn per document in training; without it positions beyond the first 250 are noise."""
    rows, archive = held_out(24), mini_data.ImageArchive()
    codes = image_parent.image.encode([archive.open(row["file"]) for row in rows])
    documents = [
        render(
            Document((TextPart(mini_data.caption_for(row)), CodesPart(tuple(c)))),
            image_parent.vocabulary,
            image_parent.text,
        )
        for row, c in zip(rows, codes.tolist(), strict=True)
    ]
    figures = []
    for offset in (0, 300, 800):
        batch = collate([[Placed(tokens, offset)] for tokens in documents], [0] * len(rows), 128, pad=1)
        with torch.inference_mode():
            logits, _ = image_parent.logits(
                batch.ids, batch.head_ids, attention_mask=batch.mask, position_ids=batch.positions
            )
        image = (batch.head_ids == IMAGE_HEAD) & (batch.labels >= 0)
        figures.append(float(cross_entropy(logits, batch)[image].mean()))
    assert max(figures) / min(figures) < 1.02, figures
    assert max(figures) < math.log(image_parent.vocabulary.codebook_size) - 0.5, "no better than a uniform guess"


def test_the_image_tokenizer_reconstructs_what_it_never_saw(image_parent):
    """A sample of the held-out images; the log beside the tokenizer has the figure of all of them."""
    archive = mini_data.ImageArchive()
    images = [archive.open(row["file"]) for row in held_out(120)]
    restored = image_parent.image.decode(image_parent.image.encode(images))
    errors = [
        np.square((np.asarray(a) - np.asarray(b, np.float32)) / 255).mean()
        for a, b in zip(images, restored, strict=True)
    ]
    assert np.mean(-10 * np.log10(errors)) > 23.5


def test_both_parents_share_one_tokenizer():
    text, image = load_bundle(TEXT_PARENT), load_bundle(IMAGE_PARENT)
    assert text.text.tokenizer.get_vocab() == image.text.tokenizer.get_vocab()
    assert text.vocabulary.size == 4096 and image.vocabulary.size == 5120


def test_the_shipped_difference_leaves_the_language_model_as_it_was():
    """Every weight of SmolLM2 but the row that opens an image; its folder is not needed to see that."""
    folder = SHIPPED / "smollm2"
    tensors = {info.name: info for info in read_header(folder / DIFFERENCE)}
    stored = {name for name in tensors if "::" not in name}
    vocabulary = JamFile.read(folder).vocabulary
    table = next(name for name in stored if name.startswith("text."))
    rows = tensors[table + ROWS]
    changed = np.fromfile(rows.file, "<i8", rows.shape[0], offset=rows.begin)
    assert changed.tolist() == [vocabulary.controls["begin_image"]]
    assert {name.split(".")[0] for name in stored - {table}} == {"image", "cross"}
    settings = json.loads((folder / "jam.json").read_text())
    assert SamplingOptions(**settings["sampling"]).text_temperature == 0.4
    recipe = load_recipe(folder / RECIPE, MergeRecipe)
    assert (recipe.method, recipe.text, recipe.image) == ("cross", None, None)


@pytest.mark.skipif(not fetched("smollm2").is_dir(), reason="jam fetch smollm2 brings the language model")
def test_the_language_model_draws_when_asked_and_only_then():
    bundle = load_bundle(shipped_model("smollm2"), dtype=torch.bfloat16)
    options = default_options(bundle, image_beams=1, max_tokens=120)
    asked = ("Draw a cat.", "What is the capital of France?")
    replied = [next(iter(replies(bundle, [Document((TextPart(words, "user", 0.0),))], options))) for words in asked]
    assert [len(reply.images) for reply in replied] == [1, 0]
    assert "Paris" in "".join(part.text for part in replied[1].document.parts if isinstance(part, TextPart))
