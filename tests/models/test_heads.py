"""Which head predicts the next token, read off ids alone, must be what the writers of documents say."""

import dataclasses

import numpy as np
import pytest
import torch

from finetune.order.cm3 import draw_spans, mask_spans, segment_bounds
from jam.models.heads import allowed_ids, next_heads, restrict
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD, render
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import Span, Vocabulary
from tests.tiny import CODES_PER_IMAGE, tiny_document, tiny_tokenizer, tiny_vocabulary

BOS, PAD, EOS, MASK, INFILL, BREAK = range(6)
WORD, CODE = 100, 290
VOCABULARY = tiny_vocabulary(images=True)
LETTERS = {TEXT_HEAD: "t", IMAGE_HEAD: "i"}


def heads(ids: list[int], vocabulary: Vocabulary = VOCABULARY) -> str:
    return "".join(LETTERS[head] for head in next_heads(torch.tensor([ids]), vocabulary)[0].tolist())


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([BOS, WORD, WORD, EOS], "tttt"),
        ([BOS, WORD, BREAK, CODE, CODE, BREAK, WORD, EOS], "ttiiittt"),  # opens, codes, closes
        ([BOS, BREAK, CODE, BREAK, BREAK, CODE, BREAK, EOS], "tiitiitt"),  # a second image at once
        ([BOS, MASK, BREAK, CODE, BREAK], "ttiit"),  # <mask> for text
        ([BOS, BREAK, MASK, CODE, BREAK], "tiiit"),  # <mask> at an image's start
        ([BOS, BREAK, CODE, MASK, CODE, BREAK, WORD], "tiiiitt"),  # inside an image
        ([BOS, BREAK, CODE, MASK, BREAK, WORD], "tiiitt"),  # at its end: the <break> still closes
        ([BOS, BREAK, CODE, BREAK, MASK, EOS], "tiittt"),  # <mask> for text after an image
        ([BOS, BREAK, CODE, MASK, MASK, BREAK, WORD], "tiiiitt"),
        ([BOS, BREAK, MASK, BREAK, WORD], "tiitt"),  # a whole image masked: the second <break> closes
        ([BOS, BREAK, CODE, BREAK, MASK, BREAK, CODE, BREAK], "tiittiit"),  # the text between two images masked
        ([BOS, MASK, BREAK, MASK, BREAK, INFILL, WORD, INFILL, CODE, EOS], "ttiitttiit"),  # <infill> follows its <mask>
        ([BOS, BREAK, MASK, BREAK, INFILL, CODE, EOS, BOS, MASK, INFILL, WORD], "tiitiitttt" + "t"),  # per document
        ([PAD, PAD, BOS, WORD, BREAK, CODE], "ttttii"),
        ([MASK, CODE, BREAK], "tit"),  # a stream may start anywhere
    ],
)
def test_the_rule(ids: list[int], expected: str) -> None:
    assert heads(ids) == expected


def test_rows_do_not_see_each_other() -> None:
    rows = [[BOS, WORD, BREAK, CODE], [CODE, BREAK, WORD, WORD], [MASK, BREAK, CODE, BREAK]]
    both = next_heads(torch.tensor(rows), VOCABULARY)
    for ids, row in zip(rows, both, strict=True):
        assert row.tolist() == next_heads(torch.tensor([ids]), VOCABULARY)[0].tolist()


def test_two_different_controls_around_an_image() -> None:
    two = dataclasses.replace(
        VOCABULARY, controls=VOCABULARY.controls | {"begin_image": 5, "end_image": 4, "infill": 3}
    )
    assert heads([BOS, WORD, 5, CODE, CODE, 4, WORD, 5, CODE], two) == "ttiiittii"


def test_a_text_model_has_one_head() -> None:
    assert heads([BOS, WORD, WORD, EOS], tiny_vocabulary(images=False)) == "tttt"


def test_the_rule_is_the_writers() -> None:
    """``render`` states the head that predicts each token; reading the ids must give the same."""
    text = TextTokenizer(tiny_tokenizer())
    for seed, images in ((0, 0), (1, 1), (2, 3)):
        tokens = render(tiny_document(seed, images), VOCABULARY, text)
        read = next_heads(torch.from_numpy(tokens.ids).long()[None], VOCABULARY)[0]
        assert read[:-1].tolist() == tokens.heads[1:].tolist()
        assert read.sum() == images * (CODES_PER_IMAGE + 1)


def test_the_rule_is_the_cm3_transforms() -> None:
    """Spans moved behind the document, whole segments and codes among them, in one packed row."""
    text = TextTokenizer(tiny_tokenizer())
    generator = np.random.default_rng(0)
    rows, masked_images = [], 0
    for seed in range(60):
        tokens = render(tiny_document(seed, seed % 4), VOCABULARY, text)
        spans = segment_bounds(tokens)[:: 1 + seed % 3] if seed % 5 == 0 else draw_spans(tokens, 3, generator)
        masked_images += sum(bool(tokens.heads[start]) for start, _ in spans)
        rows.append(mask_spans(tokens, spans, VOCABULARY))
    assert masked_images > 20
    ids, stated = (np.concatenate([getattr(row, name) for row in rows]) for name in ("ids", "heads"))
    read = next_heads(torch.from_numpy(ids).long()[None], VOCABULARY)[0].numpy()
    inside = ids[1:] != BOS  # the first token of a document is never predicted
    assert (read[:-1] == stated[1:])[inside].all()


def test_what_each_head_may_say() -> None:
    allowed = allowed_ids(VOCABULARY)
    assert allowed[:, :8].all(), "both heads say control ids"
    assert allowed[TEXT_HEAD, 8:288].all() and not allowed[IMAGE_HEAD, 8:288].any()
    assert allowed[IMAGE_HEAD, 288:].all() and not allowed[TEXT_HEAD, 288:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restricted_logits_stay_finite_and_lose_nothing(dtype: torch.dtype) -> None:
    vocabulary = Vocabulary((Span("control", 0, 2), Span("text", 2, 4), Span("image", 4, 6)), {"bos": 0}, 0)
    logits = torch.arange(12.0, dtype=dtype).reshape(1, 2, 6)
    out = restrict(logits, torch.tensor([[TEXT_HEAD, IMAGE_HEAD]]), allowed_ids(vocabulary))
    low = torch.finfo(dtype).min
    assert out[0].tolist() == [[0, 1, 2, 3, low, low], [6, 7, low, low, 10, 11]]
    assert torch.isfinite(out - out).all(), "guidance subtracts streams"
