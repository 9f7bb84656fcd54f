"""Codes guessed ahead: greedy ones are the same, drawn ones have the same distribution, and fewer forwards are made."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jam.decode.engine import generate
from jam.decode.grammar import Kind
from jam.decode.jacobi import Guesses, judge
from jam.decode.options import SamplingOptions, default_options
from jam.document import Document, TextPart
from jam.errors import GenerationError
from jam.models.load import Bundle
from tests.decode.bundles import cross_bundle, plain_bundle

PROMPT = [Document((TextPart("draw a cat", "user"),))]
IMAGE = SamplingOptions(mode="image", max_images=1, guidance_scale=2.0, image_temperature=1.0, image_top_p=1.0)


@pytest.fixture(scope="module", params=["plain", "llama", "cross"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp(request.param)
    if request.param == "cross":
        return cross_bundle(folder)
    return plain_bundle(folder, **({"family": "llama"} if request.param == "llama" else {}))


def codes(bundle: Bundle, options: SamplingOptions) -> list[int]:
    start = bundle.vocabulary.image_span.start
    return [step.token - start for step in generate(bundle, PROMPT, options) if step.kind is Kind.CODE]


@pytest.mark.parametrize("window", [2, 3, 16])
@pytest.mark.parametrize(
    "changes",
    [{}, {"guidance_scale": 1.0}, {"image_guidance_scale": 1.5}, {"guidance": "cd_k"}, {"mode": "interleaved"}],
)
def test_greedy_codes_are_those_of_one_by_one(bundle: Bundle, window: int, changes: dict) -> None:
    options = replace(IMAGE, image_temperature=0.0, max_images=3, min_images=2, max_tokens=60, **changes)
    guessed = list(generate(bundle, PROMPT, replace(options, jacobi_window=window)))
    assert guessed == list(generate(bundle, PROMPT, options))


def test_the_same_call_draws_the_same(bundle: Bundle) -> None:
    options = replace(IMAGE, jacobi_window=4)
    assert codes(bundle, options) == codes(bundle, options)
    assert len({tuple(codes(bundle, replace(options, seed=seed))) for seed in range(5)}) > 1


def test_drawn_codes_have_the_distribution_of_one_by_one() -> None:
    """A chain of 5 codes of which each depends on all before it: 6,000 draws against the exact probabilities."""
    size, length, window, runs = 3, 5, 4, 6_000
    generator = torch.Generator().manual_seed(4)
    table = torch.rand((length, size**length), generator=generator, dtype=torch.float64) * 3
    table = torch.stack([table, table.flip(1), table.roll(7, 1)], dim=-1).softmax(-1)  # [place, what is before, code]

    def after(known: list[int]) -> torch.Tensor:
        return table[len(known), sum(code * size**place for place, code in enumerate(known))]

    counts, forwards = torch.zeros([size] * length, dtype=torch.float64), 0
    for draws in torch.rand((runs, length, 3), generator=generator, dtype=torch.float64):
        known = [int((after([]).cumsum(0) <= draws[0, 0]).sum())]
        guesses = Guesses.none(size, torch.device("cpu"))
        while len(known) < length:
            guesses = guesses.to(min(window, length - len(known)) - 1, known, 2)
            rows = range(len(guesses.codes) + 1)
            now = torch.stack([after([*known, *guesses.codes[:row].tolist()]) for row in rows])
            stand, code, following = judge(guesses, now, draws[len(known) : len(known) + len(now)])
            known += [*guesses.codes[:stand].tolist(), code]
            guesses, forwards = following, forwards + 1
        counts[tuple(known)] += 1
    exact = torch.ones([size] * length, dtype=torch.float64)
    for cell in torch.cartesian_prod(*[torch.arange(size)] * length).tolist():
        for place in range(length):
            exact[tuple(cell)] *= after(cell[:place])[cell[place]]
    statistic = float(((counts - runs * exact) ** 2 / (runs * exact)).sum())
    assert statistic < 243 - 1 + 3.1 * (2 * 242) ** 0.5  # chi-square with 242 degrees of freedom, 0.1 %
    assert forwards < 0.95 * runs * (length - 1)


def test_a_wrong_judge_is_found_out() -> None:
    """The bound above is no formality: guesses that always stand would break it by far."""
    guesses = Guesses(torch.tensor([0]), torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    now = torch.tensor([[0.25, 0.75], [0.5, 0.5]], dtype=torch.float64)
    draws = torch.rand((4_000, 2, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stands = [judge(guesses, now, each)[0] for each in draws]
    assert abs(sum(stands) / 4_000 - 0.5) < 0.03  # p / q
    assert {judge(guesses, now, each)[1] for each in draws if judge(guesses, now, each)[0] == 0} == {1}


def test_fewer_forwards(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the next code hardly depends on the last ones, guesses stand: here the network scores nothing at all."""
    scored = []
    plain = type(bundle.readout().own).codes
    monkeypatch.setattr(
        type(bundle.readout().own),
        "codes",
        lambda self, states: scored.append(1) or torch.zeros_like(plain(self, states)),
    )
    codes(bundle, replace(IMAGE, guidance_scale=1.0, jacobi_window=4))
    assert len(scored) < 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"jacobi_window": 0}, "jacobi_window is 0; required: from 1"),
        ({"jacobi_window": 4, "image_repetition_penalty": 2.0}, "jacobi_window is 4; required: 1 with image_beams"),
        ({"jacobi_window": 4, "image_beams": 2, "image_temperature": 0.0}, "required: 1 with image_beams"),
    ],
)
def test_options_are_refused(changes: dict, words: str) -> None:
    with pytest.raises(GenerationError, match=words):
        replace(IMAGE, **changes)


def test_two_replies_and_compiled_steps_are_refused(bundle: Bundle) -> None:
    options = replace(IMAGE, jacobi_window=4)
    with pytest.raises(GenerationError, match="there are 2 replies; required: one reply"):
        generate(bundle, PROMPT * 2, options)
    with pytest.raises(GenerationError, match="compiled for one token at a time"):
        generate(replace(bundle, backend="eager"), PROMPT, options)


def test_a_window_turns_a_models_own_beams_off(bundle: Bundle) -> None:
    own = replace(bundle, sampling={"image_beams": 4, "image_temperature": 0.0})
    chosen = default_options(own, jacobi_window=8)
    assert (chosen.image_beams, chosen.image_temperature) == (1, 1.0)
    greedy = default_options(own, jacobi_window=8, image_temperature=0.0)
    assert (greedy.image_beams, greedy.image_temperature) == (1, 0.0)
