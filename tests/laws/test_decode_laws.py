"""Laws of decoding (float64, fixed seeds): the cached, batched, guided loop is the naive one, token for token."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jam.decode.engine import generate
from jam.decode.grammar import Kind, Step
from jam.decode.naive import generate_naive
from jam.decode.options import SamplingOptions
from jam.decode.slots import Slots
from jam.document import CodesPart, Document, TextPart
from jam.errors import GenerationError
from jam.models.families import FAMILIES
from jam.models.heads import next_heads
from jam.models.load import Bundle
from jam.tokens.render import render
from tests.decode.bundles import cross_bundle, plain_bundle

PROMPTS = [
    Document((TextPart("draw a cat", "user"),)),
    Document((TextPart("on"),)),
    Document((TextPart("what is this and the other thing?", "user"), CodesPart((1, 5, 9, 15), "user"))),
]
LIVELY = SamplingOptions(max_tokens=40, text_temperature=1.0, text_top_p=1.0, min_images=1)


@pytest.fixture(scope="module", params=["plain", "cross", "llama"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp(request.param)
    match request.param:
        case "plain":
            return plain_bundle(folder)
        case "cross":
            return cross_bundle(folder)
    return plain_bundle(folder, family="llama")


def rows(steps: list[Step]) -> dict[int, list[Step]]:
    """The steps of each row, in order; the naive loop gives rows one after the other."""
    found: dict[int, list[Step]] = {}
    for step in steps:
        found.setdefault(step.row, []).append(step)
    return found


def run(bundle: Bundle, prompts: list[Document] = PROMPTS, streams: list[int] | None = None, **changes) -> list[Step]:
    return list(generate(bundle, prompts, replace(LIVELY, **changes), streams))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"opt", "llama"}))
def test_every_family_is_naive(tmp_path: Path, family: str) -> None:
    """Windows, rotary positions by layer, capped heads, fused projections: as with the two above."""
    family_bundle = plain_bundle(tmp_path, family=family)
    options = replace(LIVELY, min_images=2)
    fast = rows(list(generate(family_bundle, PROMPTS, options)))
    assert fast == rows(list(generate_naive(family_bundle, PROMPTS, options)))


@pytest.mark.parametrize(("seed", "scale"), [(0, 1.0), (0, 3.0), (1, 3.0), (2, 3.0)])
def test_cached_batched_guided_is_naive(bundle: Bundle, seed: int, scale: float) -> None:
    options = replace(LIVELY, seed=seed, guidance_scale=scale)
    fast, slow = (
        rows(run(bundle, seed=seed, guidance_scale=scale)),
        rows(list(generate_naive(bundle, PROMPTS, options))),
    )
    assert fast == slow
    assert set(fast) == {0, 1, 2}


SETTINGS = {
    "text and images apart": {"image_guidance_scale": 1.5, "guidance_scale": 4.0},
    "contrastive": {"guidance": "cd_k", "cd_alpha": 0.3, "cd_k": 1},
    "contrastive with a k-th": {"guidance": "cd_k", "cd_alpha": 0.5, "cd_k": 4, "image_top_p": 1.0},
    "repetition": {"text_repetition_penalty": 3.0, "image_repetition_penalty": 2.0},
    "few": {"text_top_k": 3, "image_top_k": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_naive(bundle: Bundle, name: str) -> None:
    """Three images a reply, so that a third stream has earlier ones to keep; each setting moves tokens."""
    shared = {"min_images": 3, "max_images": 3, "seed": 5}
    fast = rows(run(bundle, **shared, **SETTINGS[name]))
    assert fast == rows(list(generate_naive(bundle, PROMPTS, replace(LIVELY, **shared, **SETTINGS[name]))))
    assert fast != rows(run(bundle, **shared))


def test_rows_of_a_batch_may_be_asked_differently(bundle: Bundle) -> None:
    """Other modes, guidance, temperatures and lengths beside each other change nothing in a row."""
    each = [
        replace(LIVELY, guidance_scale=1.0, max_tokens=23),
        replace(LIVELY, guidance="cd_k", mode="image", max_images=2),
        replace(LIVELY, image_guidance_scale=2.0, image_top_k=5, text_temperature=0.3),
    ]
    together = rows(list(generate(bundle, PROMPTS, each)))
    for row, (prompt, options) in enumerate(zip(PROMPTS, each, strict=True)):
        alone = list(generate(bundle, [prompt], options, [row]))
        assert [replace(step, row=row) for step in alone] == together[row]
    with pytest.raises(GenerationError, match="3 prompts and 2 options"):
        generate(bundle, PROMPTS, each[:2])


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_beams_are_naive(bundle: Bundle, scale: float) -> None:
    """Rows that write, rows that search and rows that are done share the batch; steps of a search come late."""
    settings = {"image_beams": 3, "image_temperature": 0.0, "guidance_scale": scale, "max_images": 2}
    options = replace(LIVELY, **settings)
    fast, slow = rows(run(bundle, **settings)), rows(list(generate_naive(bundle, PROMPTS, options)))
    assert fast == slow
    assert all([step.position for step in steps] == list(range(len(steps))) for steps in fast.values())


def test_beams_find_likelier_images_than_one_code_after_another(bundle: Bundle) -> None:
    """Scored by whole forwards; the widest search here looks at every second start of the sixteen codes."""

    def score(prompt: Document, steps: list[Step]) -> float:
        start = render(prompt, bundle.vocabulary, bundle.text, complete=False).ids.tolist()
        ids = torch.tensor([[*start, *(step.token for step in steps)]])
        logits = bundle.logits(ids, next_heads(ids, bundle.vocabulary))[0][0]
        at = [len(start) + step.position for step in steps if step.kind is Kind.CODE]
        span = bundle.vocabulary.image_span
        scores = logits[[n - 1 for n in at], span.start : span.stop].log_softmax(-1)
        return float(scores[range(len(at)), ids[0, at] - span.start].sum())

    settings = {"mode": "image", "min_images": 1, "max_images": 1, "image_temperature": 0.0, "guidance_scale": 1.0}
    prompts = [Document((TextPart(words),)) for words in ("a cat", "on the", "red", "in it", "other", "and or")]
    with torch.inference_mode():
        found = {beams: rows(run(bundle, prompts, image_beams=beams, **settings)) for beams in (1, 64)}
        gains = [score(p, found[64][row]) - score(p, found[1][row]) for row, p in enumerate(prompts)]
    assert min(gains) > -1e-9 and max(gains) > 1e-3


def test_a_search_does_not_see_its_neighbours(bundle: Bundle) -> None:
    settings = {"image_beams": 4, "image_temperature": 0.0, "guidance_scale": 2.0}
    together = rows(run(bundle, **settings))
    for row, prompt in enumerate(PROMPTS):
        alone = run(bundle, [prompt], [row], **settings)
        assert [replace(step, row=row) for step in alone] == together[row]


def test_the_streams_of_these_laws_are_not_vacuous(bundle: Bundle) -> None:
    """Text after an image, several images, rows that end apart: otherwise the laws above would say little."""
    found = [rows(run(bundle, seed=seed)) for seed in range(3)]
    streams = [[step.kind for step in steps] for batch in found for steps in batch.values()]
    assert any(stream.count(Kind.BEGIN) > 1 for stream in streams)
    assert any(Kind.TEXT in stream[stream.index(Kind.END) :] for stream in streams)
    assert any(len({len(steps) for steps in batch.values()}) > 1 for batch in found)
    assert any(steps[-1].stop == "eos" for batch in found for steps in batch.values())


def test_a_row_of_a_batch_is_that_row_alone(bundle: Bundle) -> None:
    together = rows(run(bundle))
    for index, prompt in enumerate(PROMPTS):
        alone = run(bundle, [prompt], streams=[index])
        assert [replace(step, row=index) for step in alone] == together[index]


def test_left_padding_does_not_move_tokens(bundle: Bundle) -> None:
    """A neighbour of 60 tokens pads the others; theirs stay."""
    long = Document((TextPart("x" * 60, "user"),))
    padded = rows(run(bundle, [*PROMPTS, long]))
    assert {row: steps for row, steps in padded.items() if row < 3} == rows(run(bundle))


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """[rows, tokens] of every forward."""
    seen: list[tuple[int, int]] = []
    forward = Slots._forward

    def counted(self: Slots, ids_BT: torch.Tensor, *args, **kwargs):
        seen.append(tuple(ids_BT.shape))
        return forward(self, ids_BT, *args, **kwargs)

    monkeypatch.setattr(Slots, "_forward", counted)
    return seen


def test_guidance_one_is_the_conditional_stream_without_guidance_rows(
    bundle: Bundle, shapes: list[tuple[int, int]]
) -> None:
    """Scale 1 by its shortcut and by the blend itself (the next float after 1) draw the same tokens."""
    off = run(bundle, guidance_scale=1.0)
    assert max(shapes)[0] == 3
    assert run(bundle, guidance_scale=1.0 + 2**-52) == off
    assert max(shapes)[0] == 6


def test_guidance_moves_tokens(bundle: Bundle) -> None:
    codes = [
        [step.token for step in run(bundle, guidance_scale=scale) if step.kind is Kind.CODE]
        for scale in (0.0, 1.0, 6.0)
    ]
    assert codes[0] != codes[1] != codes[2]


def test_scale_zero_does_not_see_the_prompt(bundle: Bundle) -> None:
    """With guidance 0 the codes come from the unconditional stream alone, also of a second image after text."""
    image = {"mode": "image", "min_images": 2, "max_images": 2, "guidance_scale": 0.0}
    prompts = [PROMPTS[0], Document((TextPart("an entirely other and longer prompt", "user"),))]
    first, second = (
        [step.token for step in steps if step.kind is Kind.CODE]
        for steps in rows(run(bundle, prompts, streams=[5, 5], **image)).values()
    )
    assert first == second and len(first) == 8


def test_same_seed_same_reply_other_seed_other_reply(bundle: Bundle) -> None:
    assert run(bundle, seed=1) == run(bundle, seed=1)
    assert run(bundle, seed=1) != run(bundle, seed=2)


def test_temperature_zero_is_argmax_whatever_the_seed(bundle: Bundle) -> None:
    cold = {"text_temperature": 0.0, "image_temperature": 0.0}
    assert run(bundle, seed=1, **cold) == run(bundle, seed=2, **cold)


def test_a_forward_a_token(bundle: Bundle, shapes: list[tuple[int, int]]) -> None:
    """No second prefill at any <break>: n tokens cost n forwards, the prompt's included, the others of one slot; and
    one short forward of the unconditional prefix."""
    steps = run(bundle, PROMPTS[:1], max_images=3, min_images=3)
    assert sum(step.kind is Kind.BEGIN for step in steps) == 3
    assert shapes[1] == (1, 2) and len(shapes) == len(steps) + 1
    assert set(shapes[2:]) == {(2, 1)}


def test_equal_prompts_are_prefilled_once(bundle: Bundle, shapes: list[tuple[int, int]]) -> None:
    steps = rows(run(bundle, [PROMPTS[0]] * 3, mode="image", max_images=1))
    assert shapes[0][0] == shapes[1][0] == 1 and set(shapes[2:]) == {(6, 1)}
    assert len({tuple(step.token for step in reply) for reply in steps.values()}) > 1


def test_finished_replies_leave_the_batch(bundle: Bundle, shapes: list[tuple[int, int]]) -> None:
    """Each forward runs the replies that are still open, and a guidance row for each."""
    for seed in range(4):
        shapes.clear()
        lengths = [len(steps) for steps in rows(run(bundle, seed=seed)).values()]
        if len(set(lengths)) > 1:
            break
    assert len(set(lengths)) > 1
    assert [shape[0] for shape in shapes[2:]] == [
        2 * sum(length > position for length in lengths) for position in range(1, max(lengths))
    ]


def test_guidance_is_that_of_transformers(tmp_path: Path) -> None:
    """Greedy codes under transformers' own unbatched guidance (two forwards a step, its own cache) are the same."""
    from transformers import LogitsProcessor, LogitsProcessorList

    bundle = plain_bundle(tmp_path)
    span, prompt = bundle.vocabulary.image_span, PROMPTS[0]

    class Codes(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            kept = torch.full_like(scores, -torch.inf)
            kept[:, span.start : span.stop] = scores[:, span.start : span.stop]
            return kept

    found = []
    for scale in (1.5, 3.0, 7.0):
        ids = render(prompt, bundle.vocabulary, bundle.text, complete=False).ids.tolist()
        theirs = bundle.model.generate(
            torch.tensor([[*ids, 5]]),
            attention_mask=torch.ones(1, len(ids) + 1, dtype=torch.int64),
            negative_prompt_ids=torch.tensor([[0, 3, 5]]),
            negative_prompt_attention_mask=torch.ones(1, 3, dtype=torch.int64),
            guidance_scale=scale,
            max_new_tokens=bundle.vocabulary.codes_per_image,
            do_sample=False,
            logits_processor=LogitsProcessorList([Codes()]),
        )[0, len(ids) + 1 :].tolist()
        options = {"mode": "image", "max_images": 1, "image_temperature": 0.0, "guidance_scale": scale}
        ours = [step.token for step in run(bundle, [prompt], **options) if step.kind is Kind.CODE]
        assert ours == theirs
        found.append(ours)
    assert found[0] != found[2]
