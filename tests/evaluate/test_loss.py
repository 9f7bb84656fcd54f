"""Held-out losses: against hand computation, against uniform logits, and the same in any batch."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from jam.document import CodesPart, Document, ImagePart, TextPart
from jam.errors import DataError
from jam.evaluate.loss import batches_by_length, evaluate_captions, evaluate_text
from jam.models.heads import allowed_ids, restrict
from jam.models.load import Bundle, load_bundle
from tests.tiny import CODES, CODES_PER_IMAGE, CONTROLS, tiny_document, tiny_pair

TEXTS = ["the cat and the hat", "", "on", "\u00e4 red \u2603 in the rain of the other one"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Bundle, Bundle]:
    text, image = tiny_pair(tmp_path_factory.mktemp("pair"))
    return load_bundle(text, torch.float64), load_bundle(image, torch.float64)


@dataclass
class Flat:
    """Stands for a bundle whose model gives every id the same logit."""

    bundle: Bundle

    def __getattr__(self, name: str):
        return getattr(self.bundle, name)

    def logits(self, ids, heads, **unused):
        zeros = torch.zeros(*ids.shape, self.bundle.vocabulary.size, dtype=torch.float64)
        return restrict(zeros, heads, allowed_ids(self.bundle.vocabulary)), None


def test_uniform_logits_cost_the_log_of_the_heads_own_rows(pair):
    """An image code competes with the other codes and the control rows, never with text."""
    flat = Flat(pair[1])
    nats = evaluate_captions(flat, [tiny_document(seed, images=2) for seed in range(3)])
    assert nats == pytest.approx(math.log(CODES + len(CONTROLS)), rel=1e-6)


def test_uniform_logits_of_text(pair):
    """Every token and the closing one cost the log of text and control rows; the bytes are those of the text."""
    flat, text = Flat(pair[1]), TEXTS[0]
    rows = pair[1].vocabulary.size - CODES
    tokens = len(pair[1].text.encode(text)) + 1
    assert evaluate_text(flat, [text]) == pytest.approx(tokens * math.log2(rows) / len(text), rel=1e-6)


def test_bits_per_byte_by_hand(pair):
    """One document at a time through the plain model, softmax and all, by loops."""
    bundle, nats, size = pair[0], 0.0, 0
    for text in TEXTS:
        ids = [0, *bundle.text.encode(text), 2]
        logits = bundle.model(torch.tensor([ids])).logits[0].double()
        for at, token in enumerate(ids[1:]):
            nats -= torch.log_softmax(logits[at], -1)[token].item()
        size += len(text.encode())
    assert evaluate_text(bundle, TEXTS) == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_nats_per_code_by_hand(pair):
    """Only codes count, each under codes and controls alone."""
    bundle, document = pair[1], tiny_document(3)
    start = bundle.vocabulary.image_span.start
    codes = [code + start for part in document.parts if isinstance(part, CodesPart) for code in part.codes]
    before = [0, *bundle.text.encode("a red cat"), 5]
    logits = bundle.model(torch.tensor([before + codes])).logits[0].double()
    own = [*range(len(CONTROLS)), *range(start, start + CODES)]
    nats = 0.0
    for at, code in enumerate(codes):
        nats -= torch.log_softmax(logits[len(before) - 1 + at][own], -1)[own.index(code)].item()
    assert len(codes) == CODES_PER_IMAGE
    assert evaluate_captions(bundle, [document]) == pytest.approx(nats / len(codes), rel=1e-6)


@pytest.mark.parametrize("batch_tokens", [1, 40, 10_000])
def test_batch_equals_single(pair, batch_tokens):
    bundle = pair[1]
    documents = [tiny_document(seed, images=1 + seed % 3) for seed in range(5)]
    alone = [evaluate_captions(bundle, [d]) for d in documents]
    counts = [1 + seed % 3 for seed in range(5)]
    expected = sum(n * c for n, c in zip(alone, counts, strict=True)) / sum(counts)
    assert evaluate_captions(bundle, documents, batch_tokens=batch_tokens) == pytest.approx(expected, rel=1e-6)
    assert evaluate_text(bundle, TEXTS, batch_tokens=batch_tokens) == pytest.approx(
        evaluate_text(bundle, TEXTS), rel=1e-6
    )


def test_a_long_text_is_cut_and_pays_only_for_what_is_kept(pair):
    """Cut in the middle of a snowman's three bytes: the whole character counts, what follows it does not."""
    bundle, text = pair[0], "abc\u2603 the end that nobody reads"
    kept = evaluate_text(bundle, [text], context=6)  # <s> a b c and two of the snowman's bytes
    ids = [0, *bundle.text.encode(text)][:6]
    logits = bundle.model(torch.tensor([ids])).logits[0].double()
    nats = -sum(torch.log_softmax(logits[at], -1)[token].item() for at, token in enumerate(ids[1:]))
    assert len(bundle.text.encode(text)) > 6
    assert kept == pytest.approx(nats / math.log(2) / len("abc\u2603".encode()), rel=1e-6)


def test_a_text_model_has_no_captions_and_reads_no_image(pair):
    assert evaluate_captions(pair[0], [tiny_document()]) is None


def test_refusals(pair):
    bundle = pair[1]
    with pytest.raises(DataError, match=r"2 texts with 0 bytes.*at least one"):
        evaluate_text(bundle, ["", ""])
    with pytest.raises(DataError, match="context holds 8; shorten"):
        evaluate_captions(bundle, [tiny_document()], context=8)
    with pytest.raises(DataError, match="1 documents without an image"):
        evaluate_captions(bundle, [Document((TextPart("no image"),))])
    pixels = Document((ImagePart(Image.new("RGB", (8, 8))),))
    with pytest.raises(DataError, match="codes first"):
        evaluate_captions(bundle, [pixels])


def test_progress_reaches_the_end(pair):
    seen: list[tuple[int, int]] = []
    evaluate_text(pair[0], TEXTS, batch_tokens=20, progress=lambda done, total: seen.append((done, total)))
    assert len(seen) > 1 and seen[-1][0] == seen[-1][1] and seen == sorted(seen)


def test_batches_hold_every_document_once_within_the_budget():
    lengths = [7, 3, 3, 50, 1, 12, 7]
    groups = batches_by_length(lengths, 20)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= 20 for group in groups)


def test_the_fixture_is_not_flat(pair):
    """Otherwise the hand computations above would agree by accident."""
    assert isinstance(pair[1].path, Path)
    assert abs(evaluate_captions(pair[1], [tiny_document()]) - math.log(CODES + len(CONTROLS))) > 0.01
