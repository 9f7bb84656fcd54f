"""Emu3's and Lumina-mGPT's images against their owners' streams: ids, sizes, pixels, and codes under guidance."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    Emu3ForConditionalGeneration,
    Emu3ImageProcessor,
    Emu3Processor,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from jam import layouts
from jam.checkpoint import WEIGHTS
from jam.decode.engine import generate
from jam.decode.grammar import Kind
from jam.decode.job import encode_images
from jam.decode.options import SamplingOptions
from jam.decode.stream import replies
from jam.document import CodesPart, Document, ImagePart, TextPart
from jam.errors import CheckpointError, MergeError
from jam.inspect import describe_folder
from jam.layouts import emu3, open_model
from jam.models.load import Bundle, load_bundle
from jam.tokens.render import parse, render
from merge.recipe import MergeRecipe
from merge.run import run_merge
from tests.layouts.owners import SMALL, chameleon_owner, emu3_owner
from tests.layouts.test_chameleon import whole_tokenizer
from tests.tiny import edit_json, tiny_parent

AREA = {"min_pixels": 32, "max_pixels": 128}  # 8 to 32 codes
NAMES = {
    "image_token": "<image>",
    "boi_token": emu3.CONTROLS["begin_image"],
    "eoi_token": emu3.CONTROLS["end_image"],
    "image_wrapper_token": emu3.CONTROLS["begin_codes"],
    "eof_token": emu3.CONTROLS["end_frame"],
    "eol_token": emu3.CONTROLS["end_row"],
}
WORDS = "a red cat"


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    """Layouts whose owners have codebooks of 16 codes; Emu3's squares have 4 x 4."""
    patch = pytest.MonkeyPatch()
    patch.setattr(layouts, "LAYOUTS", SMALL)
    patch.setattr(emu3, "RESOLUTION", 8)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = emu3_owner(tmp_path_factory.mktemp("emu3") / "owner")
    _images().save_pretrained(folder)
    return folder


def _images() -> Emu3ImageProcessor:
    return Emu3ImageProcessor(image_mean=[0.5] * 3, image_std=[0.5] * 3, spatial_factor=2, **AREA)


@pytest.fixture(scope="module")
def processor(owner: Path) -> Emu3Processor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(owner / "tokenizer.json"), bos_token="<|extra_203|>", extra_special_tokens=NAMES
    )
    made = Emu3Processor(_images(), tokenizer)
    made.downsample_ratio = 2  # of the tiny network; a constant there
    return made


@pytest.fixture(scope="module")
def theirs(owner: Path) -> Emu3ForConditionalGeneration:
    return Emu3ForConditionalGeneration.from_pretrained(owner).eval()


@pytest.fixture(scope="module")
def bundle(owner: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Emu3 averaged with itself: its weights and ids in jam's folder."""
    out = tmp_path_factory.mktemp("same") / "out"
    run_merge(MergeRecipe(method="uniform", text=owner, image=owner, out=out, dtype="float32"))
    return load_bundle(out)


def picture(width: int, height: int) -> Image.Image:
    noise = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize("size", [(10, 8), (6, 15), (40, 31), (5, 4)])
def test_a_prompt_with_a_picture_is_the_processors(
    size: tuple[int, int], bundle: Bundle, processor: Emu3Processor, theirs: Emu3ForConditionalGeneration
):
    """Resized alike, cut into the same codes, written with the same size and row ends."""
    image = picture(*size)
    inputs = processor(text=f"{WORDS}<image>", images=image, return_tensors="pt")
    wanted = inputs.input_ids[0].tolist()
    codes = theirs.model.get_image_tokens(inputs.pixel_values, inputs.image_sizes).tolist()
    places = [at for at, token in enumerate(wanted) if token == processor.image_token_id]
    assert len(places) == len(codes)
    for at, code in zip(places, codes, strict=True):
        wanted[at] = code
    document = encode_images(bundle, Document((TextPart(WORDS), ImagePart(image))))
    ours = render(document, bundle.vocabulary, bundle.text, complete=False).ids.tolist()
    assert ours == wanted
    rows, columns = document.parts[1].grid
    assert [rows * 2, columns * 2] == inputs.image_sizes[0].tolist() and len(document.parts[1].codes) == rows * columns
    assert parse(ours, bundle.vocabulary, bundle.text) == document


@pytest.mark.parametrize(("ratio", "size"), [("1:1", None), ("3:2", "10x6"), ("2:3", "6x10")])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@torch.inference_mode()
def test_an_image_is_the_one_that_transformers_draws(
    ratio: str,
    size: str | None,
    scale: float,
    bundle: Bundle,
    processor: Emu3Processor,
    theirs: Emu3ForConditionalGeneration,
):
    """Greedy codes under transformers' unbatched guidance, its prompts with the size, and its pixels."""
    area = {"return_for_image_generation": True, "ratio": ratio, "image_area": 64}
    inputs = processor(text=WORDS, return_tensors="pt", **area)
    nothing = processor(text="", return_tensors="pt", **area)
    rows, columns = inputs.image_sizes[0].tolist() if torch.is_tensor(inputs.image_sizes) else inputs.image_sizes[0]
    controls, span = bundle.vocabulary.controls, bundle.vocabulary.image_span
    tail = [controls["end_frame"], controls["end_image"]]

    class Frame(LogitsProcessor):
        """Codes, with a row's end after each ``columns``."""

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            at, kept = input_ids.shape[1] - inputs.input_ids.shape[1], torch.full_like(scores, -torch.inf)
            if at >= rows * (columns + 1):
                kept[:, tail[at - rows * (columns + 1)]] = 0
            elif at % (columns + 1) == columns:
                kept[:, controls["end_row"]] = 0
            else:
                kept[:, span.start : span.stop] = scores[:, span.start : span.stop]
            return kept

    drawn = theirs.generate(
        **{"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask},
        negative_prompt_ids=nothing.input_ids,
        negative_prompt_attention_mask=nothing.attention_mask,
        guidance_scale=scale,
        max_new_tokens=rows * (columns + 1) + 2,
        do_sample=False,
        logits_processor=LogitsProcessorList([Frame()]),
    )
    prompt = Document((TextPart(WORDS),))
    options = SamplingOptions(mode="image", max_images=1, image_temperature=0.0, guidance_scale=scale, image_size=size)
    ours = render(prompt, bundle.vocabulary, bundle.text, complete=False).ids.tolist()
    steps = list(generate(bundle, [prompt], options))
    assert steps[-1].kind is Kind.EOS and [*ours, *(step.token for step in steps[:-1])] == drawn[0].tolist()
    if size is None:
        assert (rows, columns) == (4, 4)
    (reply,) = replies(bundle, [prompt], options)
    pixels = theirs.model.decode_image_tokens(_padded(drawn[:, inputs.input_ids.shape[1] :]), rows, columns)
    wanted = (pixels[0].clamp(-1, 1).permute(1, 2, 0).numpy() + 1) * 127.5
    assert reply.images[0].size == (columns * 2, rows * 2)
    assert np.abs(np.asarray(reply.images[0]) - wanted).max() < 1


def _padded(image: torch.Tensor) -> torch.Tensor:
    """transformers takes three tokens off the end: Emu3's own generation has an end of text there."""
    return torch.cat([image, image[:, -1:]], dim=1)


def test_a_fused_model_draws_in_both_vocabularies(owner: Path, tmp_path: Path):
    """The LLM's tokenizer writes the size; text, two images and text in one reply."""
    llm = tiny_parent(tmp_path / "llm", False, 1, "llama", num_hidden_layers=4)
    run_merge(MergeRecipe(method="cross", text=llm, image=owner, out=tmp_path / "out", dtype="float32"))
    bundle = load_bundle(tmp_path / "out")
    options = SamplingOptions(min_images=2, max_images=2, max_tokens=120, image_size="6x10", text_temperature=1.0)
    (reply,) = replies(bundle, [Document((TextPart("a cat"),))], options)
    drawn = [part for part in reply.document.parts if isinstance(part, CodesPart)]
    assert [part.grid for part in drawn] == [(5, 3)] * 2 and [image.size for image in reply.images] == [(6, 10)] * 2
    ids = render(reply.document, bundle.vocabulary, bundle.text).ids.tolist()
    size = ids.index(bundle.vocabulary.controls["begin_image"]) + 1
    assert ids[size : ids.index(bundle.vocabulary.controls["begin_codes"])] == bundle.text.encode("5*3")


def test_the_owners_bounds_of_pixels_go_with_the_tokenizer(owner: Path, tmp_path: Path):
    assert {key: open_model(owner).passengers.config[key] for key in AREA} == AREA
    bare = emu3_owner(tmp_path / "bare")
    assert {key: open_model(bare).passengers.config[key] for key in AREA} == emu3.AREA
    Emu3ImageProcessor(**AREA).save_pretrained(bare)
    for change in ({"min_pixels": 999}, {"max_pixels": "x"}, {"min_pixels": 0}):
        edit_json(bare / "preprocessor_config.json", AREA | change)
        with pytest.raises(CheckpointError, match=r"min_pixels and max_pixels are .* whole numbers in order") as error:
            open_model(bare)
        assert "\n" not in str(error.value)


def test_an_image_tokenizer_of_other_squares_is_refused(owner: Path, tmp_path: Path):
    run_merge(MergeRecipe(method="uniform", text=owner, image=owner, out=tmp_path / "same", dtype="float32"))
    given = tmp_path / "same/image_tokenizer"
    recipe = MergeRecipe(method="uniform", text=owner, image=owner, image_tokenizer=given, out=tmp_path / "out")
    edit_json(given / "config.json", {"resolution": 6})
    with pytest.raises(MergeError, match="9 codes an image, 6 px squares, the image parent has 16; set resolution"):
        run_merge(recipe)
    edit_json(given / "config.json", {"resolution": 8})
    run_merge(recipe)
    assert load_bundle(recipe.out).image.resolution == 8


def test_lumina_draws_and_reads_at_its_sizes(tmp_path: Path):
    """Its image network has no decoder: one that has makes the pictures. 4 codes in a square of 16 px, 8 px a code."""
    folder = chameleon_owner(tmp_path / "lumina", lumina=True)
    edit_json(folder / "config.json", {"mask_image_logits": False})
    model = open_model(folder)
    words = model.jam.vocabulary.sizes
    assert model.layout == "Lumina-mGPT" and sorted(words) == [2, 4, 6]
    facts = dict(describe_folder(folder))
    assert facts["controls"].endswith("size_2 to size_6 (3)") and facts["images"].startswith(
        "4 codes of 16 in a square, or"
    )
    given = whole_tokenizer(tmp_path / "given", folder)
    recipe = MergeRecipe(method="uniform", text=folder, image=folder, image_tokenizer=given, out=tmp_path / "out")
    run_merge(recipe)
    bundle = load_bundle(recipe.out)
    start, end = (bundle.vocabulary.controls[name] for name in ("begin_image", "end_image"))
    options = SamplingOptions(mode="image", max_images=1, image_size="32x16", guidance_scale=1.0)
    prompt = Document((TextPart(WORDS),))
    steps = list(generate(bundle, [prompt], options))
    forced = [step.token for step in steps if step.kind is not Kind.CODE]
    row = bundle.vocabulary.controls["end_row"]
    assert forced == [start, words[2], words[4], row, row, end, bundle.vocabulary.controls["eos"]]  # rows first
    assert replies(bundle, [prompt], options)[0].images[0].size == (32, 16)
    wide = encode_images(bundle, Document((ImagePart(picture(64, 20)),)))
    assert wide.parts[0].grid == (2, 2)  # its number of codes allows no other
    more = replace(bundle, vocabulary=replace(bundle.vocabulary, codes_per_image=16))
    wide = encode_images(more, Document((ImagePart(picture(64, 20)),)))
    assert wide.parts[0].grid == (2, 6)
    llm = tiny_parent(tmp_path / "llm", False, 1, "opt", num_hidden_layers=4)
    run_merge(MergeRecipe(method="cross", text=llm, image=folder, out=tmp_path / "fused", dtype="float32"))
    fused, stored = load_bundle(tmp_path / "fused"), load_file(folder / WEIGHTS)["model.embed_tokens.weight"]
    table = fused.model.image.get_input_embeddings().weight
    assert list(fused.vocabulary.sizes) == list(words)
    assert all(torch.equal(table[fused.vocabulary.sizes[side]], stored[index]) for side, index in words.items())
    assert parse(render(wide, more.vocabulary, more.text).ids.tolist(), more.vocabulary, more.text) == wide
