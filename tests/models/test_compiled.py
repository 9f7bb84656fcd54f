"""Compiled steps on a fixed cache are the oracle's, token for token in float64, for every build of network."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jam.decode.engine import generate
from jam.decode.grammar import Step
from jam.decode.naive import generate_naive
from jam.decode.options import SamplingOptions
from jam.document import CodesPart, Document, TextPart
from jam.models.compiled import SLOTS, Compiled
from jam.models.load import Bundle
from tests.decode.bundles import cross_bundle, plain_bundle
from tests.tiny_framed import framed_bundle

PROMPTS = [
    Document((TextPart("draw a cat", "user"),)),
    Document((TextPart("what is this and the other thing?", "user"), CodesPart((1, 5, 9, 15), "user"))),
]
OPTIONS = SamplingOptions(max_tokens=40, text_temperature=1.0, text_top_p=1.0, min_images=1)


def made(folder: Path, family: str, backend: str) -> Bundle:
    bundle = cross_bundle(folder) if family == "jam_cross" else plain_bundle(folder, family=family)
    bundle.backend = backend
    return bundle


def by_row(steps: list[Step]) -> list[Step]:
    return sorted(steps, key=lambda step: (step.row, step.position))


@pytest.fixture(autouse=True)
def _forget() -> None:
    """Code that was compiled for another test's network is not counted against this one's."""
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["opt", "llama", "gemma2", "gemma3_text", "chameleon", "jam_cross"])
def test_every_build_is_naive(tmp_path: Path, family: str) -> None:
    """Without the compiler's back end: what is traced, and the fixed cache with its hidden slots."""
    bundle = made(tmp_path, family, "eager")
    fast = by_row(list(generate(bundle, PROMPTS, OPTIONS)))
    assert fast == by_row(list(generate_naive(bundle, PROMPTS, OPTIONS)))


def test_images_with_sizes_are_naive(tmp_path: Path) -> None:
    """What is forced goes through the same steps as codes, row by row."""
    bundle = framed_bundle(tmp_path, "text")
    bundle.backend = "eager"
    each = [replace(OPTIONS, max_tokens=60, image_size=size) for size in ("6x4", "4x8")]
    fast = by_row(list(generate(bundle, PROMPTS[:1] * 2, each)))
    assert fast == by_row(list(generate_naive(bundle, PROMPTS[:1] * 2, each)))


def test_inductor_is_naive(tmp_path: Path) -> None:
    bundle = made(tmp_path, "opt", "inductor")
    assert by_row(list(generate(bundle, PROMPTS, OPTIONS))) == by_row(list(generate_naive(bundle, PROMPTS, OPTIONS)))


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_scale": 1.0, "seed": 3},
        {"image_guidance_scale": 1.5, "seed": 2},
        {"image_beams": 3, "image_temperature": 0.0, "seed": 1},  # lanes are reordered: the rest is not compiled
    ],
)
def test_other_streams_are_naive(tmp_path: Path, changes: dict) -> None:
    bundle, options = made(tmp_path, "llama", "eager"), replace(OPTIONS, **changes)
    assert by_row(list(generate(bundle, PROMPTS, options))) == by_row(list(generate_naive(bundle, PROMPTS, options)))


def test_buffers_serve_the_next_call_and_no_two_at_once(tmp_path: Path) -> None:
    bundle = made(tmp_path, "llama", "eager")
    first = list(generate(bundle, PROMPTS, OPTIONS))
    kept = bundle.readout().own._spare
    assert kept.slots % SLOTS == 0
    begun = generate(bundle, PROMPTS, OPTIONS)
    steps = [next(begun)]  # has taken the buffers
    assert list(generate(bundle, PROMPTS, OPTIONS)) == first
    assert [*steps, *begun] == first
    assert bundle.readout().own._spare is kept


def test_more_shapes_than_are_held_compile_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jam.models.compiled.SHAPES", 2)
    bundle = made(tmp_path, "llama", "eager")
    options = replace(OPTIONS, max_tokens=12)
    for count in (1, 2, 3, 1):
        fast = by_row(list(generate(bundle, PROMPTS[:1] * count, options)))
        assert fast == by_row(list(generate_naive(bundle, PROMPTS[:1] * count, options)))


def test_a_backend_that_is_named_later_counts(tmp_path: Path) -> None:
    """Also another one, none again, and the buffers of a network that has moved are not used again."""
    bundle = made(tmp_path, "llama", "eager")
    first = list(generate(bundle, PROMPTS, OPTIONS))
    bundle.backend = None
    assert not isinstance(bundle.readout().own, Compiled)
    assert list(generate(bundle, PROMPTS, OPTIONS)) == first
    bundle.backend = "aot_eager"
    compiled = bundle.readout().own
    assert compiled.backend == "aot_eager" and bundle.readout().own is compiled
    assert bundle.to(torch.device("cpu")).readout().own is not compiled


def test_compiled_code_is_used(tmp_path: Path) -> None:
    """A prompt runs uncompiled, every later token compiled, whatever leaves the batch."""
    bundle, seen = made(tmp_path, "llama", "eager"), []
    compiled = bundle.readout().own
    plain, quick = compiled.plain.run, compiled._run
    compiled.plain.run = lambda **given: seen.append("plain") or plain(**given)
    compiled._run = lambda **given: seen.append("compiled") or quick(**given)
    short, long = (replace(OPTIONS, guidance_scale=1.0, max_tokens=most) for most in (20, 40))
    steps = list(generate(bundle, PROMPTS, [short, long]))
    assert [step.position for step in steps if step.stop] == [19, 39]
    assert seen == ["plain"] + ["compiled"] * (max(step.position for step in steps))
