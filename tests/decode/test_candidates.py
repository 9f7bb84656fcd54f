"""Several images for one prompt: drawn two ways in one batch, ranked by the model or by a judge."""

from dataclasses import replace

import pytest
import torch

from jam.decode.candidates import draw_candidates
from jam.decode.engine import generate
from jam.decode.grammar import Kind
from jam.decode.options import SamplingOptions
from jam.document import CodesPart, Document, TextPart
from jam.errors import GenerationError
from jam.models.heads import next_heads
from jam.models.load import Bundle
from jam.tokens.render import render
from tests.decode.bundles import cross_bundle, plain_bundle

PROMPT = Document((TextPart("draw a cat", "user"),))
OPTIONS = SamplingOptions(mode="image", max_images=1, image_top_p=0.9, guidance_scale=2.0)


@pytest.fixture(scope="module", params=[plain_bundle, cross_bundle])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return request.param(tmp_path_factory.mktemp("candidates"))


def codes_of(reply) -> tuple[int, ...]:
    (codes,) = [part.codes for part in reply.document.parts if isinstance(part, CodesPart)]
    return codes


def likelihood(bundle: Bundle, start: list[int], codes: tuple[int, ...]) -> float:
    span, begin = bundle.vocabulary.image_span, bundle.vocabulary.controls["begin_image"]
    ids = torch.tensor([[*start, begin, *(span.start + code for code in codes)]])
    with torch.inference_mode():
        logits = bundle.logits(ids, next_heads(ids, bundle.vocabulary))[0][0, len(start) : -1, span.start : span.stop]
    return float(logits.log_softmax(-1)[range(len(codes)), list(codes)].sum())


@pytest.mark.parametrize("rank", ["likelihood", "ratio"])
def test_the_score_is_that_of_whole_forwards(bundle: Bundle, rank: str) -> None:
    found = draw_candidates(bundle, PROMPT, 6, OPTIONS, rank)
    start = render(PROMPT, bundle.vocabulary, bundle.text, complete=False).ids.tolist()
    prefix = [bundle.vocabulary.controls[name] for name in ("bos", "mask")]
    for candidate in found:
        codes = codes_of(candidate.reply)
        nothing = likelihood(bundle, prefix, codes) if rank == "ratio" else 0.0
        assert candidate.score == pytest.approx(likelihood(bundle, start, codes) - nothing, abs=1e-9)
    assert [candidate.score for candidate in found] == sorted((c.score for c in found), reverse=True)
    assert sorted(candidate.guidance for candidate in found) == ["cd_k"] * 3 + ["cfg"] * 3


def test_each_is_what_it_would_be_alone(bundle: Bundle) -> None:
    found = {codes_of(candidate.reply) for candidate in draw_candidates(bundle, PROMPT, 4, OPTIONS)}
    span = bundle.vocabulary.image_span
    for stream in range(4):
        own = OPTIONS if stream % 2 == 0 else replace(OPTIONS, guidance="cd_k")
        steps = [step for step in generate(bundle, [PROMPT], own, [stream]) if step.kind is Kind.CODE]
        assert tuple(step.token - span.start for step in steps) in found


def test_a_judge_sees_the_images_and_decides(bundle: Bundle) -> None:
    seen = []

    def judge(images):
        seen.extend(images)
        return [float(number) for number in range(len(images))]

    found = draw_candidates(bundle, PROMPT, 3, OPTIONS, judge=judge)
    assert [candidate.score for candidate in found] == [2.0, 1.0, 0.0]
    assert [candidate.reply.images[0].tobytes() for candidate in found] == [image.tobytes() for image in seen[::-1]]


@pytest.mark.parametrize(
    ("count", "changes", "words"),
    [
        (0, {}, "candidates is 0; required: from 1 to 64"),
        (65, {}, "candidates is 65"),
        (2, {"mode": "interleaved"}, "the mode is interleaved"),
        (2, {"max_images": 2}, "max_images 2"),
        (2, {"image_temperature": 0.0}, "drawn by chance"),
        (1, {"image_temperature": 0.0, "image_beams": 4}, "image_beams is 4"),
    ],
)
def test_what_cannot_be_is_refused(bundle: Bundle, count: int, changes: dict, words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        draw_candidates(bundle, PROMPT, count, replace(OPTIONS, **changes))
    with pytest.raises(GenerationError, match="rank is ratio and nothing guides"):
        draw_candidates(bundle, PROMPT, 1, replace(OPTIONS, guidance_scale=1.0), "ratio")
    with pytest.raises(GenerationError, match="rank is 'best'; required: likelihood or ratio"):
        draw_candidates(bundle, PROMPT, 2, OPTIONS, "best")


def test_a_judge_needs_pixels(bundle: Bundle) -> None:
    with pytest.raises(GenerationError, match="no image tokenizer to make pixels for a judge"):
        draw_candidates(replace(bundle, image=None), PROMPT, 2, OPTIONS, judge=lambda images: [0.0] * len(images))
