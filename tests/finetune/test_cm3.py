"""The published variants of CM3 by their figures, and what no variant may do: lose a token, or leave a segment."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.data.sources import Source as SourceOf
from finetune.data.sources import cut, keyed, open_source
from finetune.order.cm3 import CAPTION, draw_instance, draw_spans, growth, infilled, mask_spans, segment_bounds, unmask
from finetune.order.plan import PackedSource
from finetune.recipe import FinetuneRecipe, ObjectiveSection, Source
from jam.document import CodesPart, Document, TextPart
from jam.errors import RunError
from jam.models.load import load_bundle
from jam.tokens.render import IMAGE_HEAD, Tokens, render
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import IMAGE
from tests.laws.test_data_laws import recipe_for
from tests.tiny import CODES, CODES_PER_IMAGE, tiny_pair, tiny_tokenizer, tiny_vocabulary

VOCABULARY = tiny_vocabulary(images=True)
TEXT = TextTokenizer(tiny_tokenizer())
MASK, INFILL, BREAK = (VOCABULARY.controls[name] for name in ("mask", "infill", "begin_image"))
WORDS = ["a red cat", " and the other", "in", " of the rain, then", "is it", "x"]
DRAWS = 20_000
POISSON = [math.exp(-1) / math.factorial(n) for n in range(17)]


def random_document(seed: int) -> Tokens:
    """One to seven parts, texts and images in any order, images beside images too."""
    generator = np.random.default_rng(seed)
    parts: list = []
    for _ in range(int(generator.integers(1, 8))):
        if generator.random() < 0.5:
            parts.append(CodesPart(tuple(generator.integers(0, CODES, CODES_PER_IMAGE).tolist())))
        else:
            parts.append(TextPart(WORDS[int(generator.integers(len(WORDS)))]))
    return render(Document(tuple(parts)), VOCABULARY, TEXT)


def counted(**objective) -> dict[int, float]:
    """Share of documents by what is drawn for them."""
    section, generator = ObjectiveSection(**objective), keyed(1)
    found = Counter(draw_instance(generator, section) for _ in range(DRAWS))
    return {instance: count / DRAWS for instance, count in sorted(found.items())}


def near(share: float):
    """Within four standard deviations of a share that is counted over ``DRAWS``."""
    return pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / DRAWS) + 1e-9)


def test_the_papers_clamp_masks_every_document():
    """CM3, arXiv 2201.07520, section 2: Clamp(Poisson(1), 1, 16)."""
    found = counted(cm3=1.0, clamp_min=1, clamp_max=16, condition_drop=0.0)
    assert min(found) == 1 and found[1] == near(POISSON[0] + POISSON[1])  # 73.6 %
    assert found[2] == near(POISSON[2]) and found[3] == near(POISSON[3])


def test_the_published_codes_clamp_leaves_more_than_a_third_whole():
    found = counted(cm3=1.0, clamp_min=0, clamp_max=511, condition_drop=0.0)
    assert found[0] == near(0.3679) and found[1] == near(0.3679) and found[2] == near(0.1839)


def test_one_span_a_document():
    assert counted(cm3=1.0, spans="one", condition_drop=0.0) == {1: 1.0}


def test_the_share_and_the_captions_that_are_dropped_first():
    found = counted(cm3=0.5, condition_drop=0.1)
    assert found[CAPTION] == near(0.1) and found[0] == near(0.45)
    assert sum(share for instance, share in found.items() if instance > 0) == near(0.45)


def test_documents_without_a_caption_are_infilled_as_often_as_asked(tmp_path):
    """``condition_drop`` is a share of captions: a text has none to drop, and once stayed whole instead."""
    objective = ObjectiveSection(cm3=1.0, condition_drop=0.5)
    assert all(draw_instance(keyed(seed), objective, captioned=False) > 0 for seed in range(50))
    packed, _ = source_of(tmp_path, 3, cm3=1.0, condition_drop=0.5)
    assert all((placed.tokens.ids == MASK).any() for window in range(9) for placed in packed._documents(window))


def test_the_greatest_number_of_spans():
    assert set(counted(cm3=1.0, clamp_max=2, condition_drop=0.0)) == {1, 2}
    found = counted(cm3=1.0, clamp_min=0, clamp_max=1, condition_drop=0.0)
    assert found[0] == near(0.3679) and found[1] == near(0.6321)


@pytest.mark.parametrize("objective", [{}, {"clamp_min": 0, "clamp_max": 511}, {"spans": "one"}, {"clamp_max": 2}])
def test_random_documents_come_back_and_spans_stay_in_a_segment(objective):
    section, masked, chosen, images = ObjectiveSection(cm3=1.0, condition_drop=0.1, **objective), 0, 0, 0
    for seed in range(600):
        tokens, generator = random_document(seed), keyed(seed)
        instance = draw_instance(generator, section)
        result = infilled(tokens, instance, generator, VOCABULARY, room=1000)
        assert len(result) <= len(tokens) + growth(instance)
        assert np.array_equal(unmask(result.ids, VOCABULARY), tokens.ids)
        spans = int((result.ids == INFILL).sum())
        assert spans == int((result.ids == MASK).sum()) and 2 * spans == len(result) - len(tokens)
        assert sorted(result.ids[~np.isin(result.ids, (MASK, INFILL))]) == sorted(tokens.ids)
        assert (result.weights[result.ids == MASK] == 0).all() and result.weights[result.ids == INFILL].all()
        chosen += instance > 0
        masked += instance > 0 and spans > 0
        tail = result.ids[int(np.flatnonzero(result.ids == INFILL)[0]) :] if spans else []
        images += bool(spans) and (VOCABULARY.kinds()[tail] == IMAGE).any()
        assert BREAK not in tail
    assert masked == chosen > 300  # a document that is chosen is masked, however short
    assert images > 50


def test_documents_get_as_many_spans_as_were_drawn():
    """Two spans of a document overlap in two draws of three; taken as drawn, nine documents of ten had one span."""
    section = ObjectiveSection(cm3=1.0, clamp_min=0, clamp_max=511, condition_drop=0.0)
    tokens, found, draws = render(Document((TextPart("the cat in the rain " * 60),)), VOCABULARY, TEXT), Counter(), 2000
    for seed in range(draws):
        generator = keyed(seed)
        result = infilled(tokens, draw_instance(generator, section), generator, VOCABULARY, room=2000)
        found[int((result.ids == INFILL).sum())] += 1
    for spans in range(5):
        deviation = math.sqrt(POISSON[spans] * (1 - POISSON[spans]) / draws)
        assert found[spans] / draws == pytest.approx(POISSON[spans], abs=4 * deviation)


def test_a_long_text_of_several_parts_is_masked_in_every_piece(tmp_path):
    """Pages without an image are texts one after another; a later piece has none of the first ones."""
    tiny_pair(tmp_path)
    bundle = load_bundle(tmp_path / "image")
    recipe = recipe_for(tmp_path, objective={"cm3": 1.0, "condition_drop": 0.0})
    page = Document(tuple(TextPart(f"the cat {n} and another of them in the rain") for n in range(9)))
    source = PackedSource(SourceOf("a", 1, lambda index, draw: page, True, 1.0, 1.0), 0, bundle, recipe, 256)
    pieces = list(source._instances(0, keyed(0)))
    assert len(pieces) > 3 and all((piece.ids == MASK).any() for piece in pieces)
    back = np.concatenate([unmask(piece.ids, VOCABULARY)[1:] for piece in pieces])
    assert np.array_equal(back, render(page, VOCABULARY, TEXT).ids[1:])


def test_a_document_without_anything_to_mask_stays():
    tokens = render(Document(()), VOCABULARY, TEXT)
    assert segment_bounds(tokens) == [] and draw_spans(tokens, 3, keyed(0)) == []


def test_a_single_token_is_masked_whole():
    tokens = render(Document((TextPart("x"),)), VOCABULARY, TEXT)
    for seed in range(50):
        assert draw_spans(tokens, 1, keyed(seed)) == [(1, len(tokens) - 1)]


def source_of(tmp_path: Path, words: int, **objective) -> tuple[PackedSource, FinetuneRecipe]:
    tiny_pair(tmp_path)
    rows = [{"text": " ".join(f"the cat {n} of {number}" for n in range(words))} for number in range(6)]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_for(tmp_path, objective=objective)
    bundle = load_bundle(Path(recipe.model))
    source = open_source("a", Source(kind="text", path=str(file), weight=1.0), bundle)
    return PackedSource(source, 0, bundle, recipe, 256), recipe


def test_growth_is_budgeted_before_a_long_text_is_cut(tmp_path):
    """Pieces that were cut to the length of a sequence first would have no room for a span."""
    packed, recipe = source_of(tmp_path, 60, cm3=1.0, condition_drop=0.0)
    for index in range(6):
        whole = next(cut(packed.source, packed.bundle, index, 0.0, 10_000, lambda document: 0))
        pieces = list(packed._instances(index, keyed(index)))
        assert len(pieces) > 5 and all(len(piece) <= recipe.data.seq_len for piece in pieces)
        assert all((piece.ids == MASK).any() for piece in pieces)
        back = [unmask(piece.ids, VOCABULARY) for piece in pieces]
        assert np.array_equal(np.concatenate([ids[1:] for ids in back]), whole.ids[1:])  # each begins with <s>
        assert all(ids[0] == VOCABULARY.controls["bos"] for ids in back)


def test_without_cm3_a_long_text_is_cut_to_full_sequences(tmp_path):
    packed, recipe = source_of(tmp_path, 60, cm3=0.0, condition_drop=0.0)
    lengths = [len(piece) for piece in packed._instances(0, keyed(0))]
    assert set(lengths[:-1]) == {recipe.data.seq_len}


def test_a_document_with_images_is_not_cut_and_gets_the_spans_that_fit():
    tokens = random_document(4)
    assert (tokens.heads == IMAGE_HEAD).any()
    for room in range(len(tokens), len(tokens) + 7):
        result = infilled(tokens, 5, keyed(room), VOCABULARY, room)
        assert len(result) <= room and np.array_equal(unmask(result.ids, VOCABULARY), tokens.ids)
        assert (len(result) > len(tokens)) == (room >= len(tokens) + 2)


def test_masking_nothing_is_the_document():
    tokens = random_document(0)
    assert mask_spans(tokens, [], VOCABULARY) is tokens


def test_a_vocabulary_without_a_mask_is_refused_where_one_would_be_written(tmp_path):
    """Owners' models have none: Chameleon, Liquid, a plain language model."""
    controls = {name: id for name, id in VOCABULARY.controls.items() if name not in ("mask", "infill")}
    plain = replace(VOCABULARY, controls=controls)
    tokens = render(Document((TextPart("a cat"), CodesPart((0,) * CODES_PER_IMAGE))), plain, TEXT)
    assert infilled(tokens, 0, keyed(0), plain, 100) is tokens
    for instance in (1, CAPTION):
        with pytest.raises(RunError, match=r"no 'mask' control; set objective\.cm3"):
            infilled(tokens, instance, keyed(0), plain, 100)
