"""What is counted of documents: fill, infilling, dropped captions, tokens of each source."""

import numpy as np

from finetune.order.cm3 import caption_span, mask_spans
from finetune.order.pack import Placed
from finetune.run import run_finetune
from finetune.watching.measure import DOCUMENTS, PAIRS, PLACES, SOURCES, TOKENS, count, masked, shares
from jam.document import CodesPart, Document, TextPart
from jam.tokens.render import render
from jam.tokens.text import TextTokenizer
from tests.laws.test_data_laws import recipe_for
from tests.laws.test_training_laws import log_lines
from tests.tiny import CODES_PER_IMAGE, tiny_pair, tiny_tokenizer, tiny_vocabulary

VOCABULARY = tiny_vocabulary(images=True)
TEXT = TextTokenizer(tiny_tokenizer())
IMAGE = CodesPart(tuple(range(CODES_PER_IMAGE)))


def tokens_of(*parts):
    return render(Document(parts), VOCABULARY, TEXT)


def test_a_dropped_caption_is_told_from_infilling():
    caption, plain = tokens_of(TextPart("a cat"), IMAGE), tokens_of(TextPart("of the cat"))
    reverse = tokens_of(IMAGE, TextPart("a cat"))
    assert masked(caption, VOCABULARY) == (0, 0, 1, 0)
    assert masked(plain, VOCABULARY) == masked(reverse, VOCABULARY) == (0, 0, 0, 0)
    dropped = mask_spans(caption, caption_span(caption), VOCABULARY)
    assert masked(dropped, VOCABULARY) == (0, 0, 1, 1)
    (start, stop), image = caption_span(caption)[0], np.flatnonzero(caption.segments == 1)
    part = mask_spans(caption, [(start, stop - 1)], VOCABULARY)
    assert masked(part, VOCABULARY) == (1, stop - 1 - start, 1, 0)
    both = mask_spans(caption, [(start, stop), (int(image[1]), int(image[3]))], VOCABULARY)
    assert masked(both, VOCABULARY) == (1, stop - start + 2, 1, 0)
    whole = mask_spans(plain, [(1, len(plain) - 1)], VOCABULARY)  # no image follows: not the form of guidance
    assert masked(whole, VOCABULARY) == (1, len(plain) - 2, 0, 0)


def test_counts_by_source_and_shares_of_what_was_read():
    caption, plain = tokens_of(TextPart("a cat"), IMAGE), tokens_of(TextPart("of the cat"))
    dropped = mask_spans(caption, caption_span(caption), VOCABULARY)
    sequences = [[Placed(caption, 0), Placed(plain, 3)], [Placed(dropped, 0)]]
    found = count(sequences, [1, 0], [True, True], 40, VOCABULARY)
    a, b, c = len(caption), len(plain), len(dropped)
    assert found[[DOCUMENTS, TOKENS, PLACES, PAIRS]].tolist() == [3, a + b + c, 80, a * a + b * b + c * c]
    assert found[SOURCES:].tolist() == [c, a + b]
    line = shares(found.tolist())
    assert line["condition_drop"] == 0.5 and line["infill/documents"] == 0.0
    assert line["fill"] == round((a + b + c) / 80, 4)
    assert count(sequences, [1, 0], [False, True], 40, VOCABULARY)[7] == 0  # a conversation that holds <infill>
    assert "condition_drop" not in shares(count([[Placed(plain, 0)]], [0], [True], 40, VOCABULARY).tolist())


def test_a_log_has_the_shares_that_were_asked_for(tmp_path):
    tiny_pair(tmp_path)
    recipe = recipe_for(tmp_path)
    raw = recipe.model_dump(mode="json") | {"log": {"every": 4, "peak_tflops": 2.0}, "objective": {"cm3": 0.9}}
    raw["train"] |= {"steps": 100, "micro_batch_size": 1, "global_batch_size": 1}
    raw["data"]["seq_len"] = 32
    run_finetune(type(recipe).model_validate(raw))
    lines = log_lines(tmp_path / "run")
    last = lines[-1]
    assert (last["target/a"], last["target/b"]) == (0.7, 0.3)
    assert abs(last["share/a"] - 0.7) < 0.05 and last["share/a"] + last["share/b"] == 1.0
    assert abs(np.mean([line["infill/documents"] for line in lines]) - 0.9) < 0.05
    assert all(0 < line["infill/tokens"] < 1 and 0.5 < line["fill"] <= 1 for line in lines)
    assert last["seconds_left"] == 0.0 < lines[0]["seconds_left"]
    assert last["memory_gb"] > 0.1 and last["tokens_per_second"] > 0
    assert abs(last["mfu"] - last["tflops"] / 2.0) < 1e-4
