"""A hole in a prompt: written as training writes it, filled as the naive loop fills it, put back where it was."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

from finetune.order.cm3 import mask_spans, unmask
from jam.decode.candidates import draw_candidates
from jam.decode.custom_generate import custom_generate
from jam.decode.engine import generate
from jam.decode.grammar import Kind, Step
from jam.decode.job import prepare
from jam.decode.naive import generate_naive
from jam.decode.options import SamplingOptions
from jam.decode.stream import ImageDone, ImageStart, Reply, events, filled, replies
from jam.document import CodesPart, Document, MaskPart, Part, TextPart
from jam.errors import DataError, GenerationError
from jam.models.heads import next_heads
from jam.models.load import Bundle, load_bundle
from jam.tokens.render import render
from jam.tokens.text import TextStream, TextTokenizer
from tests.decode.bundles import cross_bundle, plain_bundle
from tests.tiny import CODES_PER_IMAGE, tiny_pair, tiny_sentencepiece, tiny_tokenizer, tiny_vocabulary

VOCABULARY = tiny_vocabulary(images=True)
TEXT = TextTokenizer(tiny_tokenizer())
CAT, DOG = CodesPart((1, 5, 9, 15)), CodesPart((2, 2, 7, 0))
WORDS, IMAGE = MaskPart("text"), MaskPart("image")
HOLES = [
    Document((TextPart("a red"), WORDS, TextPart(" on the"))),
    Document((WORDS, CAT, TextPart("and"))),
    Document((IMAGE, TextPart("a cat"))),
    Document((TextPart("one"), CAT, IMAGE, TextPart("two"), DOG)),
]
ORDINARY = [Document((TextPart("draw a cat", "user"),)), Document((TextPart("on"),))]
LIVELY = SamplingOptions(max_tokens=30, text_temperature=1.0, text_top_p=1.0)


@pytest.fixture(scope="module", params=["plain", "cross"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp(request.param)
    return plain_bundle(folder) if request.param == "plain" else cross_bundle(folder)


def rows(steps: list[Step]) -> dict[int, list[Step]]:
    found: dict[int, list[Step]] = {}
    for step in steps:
        found.setdefault(step.row, []).append(step)
    return found


def document(*parts: Part | str) -> Document:
    return Document(tuple(TextPart(part) if isinstance(part, str) else part for part in parts))


# document with a hole, what fills it
FILLED = {
    "text in text": (document("a red", WORDS, " on the"), TextPart(" cat")),
    "text at the start": (document(WORDS, " cat on the", CAT), TextPart("a red")),
    "text at the end": (document(CAT, "a red", WORDS), TextPart(" cat")),
    "a caption": (document(WORDS, CAT), TextPart("a red cat")),
    "text between images": (document(CAT, WORDS, DOG), TextPart("then")),
    "an image before its caption": (document(IMAGE, "a red cat"), CAT),
    "an image after its caption": (document("a red cat", IMAGE), CAT),
    "an image between images": (document(CAT, IMAGE, DOG), DOG),
    "an image alone": (document(IMAGE), CAT),
}


def llama_tokenizer() -> Tokenizer:
    """One that puts a space before every text and takes one off, as Llama 2's does."""
    tokenizer = tiny_sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("no such text", "isolated")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([tokenizer.decoder, decoders.Strip(" ", 1, 0)])
    return tokenizer


@pytest.mark.parametrize("tokenizer", [tiny_tokenizer, tiny_sentencepiece, llama_tokenizer])
@pytest.mark.parametrize("name", FILLED)
def test_prompt_and_filling_are_what_training_writes(name: str, tokenizer: Callable[[], Tokenizer]) -> None:
    """Ids and heads of the prompt, the span and ``</s>`` are those of ``mask_spans`` on the whole document."""
    text = TextTokenizer(tokenizer())
    vocabulary = tiny_vocabulary(images=True, sentencepiece=tokenizer is not tiny_tokenizer)
    prompt, filling = FILLED[name]
    whole_document = filled(prompt, Reply(Document((filling,)), (), "eos"))
    assert not any(isinstance(part, MaskPart) for part in whole_document.parts)
    whole = render(whole_document, vocabulary, text)
    start = render(prompt, vocabulary, text, complete=False)
    is_text = isinstance(filling, TextPart)
    before = next((a for a, b in pairwise(prompt.parts) if isinstance(b, MaskPart)), None)
    inside = is_text and isinstance(before, TextPart)
    span = text.encode(filling.text, inside) if is_text else vocabulary.image_ids(filling.codes).tolist()
    if is_text and (inside or tokenizer is not tiny_sentencepiece):  # which keeps the space before a text
        assert text.decode(span, inside) == filling.text
        stream = TextStream(text, inside)
        assert "".join([*map(stream.push, span), stream.flush()]) == filling.text
    at = start.ids.tolist().index(vocabulary.controls["mask"])
    trained = mask_spans(whole, [(at, at + len(span))], vocabulary)
    assert [*start.ids, *span, vocabulary.controls["eos"]] == trained.ids.tolist()
    assert start.heads.tolist() == trained.heads[: len(start)].tolist()
    assert start.weights[at] == trained.weights[at] == 0
    heads = next_heads(torch.tensor(trained.ids[None]), vocabulary)[0, len(start) - 1 : -1]
    assert heads.tolist() == trained.heads[len(start) :].tolist()


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("beams", [1, 3])
def test_filling_is_naive(bundle: Bundle, scale: float, beams: int) -> None:
    """In a batch with ordinary rows, which open images while holes are filled, and alone."""
    prompts = [HOLES[0], ORDINARY[0], HOLES[2], HOLES[1], ORDINARY[1], HOLES[3]]
    temperature = 1.0 if beams == 1 else 0.0
    options = replace(LIVELY, guidance_scale=scale, image_beams=beams, image_temperature=temperature)
    each = [replace(options, min_images=int(prompt in ORDINARY)) for prompt in prompts]
    together = rows(list(generate(bundle, prompts, each)))
    assert together == rows(list(generate_naive(bundle, prompts, each)))
    for row, prompt in enumerate(prompts):
        alone = list(generate(bundle, [prompt], each[row], [row]))
        assert [replace(step, row=row) for step in alone] == together[row]
    for row in (2, 5):
        assert [step.kind for step in together[row]] == [*[Kind.CODE] * CODES_PER_IMAGE, Kind.EOS]
        assert together[row][-1].stop == "eos"
    for row in (0, 3):
        kinds = [step.kind for step in together[row]]
        assert set(kinds[:-1]) <= {Kind.TEXT} and kinds[-1] in (Kind.TEXT, Kind.EOS)
    assert any(step.kind is Kind.TEXT for row in (0, 3) for step in together[row])


@pytest.mark.parametrize(
    "changes",
    [
        {"image_guidance_scale": 2.0},
        {"guidance": "cd_k", "cd_alpha": 0.3},
        {"image_repetition_penalty": 2.0, "text_repetition_penalty": 2.0},
    ],
)
def test_every_guidance_of_a_hole_is_naive(bundle: Bundle, changes: dict) -> None:
    options = replace(LIVELY, seed=3, **changes)
    fast = rows(list(generate(bundle, HOLES, options)))
    assert fast == rows(list(generate_naive(bundle, HOLES, options)))
    assert fast != rows(list(generate(bundle, HOLES, replace(LIVELY, seed=3))))


def test_scale_zero_does_not_see_the_caption(bundle: Bundle) -> None:
    """The stream under a hole is that under an image which the reply opens itself."""
    options = replace(LIVELY, mode="image", max_images=1, guidance_scale=0.0)
    prompts = [HOLES[2], document(IMAGE, "an other and longer one"), ORDINARY[1]]
    steps = rows(list(generate(bundle, prompts, replace(options, image_temperature=0.0))))
    codes = [[step.token for step in own if step.kind is Kind.CODE] for own in steps.values()]
    assert codes[0] == codes[1] == codes[2]


def test_what_is_trained_is_what_is_read(bundle: Bundle) -> None:
    """The reply's ids after the prompt's, unmasked, are the filled document."""
    found = replies(bundle, HOLES, LIVELY)
    steps = rows(list(generate(bundle, HOLES, LIVELY)))
    for row, prompt in enumerate(HOLES):
        ids = render(prompt, bundle.vocabulary, bundle.text, complete=False).ids
        whole = unmask(torch.tensor([*ids, *(step.token for step in steps[row])]).numpy(), bundle.vocabulary)
        codes = [token for token in whole if bundle.vocabulary.kinds()[token] == 2]
        parts = filled(prompt, found[row]).parts
        mine = [code for part in parts if isinstance(part, CodesPart) for code in part.codes]
        assert bundle.vocabulary.image_ids(mine).tolist() == codes
        words = "".join(part.text for part in parts if isinstance(part, TextPart))
        assert words == bundle.text.decode([t for t in whole if 8 <= t < bundle.vocabulary.image_span.start])
        assert not any(isinstance(a, TextPart) and isinstance(b, TextPart) for a, b in pairwise(parts))


def test_an_image_in_a_hole_is_shown_as_others(bundle: Bundle) -> None:
    seen = [event for event in events(bundle, [HOLES[2]], LIVELY) if isinstance(event, ImageStart | ImageDone)]
    (reply,) = replies(bundle, [HOLES[2]], LIVELY)
    (codes,) = reply.document.parts
    assert seen == [ImageStart(0, 0), ImageDone(0, 0, codes.codes, seen[1].image)] and len(reply.images) == 1
    assert reply.stop == "eos"


def test_a_stop_string_may_begin_with_the_space_that_goes_on(bundle: Bundle) -> None:
    """A tokenizer that drops a text's first space keeps that of a hole's, which goes on from the words before."""
    text, vocabulary = TextTokenizer(llama_tokenizer()), tiny_vocabulary(images=True, sentencepiece=True)
    own = replace(bundle, text=text, vocabulary=vocabulary)
    for prompt, stops in ((document("a red", WORDS), True), (document(CAT, WORDS), False), (document("a"), False)):
        job = prepare(own, [prompt], replace(LIVELY, stop=(" ",)))
        (step,) = job.take({0: text.encode("cat")[0]}, 0)
        assert (step.stop == "stop") is stops


def test_candidates_for_a_hole(bundle: Bundle) -> None:
    options = replace(LIVELY, mode="image", max_images=1)
    found = draw_candidates(bundle, HOLES[2], 4, options, "ratio")
    assert len({one.reply.document for one in found}) > 1
    assert all(isinstance(part, CodesPart) for one in found for part in one.reply.document.parts)


def test_transformers_generate_fills_holes(bundle: Bundle) -> None:
    for row, prompt in enumerate(HOLES):
        ids = render(prompt, bundle.vocabulary, bundle.text, complete=False).ids.tolist()
        loop = custom_generate(bundle, LIVELY)
        found = loop(bundle.model, torch.tensor([ids]))[0, len(ids) :].tolist()
        assert found == [step.token for step in generate(bundle, [prompt], LIVELY)], row


@pytest.mark.parametrize(
    ("prompt", "changes", "words"),
    [
        (document(WORDS, CAT, IMAGE), {}, ["2 holes", "one is filled"]),
        (document(IMAGE, "a cat"), {"mode": "text"}, ["takes image", "mode is text"]),
        (document("a", WORDS), {"mode": "image"}, ["takes text", "mode is image"]),
        (document("a", WORDS), {"min_images": 1}, ["min_images 1", "hold no image"]),
        (document(IMAGE), {"min_images": 2}, ["min_images is 2", "one image"]),
        (document(IMAGE), {"max_images": 0}, ["max_images 0"]),
        (document(IMAGE), {"max_tokens": CODES_PER_IMAGE}, ["max_tokens is 4", "needs 5"]),
        (document("x" * 249, IMAGE), {}, ["254 tokens", "room for 5 more"]),
        (Document((TextPart("a", "user"), WORDS)), {}, ["a conversation", "plain document"]),
    ],
)
def test_a_hole_that_cannot_be_filled_is_one_line(
    bundle: Bundle, prompt: Document, changes: dict, words: list[str]
) -> None:
    with pytest.raises((DataError, GenerationError)) as caught:
        generate(bundle, [prompt], replace(LIVELY, **changes))
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


def test_models_without_the_controls_say_so(bundle: Bundle, tmp_path: Path) -> None:
    text_model = load_bundle(tiny_pair(tmp_path)[0])
    vocabulary = replace(
        bundle.vocabulary, controls={k: v for k, v in bundle.vocabulary.controls.items() if k != "infill"}
    )
    for prompt in (document("a", WORDS), document(IMAGE)):
        with pytest.raises(DataError, match="no 'mask' control; models trained with the CM3 objective"):
            generate(text_model, [prompt])
        with pytest.raises(DataError, match="no 'infill' control"):
            render(prompt, vocabulary, bundle.text, complete=False)


def test_complete_documents_and_other_prompts_have_no_hole() -> None:
    with pytest.raises(DataError, match="complete document has no hole"):
        render(document("a", WORDS), VOCABULARY, TEXT)
    with pytest.raises(GenerationError, match="has 0 holes"):
        filled(document("a"), Reply(document("b"), (), "eos"))


def test_an_image_fits_to_the_last_position(bundle: Bundle) -> None:
    """A prompt that leaves an image and its end gets both."""
    steps = list(generate(bundle, [document("x" * 246, IMAGE)], replace(LIVELY, max_tokens=CODES_PER_IMAGE + 1)))
    assert [step.kind for step in steps] == [*[Kind.CODE] * CODES_PER_IMAGE, Kind.EOS]
