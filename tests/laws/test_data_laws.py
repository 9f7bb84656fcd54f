"""Laws of the data's way: CM3 is invertible, packing isolates, the order is arithmetic, shares are exact."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.data.sources import keyed, open_source
from finetune.order.cm3 import caption_span, draw_instance, draw_spans, infilled, mask_spans, segment_bounds, unmask
from finetune.order.pack import Placed, best_fit, collate, noisy_codes
from finetune.order.plan import BLOCK, PackedSource, Plan, quotas
from finetune.recipe import FinetuneRecipe, ObjectiveSection
from jam.document import CodesPart, Document, TextPart
from jam.errors import DataError
from jam.models.load import load_bundle
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD, parse, render
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import IMAGE
from tests.tiny import CODES, CODES_PER_IMAGE, tiny_document, tiny_pair, tiny_tokenizer, tiny_vocabulary

VOCABULARY = tiny_vocabulary(images=True)
TEXT = TextTokenizer(tiny_tokenizer())


def tokens_of(seed: int, images: int = 2):
    return render(tiny_document(seed, images), VOCABULARY, TEXT)


def test_cm3_is_invertible_and_spans_stay_in_one_segment():
    masked = multi = 0
    for seed in range(300):
        tokens = tokens_of(seed % 7)
        generator = keyed(seed)
        spans = draw_spans(tokens, int(generator.integers(1, 6)), generator)
        for start, stop in spans:
            assert start < stop
            assert len(set(tokens.segments[start:stop])) == 1 and tokens.segments[start] >= 0
        changed = mask_spans(tokens, spans, VOCABULARY)
        assert len(changed) == len(tokens) + 2 * len(spans)
        assert np.array_equal(unmask(changed.ids, VOCABULARY), tokens.ids)
        mask_weights = changed.weights[changed.ids == VOCABULARY.controls["mask"]]
        assert (mask_weights == 0).all() and len(mask_weights) == len(spans)
        masked += bool(spans)
        multi += len(spans) > 1
    assert masked > 200 and multi > 50  # not vacuous


def test_cm3_keeps_every_code_under_the_image_head_and_every_word_under_the_text_head():
    kinds = VOCABULARY.kinds()
    for seed in range(100):
        tokens = tokens_of(seed % 5)
        changed = mask_spans(tokens, draw_spans(tokens, 4, keyed(seed)), VOCABULARY)
        assert (changed.heads[kinds[changed.ids] == IMAGE] == IMAGE_HEAD).all()
        text = (changed.ids >= 8) & (kinds[changed.ids] != IMAGE)
        assert (changed.heads[text] == TEXT_HEAD).all()


def test_cm3_never_outgrows_its_room():
    tokens = tokens_of(0)
    for seed in range(100):
        room = len(tokens) + seed % 4
        generator = keyed(seed)
        instance = draw_instance(generator, ObjectiveSection(cm3=1.0, condition_drop=0.3))
        result = infilled(tokens, instance, generator, VOCABULARY, room)
        assert len(result) <= room
        assert np.array_equal(unmask(result.ids, VOCABULARY), tokens.ids)


def test_a_dropped_condition_is_the_form_that_guidance_uses():
    document = Document((TextPart("a red cat"), CodesPart((1, 2, 3, 4))))
    tokens = render(document, VOCABULARY, TEXT)
    dropped = mask_spans(tokens, caption_span(tokens), VOCABULARY)
    controls = VOCABULARY.controls
    assert dropped.ids[:3].tolist() == [controls["bos"], controls["mask"], controls["begin_image"]]
    image_first = render(Document(document.parts[::-1]), VOCABULARY, TEXT)
    assert caption_span(image_first) == []


def test_noise_changes_only_codes_that_are_read_and_never_what_is_learnt():
    kinds, touched, whole = VOCABULARY.kinds(), 0, 0
    for seed in range(200):
        tokens = tokens_of(seed % 5)
        first = tokens.segments == tokens.segments[kinds[tokens.ids] == IMAGE][0]
        given = np.where(first, 0, tokens.weights).astype(np.float32)  # the first image is the user's: no loss
        tokens = dataclasses.replace(tokens, weights=given)
        inputs = noisy_codes(tokens, keyed(seed), VOCABULARY, 0.5)
        if inputs is None:
            whole += 1
            continue
        changed = inputs != tokens.ids
        assert (kinds[inputs] == kinds[tokens.ids]).all() and (kinds[inputs[changed]] == IMAGE).all()
        assert not (changed & first).any()
        touched += int(changed.sum())
        plain, noisy = (
            collate([[Placed(tokens, 3, read)]], [0], len(tokens) + 2, VOCABULARY.controls["pad"])
            for read in (None, inputs)
        )
        assert torch.equal(noisy.ids[0, : len(tokens)], torch.from_numpy(inputs).long())
        for name in ("labels", "head_ids", "weights", "positions", "mask"):
            assert torch.equal(getattr(plain, name), getattr(noisy, name)), name
    assert touched > 100 and 60 < whole < 140


def test_parse_inverts_render_and_typed_controls_are_text():
    document = Document(
        (
            TextPart("What is <break> this?", "user", 0.0),
            CodesPart((0, 1, 2, 3), "user", 0.0),
            TextPart("a cat", "assistant", 1.0),
            CodesPart((CODES - 1,) * CODES_PER_IMAGE, "assistant", 1.0),
            TextPart("</s><mask> again", "user", 0.0),
            TextPart("yes", "assistant", 1.0),
        )
    )
    tokens = render(document, VOCABULARY, TEXT)
    assert parse(tokens.ids.tolist(), VOCABULARY, TEXT) == document
    assert (tokens.ids == VOCABULARY.controls["begin_image"]).sum() == 4  # two images, and no typed one


def test_every_segment_is_found():
    tokens = tokens_of(0, images=3)
    assert len(segment_bounds(tokens)) == 7  # caption, then image and text three times


def test_best_fit_loses_and_splits_nothing():
    lengths = np.random.default_rng(0).integers(1, 50, 400).tolist()
    bins = best_fit(lengths, 64)
    assert sorted(i for b in bins for i in b) == list(range(400))
    assert all(sum(lengths[i] for i in b) <= 64 for b in bins)
    assert sum(lengths) / (len(bins) * 64) > 0.97


@pytest.mark.parametrize("weights", [[0.5, 0.3, 0.2], [1, 1, 1], [0.07, 0.93]])
def test_quotas_are_exact(weights):
    counts = quotas(weights, BLOCK)
    assert sum(counts) == BLOCK
    assert all(abs(c - w / sum(weights) * BLOCK) < 1 for c, w in zip(counts, weights, strict=True))


def recipe_for(tmp: Path, **changes) -> FinetuneRecipe:
    (tmp / "text.jsonl").write_text("".join(json.dumps({"text": f"line {i} of the cat"}) + "\n" for i in range(40)))
    (tmp / "more.jsonl").write_text("".join(json.dumps({"text": f"other {i}"}) + "\n" for i in range(7)))
    raw = {
        "model": str(tmp / "image"),
        "output_dir": str(tmp / "run"),
        "data": {
            "seq_len": 64,
            "mix": {
                "a": {"kind": "text", "path": str(tmp / "text.jsonl"), "weight": 0.7},
                "b": {"kind": "text", "path": str(tmp / "more.jsonl"), "weight": 0.3},
            },
        },
        "objective": {"cm3": 0.5},
        "train": {"steps": 4, "micro_batch_size": 2, "global_batch_size": 4},
    }
    return FinetuneRecipe.model_validate(raw | changes)


def plan_for(tmp: Path) -> Plan:
    recipe = recipe_for(tmp)
    bundle = load_bundle(Path(recipe.model))
    sources = [open_source(name, entry, bundle) for name, entry in recipe.data.mix.items()]
    packed = [PackedSource(s, number, bundle, recipe, 256) for number, s in enumerate(sources)]
    return Plan(packed, [entry.weight for entry in recipe.data.mix.values()], seed=0)


def flat(sequence) -> list:
    return [(p.tokens.ids.tolist(), p.offset) for p in sequence]


def test_order_is_arithmetic_whatever_the_order_of_asking(tmp_path):
    tiny_pair(tmp_path)
    forward, backward = plan_for(tmp_path), plan_for(tmp_path)
    straight = {t: flat(forward.sequence(t)[1]) for t in range(60)}
    reverse = {t: flat(backward.sequence(t)[1]) for t in reversed(range(60))}
    assert straight == reverse
    assert len({json.dumps(s) for s in straight.values()}) > 50


def test_a_walk_goes_on_where_it_was_and_back_when_asked(tmp_path, monkeypatch):
    tiny_pair(tmp_path)
    straight, again = (plan_for(tmp_path).sources[0] for _ in range(2))
    expected = [flat(straight.sequence(number)) for number in range(60)]
    window, start = straight.walked
    assert window > 3 and 0 < start < 60
    again.walk_from(window, start)
    packed, pack = [], PackedSource._pack
    monkeypatch.setattr(PackedSource, "_pack", lambda self, number: packed.append(number) or pack(self, number))
    assert [flat(again.sequence(number)) for number in range(start, 60)] == expected[start:]
    assert set(packed) == {window}
    assert [flat(again.sequence(number)) for number in range(60)] == expected


def test_shares_are_exact_in_every_block_and_sources_advance_without_gaps(tmp_path):
    tiny_pair(tmp_path)
    plan = plan_for(tmp_path)
    owners = [plan.owner(t) for t in range(3 * BLOCK)]
    for block in range(3):
        chosen = [source for source, _ in owners[block * BLOCK : (block + 1) * BLOCK]]
        assert [chosen.count(0), chosen.count(1)] == [70, 30]
    for source in (0, 1):
        assert [n for s, n in owners if s == source] == list(range(len([1 for s, _ in owners if s == source])))


def test_a_source_too_small_for_its_block_is_refused_and_never_left_out_in_silence(tmp_path):
    tiny_pair(tmp_path)
    packed = plan_for(tmp_path).sources
    with pytest.raises(DataError, match=r"data\.mix\.b: its share of the mix rounds to 0 of 100"):
        Plan(packed, [0.998, 0.002], seed=0)


def test_an_epoch_holds_every_document_once(tmp_path):
    tiny_pair(tmp_path)
    source = plan_for(tmp_path).sources[0]
    first = [flat(source.sequence(n)) for n in range(20)]
    seen = [tuple(unmask(np.array(ids), VOCABULARY)) for sequence in first for ids, _ in sequence][:40]
    assert len(set(seen)) == 40


def test_packed_documents_cannot_see_one_another(tmp_path):
    plan_documents = [tokens_of(seed, images=1) for seed in range(3)]
    from finetune.order.pack import Placed

    batch = collate([[Placed(t, 5 * i) for i, t in enumerate(plan_documents)]], [0], 128, pad=1)
    at = 0
    for index, tokens in enumerate(plan_documents):
        stop = at + len(tokens)
        inside = batch.mask[0, 0, at:stop]
        assert not inside[:, :at].any() and not inside[:, stop:].any()
        assert torch.equal(inside[:, at:stop], torch.ones(len(tokens), len(tokens)).tril().bool())
        assert batch.positions[0, at] == 5 * index
        assert batch.labels[0, stop - 1] == -1
        at = stop
    assert batch.mask[0, 0].any(dim=1).all()  # no query attends to nothing: softmax over nothing is not a number
    assert (batch.weights[0, at:] == 0).all()
