"""Laws of decoding (float64, fixed seeds): the cached, batched, guided loop is the naive one, token for token."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jam.decode.engine import SamplingOptions, Step, generate
from jam.decode.grammar import Kind
from jam.decode.naive import generate_naive
from jam.document import CodesPart, Document, TextPart
from jam.models.load import Bundle
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


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_batched_guided_is_naive(bundle: Bundle, seed: int, scale: float) -> None:
    options = replace(LIVELY, seed=seed, guidance_scale=scale)
    fast, slow = (
        rows(run(bundle, seed=seed, guidance_scale=scale)),
        rows(list(generate_naive(bundle, PROMPTS, options))),
    )
    assert fast == slow
    assert set(fast) == {0, 1, 2}


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


def test_guidance_one_runs_no_guidance_rows_and_is_the_conditional_stream(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scale 1 by the blend itself (the next float after 1) and scale 1 by its shortcut draw the same tokens."""
    batches = set()
    forward = Bundle.logits

    def counted(self: Bundle, ids_BT: torch.Tensor, *args, **kwargs):
        batches.add(len(ids_BT))
        return forward(self, ids_BT, *args, **kwargs)

    monkeypatch.setattr(Bundle, "logits", counted)
    off = run(bundle, guidance_scale=1.0)
    assert batches == {3}
    assert run(bundle, guidance_scale=1.0 + 2**-52) == off
    assert batches == {3, 6}


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


def test_a_forward_a_token(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second prefill at any <break>: n tokens cost n forwards, the prompt's included, the others of one slot."""
    widths = []
    forward = Bundle.logits

    def counted(self: Bundle, ids_BT: torch.Tensor, *args, **kwargs):
        widths.append(ids_BT.shape[1])
        return forward(self, ids_BT, *args, **kwargs)

    monkeypatch.setattr(Bundle, "logits", counted)
    steps = run(bundle, PROMPTS[:1], max_images=3, min_images=3)
    assert len(widths) == len(steps)
    assert set(widths[1:]) == {1}
