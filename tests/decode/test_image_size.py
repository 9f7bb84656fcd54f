"""``image_size``: what is asked for is what comes, in events and pixels, and what cannot be is refused in one line."""

from dataclasses import replace

import pytest
import torch

from jam.decode.candidates import draw_candidates
from jam.decode.custom_generate import custom_generate
from jam.decode.engine import generate
from jam.decode.options import SamplingOptions
from jam.decode.pipeline import any_to_any
from jam.decode.stream import ImageDone, ImageProgress, events, filled, replies
from jam.document import CodesPart, Document, MaskPart, TextPart
from jam.errors import DataError, GenerationError, JamError
from jam.models.load import Bundle
from jam.tokens.frame import frame_of
from jam.tokens.render import parse, render
from tests.decode.bundles import plain_bundle
from tests.tiny_framed import framed_bundle

PROMPT = Document((TextPart("a cat"),))
IMAGE = SamplingOptions(mode="image", max_images=1, guidance_scale=1.0, image_size="6x10")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return framed_bundle(tmp_path_factory.mktemp("framed"), "text")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return framed_bundle(tmp_path_factory.mktemp("framed"), "tokens")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return plain_bundle(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize(
    "size", ["", "0x8", "8x0", "8", "8x8x8", "-8x8", "8 x 8", "8X8", "08x8", "axb", "123456x8", 8, "\u0668x8"]
)
def test_garbage_is_refused(size: object) -> None:
    with pytest.raises(GenerationError, match=r"image_size is .*; required: ") as error:
        SamplingOptions(image_size=size)
    assert "\n" not in str(error.value)


def refused(bundle: Bundle, words: str, **changes) -> None:
    with pytest.raises(GenerationError, match=words) as error:
        generate(bundle, [PROMPT], replace(IMAGE, **changes))
    assert "\n" not in str(error.value)


def test_sizes_that_a_model_does_not_make_are_refused(bundle: Bundle, tokens: Bundle, plain: Bundle) -> None:
    refused(bundle, "image_size is 7x10; both sides must be multiples of 2 px", image_size="7x10")
    refused(bundle, "image_size is 40x40, 400 codes, and the model's context is 256", image_size="40x40")
    refused(bundle, "image_size is 99998x99998, .* choose a smaller one", image_size="99998x99998")
    refused(bundle, "context 256; the reply needs room for 266 more", image_size="30x32")
    refused(bundle, "max_tokens is 20; .* needs 28", max_tokens=20)
    refused(tokens, "has no token for 6, but for 2 to 5", image_size="24x8")
    refused(plain, "image_size is 6x10, this model's images are all 8x8; leave it out")
    refused(replace(bundle, image=None), "image_size is 6x10 and there is no image tokenizer")
    assert list(generate(plain, [PROMPT], replace(IMAGE, image_size="8x8")))
    assert list(generate(bundle, [PROMPT], replace(IMAGE, mode="text", max_tokens=3)))


def test_a_default_of_the_model_may_be_a_size(bundle: Bundle) -> None:
    from jam.decode.options import default_options

    ours = replace(bundle, sampling={"image_size": "4x8"})
    assert default_options(ours).image_size == "4x8" and default_options(ours, image_size="6x6").image_size == "6x6"


def test_text_alone_needs_no_room_for_an_image(bundle: Bundle) -> None:
    """Where no image fits, none is opened and nothing is guided, whatever the size."""
    wide = SamplingOptions(image_size="30x30", max_tokens=20)
    assert all(step.kind.value in ("text", "eos") for step in generate(bundle, [PROMPT], wide))


def test_text_in_a_hole_needs_no_size(bundle: Bundle) -> None:
    """A size that the model does not make, in a reply without images: all of the decoder agrees."""
    options = SamplingOptions(image_size="5x5", max_tokens=9)
    (reply,) = replies(bundle, [Document((TextPart("a"), MaskPart("text")))], options)
    assert all(isinstance(part, TextPart) for part in reply.document.parts)


@pytest.mark.parametrize("grid", [(0, 0), (0, 2), (-2, 2), (2.0, 2.0)])
def test_grids_that_are_none_are_refused(bundle: Bundle, tokens: Bundle, plain: Bundle, grid: tuple) -> None:
    for own in (bundle, tokens, plain):
        with pytest.raises(DataError, match="two whole numbers from 1"):
            generate(own, [Document((CodesPart((1,) * 4, grid=grid),))])


def test_events_count_codes_and_previews_have_the_shape(bundle: Bundle) -> None:
    """Five rows of three codes, 2 px each: sizes and row ends are no codes."""
    seen = list(events(bundle, [PROMPT], IMAGE, preview_rows=2))
    progress = [event for event in seen if isinstance(event, ImageProgress)]
    assert [event.done for event in progress] == list(range(1, 16)) and {event.total for event in progress} == {15}
    previews = {event.done: event.preview for event in progress if event.preview is not None}
    assert set(previews) == {6, 12} and {preview.size for preview in previews.values()} == {(6, 10)}
    (done,) = [event for event in seen if isinstance(event, ImageDone)]
    assert done.image.size == (6, 10) and len(done.codes) == 15


def test_candidates_weigh_codes_alone(bundle: Bundle) -> None:
    """The log probability of an image under whole forwards, its size and row ends left out."""
    options = replace(IMAGE, guidance_scale=2.0, guidance="cfg")
    found = draw_candidates(bundle, PROMPT, 3, options)
    span = bundle.vocabulary.image_span
    for candidate in found:
        (part,) = candidate.reply.document.parts
        assert part.grid == (5, 3)
        ids = render(Document((*PROMPT.parts, part)), bundle.vocabulary, bundle.text, complete=False).ids
        row = torch.from_numpy(ids).long()
        with torch.inference_mode():
            logs = bundle.model(row[None]).logits[0, :-1, span.start : span.stop].log_softmax(-1)
        codes = (row[1:] >= span.start) & (row[1:] < span.stop)
        wanted = logs[codes].gather(1, row[1:][codes][:, None] - span.start).sum()
        assert candidate.score == pytest.approx(float(wanted), abs=1e-9)


def test_transformers_generate_draws_them_too(bundle: Bundle) -> None:
    ids = torch.from_numpy(render(PROMPT, bundle.vocabulary, bundle.text, complete=False).ids).long()[None]
    out = bundle.model.generate(ids, max_new_tokens=40, custom_generate=custom_generate(bundle, IMAGE))
    read = parse(out[0].tolist(), bundle.vocabulary, bundle.text)
    assert [part.grid for part in read.parts if isinstance(part, CodesPart)] == [(5, 3)]
    begin = bundle.vocabulary.controls["begin_image"]
    for inside in ([begin], [begin, *bundle.text.encode("5*")]):
        prompt = torch.cat([ids, torch.tensor([inside])], dim=1)
        with pytest.raises(GenerationError, match="prompt 0 ends inside an image"):
            bundle.model.generate(prompt, max_new_tokens=40, custom_generate=custom_generate(bundle, IMAGE))


def test_transformers_pipeline_makes_them_pixels(bundle: Bundle) -> None:
    pipe = any_to_any(bundle)
    said = {"image_size": "6x10", "guidance_scale": 1.0, "seed": 3}
    (found,) = pipe(text="a cat", generation_mode="image", generate_kwargs=said)
    assert found["generated_image"].size == (6, 10)


def test_the_pipeline_refuses_sizes_in_one_tensor_and_images_that_are_cut(bundle: Bundle) -> None:
    """2 rows of 5 codes and 3 of 3 are as many tokens."""
    model = any_to_any(bundle).model
    frames = [frame_of(bundle.vocabulary, bundle.text, grid) for grid in ((2, 5), (3, 3))]
    code = bundle.vocabulary.image_span.start
    ids = torch.tensor([frame.filled([code] * frame.codes) for frame in frames])
    with pytest.raises(GenerationError, match="images of 2 sizes"):
        model.decode_image_tokens(ids)
    assert model.decode_image_tokens(ids[1:]).shape == (1, 6, 6, 3)
    cut = ids[[0, 0]]
    cut[0, 5] = bundle.vocabulary.controls["end_row"]
    with pytest.raises(JamError):
        model.decode_image_tokens(cut)


def test_codes_guessed_ahead_are_the_same_row_by_row(bundle: Bundle) -> None:
    """Greedy codes do not depend on guesses; a row's end is never one, nor its place in an image."""
    for changes in ({}, {"guidance_scale": 3.0}):
        greedy = replace(IMAGE, max_images=2, min_images=2, max_tokens=60, image_temperature=0.0, **changes)
        (one,), (several,) = (replies(bundle, [PROMPT], replace(greedy, jacobi_window=window)) for window in (1, 4))
        assert one.document == several.document and len(one.images) == 2
    (drawn,) = replies(bundle, [PROMPT], replace(IMAGE, jacobi_window=4, seed=5))
    assert drawn.images[0].size == (6, 10)


def test_holes_take_text_and_no_image(bundle: Bundle) -> None:
    """A missing image's size stands in no prompt; missing text beside an image of any size is filled."""
    seen = CodesPart(tuple(range(15)), grid=(5, 3))
    hole = Document((TextPart("a"), MaskPart("text"), seen))
    assert filled(hole, replies(bundle, [hole], SamplingOptions(max_tokens=9))[0]).parts[-1] == seen
    with pytest.raises(DataError, match="this model's images carry their size: none can be written") as error:
        generate(bundle, [Document((MaskPart("image"), TextPart("a")))], IMAGE)
    assert "\n" not in str(error.value)
    controls = bundle.vocabulary.controls
    ids = [0, controls["begin_image"], *bundle.text.encode("2*2"), controls["begin_codes"], controls["mask"]]
    ids += [controls["end_frame"], controls["end_image"], controls["infill"]]
    with pytest.raises(GenerationError, match="this model's images carry their size: none can be written"):
        bundle.model.generate(torch.tensor([ids]), max_new_tokens=40, custom_generate=custom_generate(bundle, IMAGE))
