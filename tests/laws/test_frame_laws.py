"""Laws of images with a size and row ends (float64, fixed seeds): what is drawn is the naive loop's, and reads back."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from finetune.order.cm3 import draw_spans, mask_spans, unmask
from jam.decode.engine import generate
from jam.decode.grammar import Kind, Phase, Row, Step
from jam.decode.job import rules_of
from jam.decode.naive import generate_naive
from jam.decode.options import SamplingOptions
from jam.decode.stream import ReplyStream
from jam.document import CodesPart, Document, TextPart
from jam.models.heads import next_heads
from jam.models.load import Bundle
from jam.tokens.render import IMAGE_HEAD, parse, render
from tests.tiny_framed import framed_bundle, framed_cross_bundle

PROMPTS = [
    Document((TextPart("draw a cat", "user"),)),
    Document((TextPart("on"),)),
    Document((TextPart("what is this?", "user"), CodesPart((1, 5, 9, 15, 0, 2), "user", grid=(2, 3)))),
]
LIVELY = SamplingOptions(max_tokens=64, text_temperature=1.0, text_top_p=1.0, min_images=2)
SIZES = {"text": (None, "6x4", "4x8"), "tokens": (None, "12x8", "20x12")}  # in codes 2 x 2; 2 x 3, 4 x 2; 2 x 3, 3 x 5
GRIDS = {"text": [(2, 2), (2, 3), (4, 2)], "tokens": [(2, 2), (2, 3), (3, 5)]}


@pytest.fixture(scope="module", params=["text", "tokens", "cross text"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    make = framed_cross_bundle if request.param.startswith("cross") else framed_bundle
    return make(tmp_path_factory.mktemp("framed"), request.param.split()[-1])


def kind_of(bundle: Bundle) -> str:
    return "tokens" if bundle.vocabulary.sizes else "text"


def options(bundle: Bundle, **changes) -> list[SamplingOptions]:
    """One size a row."""
    return [replace(LIVELY, image_size=size, **changes) for size in SIZES[kind_of(bundle)]]


def rows(steps: list[Step]) -> dict[int, list[Step]]:
    found: dict[int, list[Step]] = {}
    for step in steps:
        found.setdefault(step.row, []).append(step)
    return found


SETTINGS = {
    "alone": {"guidance_scale": 1.0},
    "guided": {"guidance_scale": 3.0},
    "three streams": {"guidance_scale": 4.0, "image_guidance_scale": 1.5},
    "contrastive, no repetition": {"guidance": "cd_k", "image_repetition_penalty": 2.0, "text_repetition_penalty": 2.0},
    "beams": {"image_beams": 3, "image_temperature": 0.0, "guidance_scale": 2.0},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_sizes_beside_each_other_are_naive(bundle: Bundle, name: str) -> None:
    """Two images and more a reply, text between them, each row of another size."""
    each = options(bundle, seed=4, **SETTINGS[name])
    fast = rows(list(generate(bundle, PROMPTS, each)))
    assert fast == rows(list(generate_naive(bundle, PROMPTS, each)))
    kinds = [step.kind for steps in fast.values() for step in steps]
    assert kinds.count(Kind.END) >= 6 and kinds.count(Kind.FRAME) > 12 and Kind.TEXT in kinds


def test_a_row_does_not_see_its_neighbours(bundle: Bundle) -> None:
    for changes in ({}, {"image_beams": 2, "image_temperature": 0.0}):
        each = options(bundle, **changes)
        together = rows(list(generate(bundle, PROMPTS, each)))
        for row, (prompt, own) in enumerate(zip(PROMPTS, each, strict=True)):
            alone = list(generate(bundle, [prompt], own, [row]))
            assert [replace(step, row=row) for step in alone] == together[row]


def test_what_is_drawn_reads_back_at_its_size(bundle: Bundle) -> None:
    each = options(bundle)
    stream = ReplyStream(bundle, PROMPTS, each)
    steps = list(generate(bundle, PROMPTS, each))
    for step in steps:
        stream.push(step)
    for row, (prompt, grid) in enumerate(zip(PROMPTS, GRIDS[kind_of(bundle)], strict=True)):
        ids = render(prompt, bundle.vocabulary, bundle.text, complete=False).ids.tolist()
        read = parse([*ids, *(step.token for step in steps if step.row == row)], bundle.vocabulary, bundle.text)
        drawn = [part for part in stream.reply(row).document.parts if isinstance(part, CodesPart)]
        assert drawn == [part for part in read.parts if isinstance(part, CodesPart) and part.role != "user"]
        assert {part.grid for part in drawn} == {grid}
        sizes = {image.size for image in stream.reply(row).images}
        assert sizes == {(grid[1] * bundle.image.factor, grid[0] * bundle.image.factor)}


def test_the_head_of_a_state_is_the_head_of_its_ids(bundle: Bundle) -> None:
    """And the head that render gives the next token."""
    rng, begin = random.Random(1), bundle.vocabulary.controls["begin_image"]
    row, ids, heads = Row(rules_of(bundle, options(bundle)[2]), 120), [0], []
    while row.phase is not Phase.DONE:
        heads.append(row.head)
        legal = [token for token in row.legal().nonzero().flatten().tolist() if token != 2]
        ids.append(begin if begin in legal and rng.random() < 0.2 else rng.choice(legal))
        row.advance(ids[-1])
    assert next_heads(torch.tensor([ids[:-1]]), bundle.vocabulary)[0].tolist() == heads and IMAGE_HEAD in heads
    for prompt in PROMPTS:
        tokens = render(prompt, bundle.vocabulary, bundle.text)
        found = next_heads(torch.from_numpy(tokens.ids).long()[None], bundle.vocabulary)[0]
        assert found[:-1].tolist() == tokens.heads[1:].tolist()


def test_an_image_is_one_segment_and_masks_are_undone(bundle: Bundle) -> None:
    """CM3 may cut a span out of the rows, ends and all; heads follow, and nothing is lost."""
    document = Document((TextPart("a cat"), CodesPart(tuple(range(12)), grid=(4, 3)), TextPart(" and more")))
    tokens = render(document, bundle.vocabulary, bundle.text)
    assert set(tokens.segments.tolist()) == {-1, 0, 1, 2}
    generator, cut = np.random.default_rng(0), 0
    for count in range(60):
        spans = draw_spans(tokens, 1 + count % 3, generator)
        masked = mask_spans(tokens, spans, bundle.vocabulary)
        assert (unmask(masked.ids, bundle.vocabulary) == tokens.ids).all()
        heads = next_heads(torch.from_numpy(masked.ids).long()[None], bundle.vocabulary)[0]
        assert heads[:-1].tolist() == masked.heads[1:].tolist()
        cut += any(bundle.vocabulary.controls["end_row"] in tokens.ids[start:stop] for start, stop in spans)
    assert cut > 5
