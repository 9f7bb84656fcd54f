"""What the decoder refuses, each with the numbers, before the first forward; and its edges."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from jam.decode.engine import generate
from jam.decode.grammar import Kind, Rules
from jam.decode.job import budget, encode_images, rules_of
from jam.decode.options import SamplingOptions, default_options
from jam.document import CodesPart, Document, ImagePart, Part, TextPart
from jam.errors import DataError, GenerationError, JamError
from jam.models.load import Bundle, load_bundle
from tests.decode.bundles import plain_bundle
from tests.tiny import CODES_PER_IMAGE, tiny_pair

CONTEXT = 256


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return plain_bundle(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def text_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(tiny_pair(tmp_path_factory.mktemp("text"))[0])


def prompt(tokens: int) -> Document:
    """A plain document of exactly that many tokens: bos and letters (an x is one token)."""
    return Document((TextPart("x" * (tokens - 1)),))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mode": "picture"}, ["mode is 'picture'", "interleaved, text, image, free"]),
        ({"min_images": -1}, ["min_images is -1", "at least 0"]),
        ({"text_temperature": -1.0}, ["text_temperature is -1.0", "0 (greedy)"]),
        ({"text_temperature": 1e39}, ["text_temperature is 1e+39", "0.0001 to 1000"]),
        ({"image_temperature": math.nan}, ["image_temperature is nan"]),
        ({"text_top_p": 0.0}, ["text_top_p is 0.0", "above 0 and at most 1"]),
        ({"image_top_p": 1.5}, ["image_top_p is 1.5"]),
        ({"image_top_k": 0}, ["image_top_k is 0"]),
        ({"image_beams": 0, "image_temperature": 0.0}, ["image_beams is 0", "from 1"]),
        ({"image_beams": 4, "image_temperature": 0.7}, ["image_temperature is 0.7", "0 with image_beams 4"]),
        ({"max_tokens": 0}, ["max_tokens is 0"]),
        ({"guidance_scale": math.inf}, ["guidance_scale is inf"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"text_top_k": 0}, ["text_top_k is 0", "at least 1, or none"]),
        ({"text_repetition_penalty": 0.0}, ["text_repetition_penalty is 0.0", "1 is off"]),
        ({"guidance": "none"}, ["guidance is 'none'", "cfg or cd_k"]),
        ({"cd_alpha": 1.5}, ["cd_alpha is 1.5", "from 0 to 1"]),
        ({"cd_k": 0}, ["cd_k is 0", "plain contrastive"]),
        ({"image_guidance_scale": -1.0}, ["image_guidance_scale is -1.0", "0 to 1000"]),
        ({"image_guidance_scale": 2.0, "guidance": "cd_k"}, ["image_guidance_scale is 2.0", "none with guidance cd_k"]),
        (
            {"image_beams": 2, "image_temperature": 0.0, "image_repetition_penalty": 2.0},
            ["image_repetition_penalty is 2.0", "1 with image_beams 2"],
        ),
    ],
)
def test_options_refuse_bad_values(changes: dict, words: list[str]) -> None:
    with pytest.raises(GenerationError) as caught:
        SamplingOptions(**changes)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("tokens", "options", "words"),
    [
        (CONTEXT + 50, SamplingOptions(), ["306 tokens", "context 256", "room for 1 more"]),
        (CONTEXT, SamplingOptions(), ["256 tokens", "room for 1 more"]),
        (CONTEXT - 6, SamplingOptions(mode="image"), ["250 tokens", "room for 7 more"]),
        (9, SamplingOptions(mode="image", max_tokens=6), ["max_tokens is 6", "1 images needs 7"]),
        (9, SamplingOptions(min_images=2, max_tokens=12), ["max_tokens is 12", "2 images needs 13"]),
    ],
)
def test_no_room_is_refused_at_the_call(
    bundle: Bundle, tokens: int, options: SamplingOptions, words: list[str]
) -> None:
    with pytest.raises(GenerationError) as caught:
        generate(bundle, [prompt(tokens)], options)
    assert all(word in str(caught.value) for word in words)


def test_the_prompt_at_fault_is_named(bundle: Bundle) -> None:
    with pytest.raises(GenerationError, match="prompt 1: the prompt has 300 tokens"):
        generate(bundle, [prompt(3), prompt(300)])


def test_the_last_position_of_the_context_is_used(bundle: Bundle) -> None:
    """A prompt that leaves one token gets one; one that leaves an image and its end gets both."""
    steps = list(generate(bundle, [prompt(CONTEXT - 1)], SamplingOptions()))
    assert len(steps) == 1 and steps[0].stop is not None
    steps = list(generate(bundle, [prompt(CONTEXT - 7)], SamplingOptions(mode="image")))
    assert [step.kind for step in steps] == [Kind.BEGIN, *[Kind.CODE] * CODES_PER_IMAGE, Kind.END, Kind.EOS]


def test_text_models_write_text_and_refuse_images(text_bundle: Bundle) -> None:
    steps = list(generate(text_bundle, [prompt(4)], SamplingOptions(max_tokens=20)))
    assert {step.kind for step in steps} <= {Kind.TEXT, Kind.EOS}
    with pytest.raises(GenerationError, match="no images"):
        generate(text_bundle, [prompt(4)], SamplingOptions(mode="image"))


def test_pixels_need_an_image_tokenizer(bundle: Bundle, text_bundle: Bundle) -> None:
    document = Document((ImagePart(Image.new("RGB", (9, 9))), TextPart("a")))
    assert len(encode_images(bundle, document).parts[0].codes) == CODES_PER_IMAGE
    with pytest.raises(GenerationError, match="1 images and this model has no image tokenizer"):
        encode_images(text_bundle, document)
    with pytest.raises(DataError, match="pixels"):
        generate(bundle, [document])


def test_a_model_without_an_unconditional_prompt_says_so(bundle: Bundle, tmp_path: Path) -> None:
    other = replace(bundle, unconditional=("bos", "mask"))
    with pytest.raises(GenerationError, match="guidance_scale to 1"):
        generate(other, [prompt(4)])
    assert list(generate(other, [prompt(4)], SamplingOptions(guidance_scale=1.0, max_tokens=5)))


def test_streams_are_the_rows_random_numbers(bundle: Bundle) -> None:
    """Equal prompts on one stream are equal replies, on two streams two."""
    options = SamplingOptions(max_tokens=20, text_temperature=1.0, text_top_p=1.0)

    def tokens(streams: list[int]) -> list[list[int]]:
        steps = list(generate(bundle, [prompt(4)] * 2, options, streams))
        return [[step.token for step in steps if step.row == row] for row in (0, 1)]

    same, apart = tokens([4, 4]), tokens([4, 5])
    assert same[0] == same[1] == apart[0] != apart[1]


@pytest.mark.parametrize("streams", [[], [0, 1], [-1], [1 << 64], [1.5]])
def test_streams_that_are_none_are_refused(bundle: Bundle, streams: list) -> None:
    with pytest.raises(GenerationError, match=r"streams are .* for 1 prompts"):
        generate(bundle, [prompt(9)], streams=streams)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (TextPart("a\ud800"), "not UTF-8"),
        (CodesPart((1, 1, 1, 2**70)), "whole numbers of the codebook"),
        (CodesPart((1, 1, 1, 1.5)), "whole numbers of the codebook"),
        (CodesPart((1, 1, 1, 16)), "the codebook has 16"),
    ],
)
def test_parts_that_cannot_be_written_are_refused(bundle: Bundle, part: Part, words: str) -> None:
    with pytest.raises(JamError, match=words):
        generate(bundle, [Document((part,))])


def test_iteration_may_stop_anywhere(bundle: Bundle) -> None:
    steps = generate(bundle, [prompt(4)], SamplingOptions(max_tokens=50))
    first = next(steps)
    steps.close()
    assert first == next(iter(generate(bundle, [prompt(4)], SamplingOptions(max_tokens=50))))


def test_a_model_brings_its_own_defaults_and_what_is_said_wins(bundle: Bundle) -> None:
    ours = replace(bundle, sampling={"image_temperature": 0.0, "image_beams": 4, "guidance_scale": 1.0})
    found = default_options(ours, seed=5, guidance_scale=None)
    assert (found.image_beams, found.guidance_scale, found.seed) == (4, 1.0, 5)
    assert default_options(ours, guidance_scale=2.0).guidance_scale == 2.0
    # of a search and chance one has to give way
    warm = default_options(ours, image_temperature=0.7)
    assert (warm.image_beams, warm.image_temperature) == (1, 0.7)
    assert default_options(bundle, image_beams=2).image_temperature == 0.0


@pytest.mark.parametrize(
    ("sampling", "said", "left"),
    [
        ({"jacobi_window": 4}, {"image_beams": 2}, {"jacobi_window": 1, "image_temperature": 0.0}),
        ({"jacobi_window": 4}, {"image_repetition_penalty": 1.2}, {"jacobi_window": 1}),
        ({"image_repetition_penalty": 1.5}, {"jacobi_window": 8}, {"image_repetition_penalty": 1.0}),
        ({"image_beams": 4, "image_temperature": 0.0}, {"jacobi_window": 8}, {"image_beams": 1}),
        ({"image_beams": 4, "image_temperature": 0.0}, {"image_repetition_penalty": 1.2}, {"image_beams": 1}),
        ({"image_beams": 4, "image_temperature": 0.0}, {"image_beams": 2}, {"image_beams": 2}),
        ({"min_images": 1}, {"mode": "text"}, {"min_images": 0}),
        ({"min_images": 1}, {"max_images": 0}, {"min_images": 0}),
    ],
)
def test_a_default_gives_way_to_what_excludes_it(bundle: Bundle, sampling: dict, said: dict, left: dict) -> None:
    options = default_options(replace(bundle, sampling=sampling), **said)
    assert {name: getattr(options, name) for name in said | left} == said | left
    rules_of(bundle, options)


@pytest.mark.parametrize("sampling", [{"image_beam": 4}, {"image_beams": "4"}, {"mode": "picture"}, {"seed": None}])
def test_defaults_that_are_none_are_refused(bundle: Bundle, sampling: dict) -> None:
    with pytest.raises(GenerationError, match=r"jam\.json's sampling"):
        default_options(replace(bundle, sampling=sampling))


def test_a_reply_has_room_for_its_images_by_default(bundle: Bundle) -> None:
    """An image of thousands of codes would never fit a number that suits text."""
    rules = Rules(bundle.vocabulary)
    assert budget(rules, SamplingOptions()) == 400 + 4 * (CODES_PER_IMAGE + 2)
    assert budget(replace(rules, max_images=0), SamplingOptions(max_images=0)) == 400
    assert budget(replace(rules, mode="text"), SamplingOptions(mode="text")) == 400
    free = replace(rules, mode="free")
    assert budget(free, SamplingOptions(mode="free")) == 400 + 4 * (CODES_PER_IMAGE + 2)
    assert budget(rules, SamplingOptions(max_tokens=7)) == 7
    ten = replace(rules, max_images=10)
    assert budget(ten, SamplingOptions(max_images=10)) == 400 + 10 * (CODES_PER_IMAGE + 2)


def test_more_images_than_fit_are_counted(bundle: Bundle) -> None:
    images = Document(tuple(CodesPart((0,) * CODES_PER_IMAGE, "user") for _ in range(60)))
    words = r"tokens, 360 of them in images, and the model's context 256; .* leave images out"
    with pytest.raises(GenerationError, match=words):
        generate(bundle, [images])
