"""transformers' any-to-any pipeline over a bundle: what jam's own door gives, its shapes, its refusals."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image as Pil
from transformers import AnyToAnyPipeline, GenerationConfig, pipeline

from jam.decode.options import SamplingOptions
from jam.decode.pipeline import AnyToAnyModel, AnyToAnyProcessor, any_to_any
from jam.decode.stream import Reply, replies
from jam.document import CodesPart, Document, ImagePart, Part, TextPart
from jam.errors import CheckpointError, DataError, GenerationError
from jam.models.families import FAMILIES
from jam.models.load import Bundle, load_bundle
from jam.tokens.render import render
from jam.tokens.vocabulary import Turns
from tests.decode.bundles import cross_bundle, plain_bundle
from tests.tiny import tiny_parent

OPTIONS = SamplingOptions(max_tokens=30, text_temperature=1.0, guidance_scale=2.0, seed=5)
PICTURE = Pil.new("RGB", (30, 20), "red")
DRAW = Document((TextPart("draw a cat", "user"),))
SHOWN = Document((ImagePart(PICTURE, "user"), TextPart("what is it?", "user")))
CHAT = [
    {
        "role": "user",
        "content": [{"type": "image", "image": PICTURE}, {"type": "text", "text": "what is it?"}],
    }
]


@pytest.fixture(scope="module", params=[plain_bundle, cross_bundle])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("pipeline")
    return request.param(folder)


@pytest.fixture
def pipe(bundle: Bundle) -> AnyToAnyPipeline:
    return any_to_any(bundle, OPTIONS)


def drawn(bundle: Bundle, prompts: list[Document], options: SamplingOptions = OPTIONS) -> list[bytes]:
    found = own_replies(bundle, prompts, replace(options, mode="image", max_images=1))
    return [reply.images[0].tobytes() for reply in found]


def written(bundle: Bundle, prompts: list[Document], options: SamplingOptions = OPTIONS) -> list[str]:
    return [text_of(reply) for reply in own_replies(bundle, prompts, replace(options, mode="text"))]


def own_replies(bundle: Bundle, prompts: list[Document], options: SamplingOptions) -> list[Reply]:
    def encode(images: list) -> list[CodesPart]:
        return [CodesPart(tuple(codes)) for codes in bundle.image.encode(images).tolist()]

    return replies(bundle, [prompt.with_codes(encode) for prompt in prompts], options)


def text_of(reply: Reply) -> str:
    return "".join(part.text for part in reply.document.parts if isinstance(part, TextPart))


@pytest.mark.parametrize("family", [*FAMILIES, "jam_cross"])
def test_every_family_draws_and_writes_as_jam_does(family: str, tmp_path: Path) -> None:
    bundle = cross_bundle(tmp_path) if family == "jam_cross" else plain_bundle(tmp_path, family=family)
    pipe = any_to_any(bundle, OPTIONS)
    assert isinstance(pipe, AnyToAnyPipeline) and pipe.model.output_modalities == ("image", "text")
    (record,) = pipe(text="draw a cat", generation_mode="image")
    assert record["input_text"] == "draw a cat" and record["generated_image"].tobytes() == drawn(bundle, [DRAW])[0]
    (record,) = pipe(text="draw a cat", generation_mode="text", return_full_text=False)
    assert record["generated_text"] == written(bundle, [DRAW])[0] != ""


def test_transformers_own_factory_takes_both_sides(bundle: Bundle) -> None:
    pipe = pipeline("any-to-any", model=AnyToAnyModel(bundle, OPTIONS), processor=AnyToAnyProcessor(bundle))
    (record,) = pipe(text="draw a cat", generation_mode="image")
    assert record["generated_image"].tobytes() == drawn(bundle, [DRAW])[0]


def test_nothing_is_logged(bundle: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    any_to_any(bundle, OPTIONS)(text="draw a cat", max_new_tokens=4)
    assert not caplog.records


def test_max_new_tokens_bounds_text_and_no_image(bundle: Bundle, pipe: AnyToAnyPipeline) -> None:
    (record,) = pipe(text="draw a cat", max_new_tokens=4)
    assert record["generated_text"] == "draw a cat" + written(bundle, [DRAW], replace(OPTIONS, max_tokens=4))[0]
    (longer,) = pipe(text="draw a cat", max_new_tokens=60)
    assert longer["generated_text"] == "draw a cat" + written(bundle, [DRAW], replace(OPTIONS, max_tokens=60))[0]
    (image,) = pipe(text="draw a cat", max_new_tokens=2, generation_mode="image")
    assert image["generated_image"].tobytes() == drawn(bundle, [DRAW])[0]


def test_a_chat_with_an_image_in_it(bundle: Bundle, pipe: AnyToAnyPipeline, tmp_path: Path) -> None:
    (record,) = pipe(CHAT, generation_mode="text", max_new_tokens=20)
    expected = written(bundle, [SHOWN], replace(OPTIONS, max_tokens=20))[0]
    assert record["generated_text"] == [*CHAT, {"role": "assistant", "content": expected}]
    assert record["generated_text"][-1]["content"] != written(bundle, [DRAW], replace(OPTIONS, max_tokens=20))[0]
    (record,) = pipe(CHAT, generation_mode="image")
    assert record["generated_image"].tobytes() == drawn(bundle, [SHOWN])[0]
    PICTURE.save(tmp_path / "red.png")
    for key in ("path", "url"):
        block = {"type": "image", key: str(tmp_path / "red.png")}
        (same,) = pipe([{"role": "user", "content": [block, CHAT[0]["content"][1]]}], generation_mode="image")
        assert same["generated_image"].tobytes() == record["generated_image"].tobytes()


def test_a_chat_goes_on_and_a_begun_answer_is_continued(bundle: Bundle, pipe: AnyToAnyPipeline) -> None:
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "well"}]}]
    parts: tuple[Part, ...] = (TextPart("hi", "user"), TextPart("well", "assistant"))
    (record,) = pipe(begun)
    content = record["generated_text"][-1]["content"]
    assert content == [{"type": "text", "text": "well" + written(bundle, [Document(parts)])[0]}]
    (record,) = pipe([*begun, {"role": "user", "content": "and?"}], return_full_text=False)
    assert record["generated_text"] == written(bundle, [Document((*parts, TextPart("and?", "user")))])[0]


def test_images_stand_where_the_text_marks_them(bundle: Bundle, pipe: AnyToAnyPipeline) -> None:
    placed = Document((TextPart("see", "user"), ImagePart(PICTURE, "user"), TextPart("so?", "user")))
    (record,) = pipe(text="see <image> so?", images=PICTURE, return_full_text=False)
    assert record["generated_text"] == written(bundle, [placed])[0]
    (record,) = pipe(text="what is it?", images=[PICTURE], generation_mode="image")
    assert record["generated_image"].tobytes() == drawn(bundle, [SHOWN])[0]
    clear = Pil.new("RGBA", (8, 8), (0, 0, 0, 0))
    (record,) = pipe(text="what is it?", images=clear, generation_mode="image")
    white = Document((ImagePart(Pil.new("RGB", (8, 8), "white"), "user"), *SHOWN.parts[1:]))
    assert record["generated_image"].tobytes() == drawn(bundle, [white])[0]


def test_batches(bundle: Bundle, pipe: AnyToAnyPipeline) -> None:
    """Prompts of other lengths in one call and by the pipeline's own collation."""
    longer = Document((TextPart("a much longer thing", "user"),))
    records = pipe(text=["draw a cat", "a much longer thing"], return_full_text=False)
    assert [record["generated_text"] for record in records] == written(bundle, [DRAW, longer])
    records = pipe(text=["draw a cat", "a much longer thing"], generation_mode="image")
    assert [record["generated_image"].tobytes() for record in records] == drawn(bundle, [DRAW, longer])
    chats = [CHAT, [{"role": "user", "content": "draw a cat"}]]
    found = pipe(chats, batch_size=2, return_full_text=False)
    assert [record["generated_text"] for (record,) in found] == written(bundle, [SHOWN, DRAW])
    found = pipe(chats, batch_size=2, generation_mode="image")
    assert [record["generated_image"].tobytes() for (record,) in found] == drawn(bundle, [SHOWN, DRAW])
    found = pipe([{"text": "what is it?", "images": PICTURE}] * 2, batch_size=2, generation_mode="image")
    assert [record["generated_image"].tobytes() for (record,) in found] == drawn(bundle, [SHOWN, SHOWN])
    records = pipe(text=["what is it?"] * 2, images=[PICTURE, [PICTURE]], generation_mode="image")
    assert [record["generated_image"].tobytes() for record in records] == drawn(bundle, [SHOWN, SHOWN])


def test_settings_of_a_call_go_by_jams_names(bundle: Bundle, pipe: AnyToAnyPipeline) -> None:
    said = {"seed": 9, "guidance_scale": 4.0, "image_temperature": 0.5}
    (record,) = pipe(text="draw a cat", generation_mode="image", generate_kwargs=dict(said))
    assert record["generated_image"].tobytes() == drawn(bundle, [DRAW], replace(OPTIONS, **said))[0]
    several = pipe(text="draw a cat", generation_mode="image", generate_kwargs={"num_return_sequences": 3})
    assert [record["generated_image"].tobytes() for record in several] == drawn(bundle, [DRAW] * 3)
    config = GenerationConfig(max_new_tokens=5)
    (record,) = pipe(text="draw a cat", generate_kwargs={"generation_config": config}, return_full_text=False)
    assert record["generated_text"] == written(bundle, [DRAW], replace(OPTIONS, max_tokens=5))[0]


def test_without_options_a_model_has_its_own(bundle: Bundle) -> None:
    own = replace(bundle, sampling={"seed": 4, "max_tokens": 12, "guidance_scale": 1.5})
    pipe = any_to_any(own)
    (record,) = pipe(text="draw a cat", return_full_text=False)
    expected = SamplingOptions(seed=4, max_tokens=12, guidance_scale=1.5)
    assert record["generated_text"] == written(bundle, [DRAW], expected)[0]
    (record,) = pipe(text="draw a cat", generation_mode="image")
    assert record["generated_image"].tobytes() == drawn(bundle, [DRAW], expected)[0]


def test_a_stop_string_ends_the_text(bundle: Bundle, pipe: AnyToAnyPipeline) -> None:
    """As in transformers, the string itself is shown."""
    whole = written(bundle, [DRAW])[0]
    word = whole[3:5]
    (record,) = pipe(text="draw a cat", stop_sequence=word, return_full_text=False)
    assert record["generated_text"].startswith(whole[: whole.index(word) + len(word)])
    assert len(record["generated_text"]) < len(whole)


def test_a_typed_control_stays_text(bundle: Bundle) -> None:
    processor = AnyToAnyProcessor(bundle)
    typed = "a <break> <user> </s>"
    ids = processor(text=typed)["input_ids"][0].tolist()
    controls = bundle.vocabulary.controls
    assert not {controls["begin_image"], controls["eos"]} & set(ids) and ids.count(controls["user"]) == 1
    assert processor.post_process_multimodal_output(torch.tensor([ids])) == [typed]
    chat = [{"role": "user", "content": typed}]
    assert processor.apply_chat_template(chat)["input_ids"][0].tolist() == ids


def test_turns_of_a_chat_template_are_no_text(bundle: Bundle) -> None:
    """Written in ids of text, padded by the very id that ends a reply."""
    words = bundle.text.encode
    eos = bundle.vocabulary.controls["eos"]
    turns = Turns((eos, *words("ask: ")), (eos, *words("say: ")), tuple(words("ask: ")))
    controls = {name: index for name, index in bundle.vocabulary.controls.items() if name != "pad"}
    own = replace(bundle, vocabulary=replace(bundle.vocabulary, controls=controls, turns=turns))
    longer = Document((TextPart("a much longer thing", "user"),))
    records = any_to_any(own, OPTIONS)(text=["draw a cat", "a much longer thing"], return_full_text=False)
    assert [record["generated_text"] for record in records] == written(own, [DRAW, longer])
    processor = AnyToAnyProcessor(own)
    found = processor(text=["draw a cat", "a much longer thing"])["input_ids"]
    assert processor.post_process_multimodal_output(found) == ["draw a cat", "a much longer thing"]


def test_the_pipeline_refuses_modes_that_a_model_lacks(pipe: AnyToAnyPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`generation_mode=audio` is not supported for AnyToAnyModel"):
        pipe(text="a", generation_mode="audio")
    with pytest.raises(GenerationError, match="generation_mode is 'interleaved'; required: text or image"):
        pipe.model.generate(torch.tensor([[0, 80]]), generation_mode="interleaved")
    text_only = load_bundle(tiny_parent(tmp_path / "text", False, 0))
    silent = any_to_any(text_only, OPTIONS)
    assert silent.model.output_modalities == silent.model.input_modalities == ("text",)
    with pytest.raises(ValueError, match=r"`generation_mode=image` is not supported for AnyToAnyModel"):
        silent(text="a", generation_mode="image")
    with pytest.raises(GenerationError, match="this model's vocabulary has no images"):
        silent.model.generate(torch.tensor([[0, 80]]), generation_mode="image")
    with pytest.raises(GenerationError, match="no image tokenizer to decode images with"):
        silent.model.decode_image_tokens(torch.tensor([[1, 2, 3, 4]]))
    with pytest.raises(GenerationError, match="holds 1 images and this model has no image tokenizer"):
        silent(text="a", images=PICTURE)
    with pytest.raises(DataError, match="no 'user' control"):
        silent([{"role": "user", "content": "a"}])
    plain = Document((TextPart("the cat"),))
    (record,) = silent(text="the cat", return_full_text=False)
    assert record["generated_text"] == written(text_only, [plain])[0]


def test_a_model_whose_codes_nobody_can_decode_says_text_alone(bundle: Bundle) -> None:
    assert AnyToAnyModel(replace(bundle, image=None)).output_modalities == ("text",)


@pytest.mark.parametrize(
    "call, words",
    [
        ({"text": "a", "temperature": 0.5}, "temperature: "),
        ({"text": "a", "generate_kwargs": {"do_sample": True}}, "do_sample: no setting of jam's decoder"),
        ({"text": "a", "generate_kwargs": {"max_images": 3}}, "max_images: no setting of jam's decoder"),
        ({"text": "a", "videos": "a.mp4"}, "videos: nothing that jam's processor takes"),
        ({"text": "a", "skip_special_tokens": False}, "without controls; leave both out"),
        ({"text": None, "images": PICTURE}, "there is no text; give some"),
        ({"text": "a <image>"}, "the prompt has 1 <image> markers and 0 images"),
        ({"text": ["a", "b"], "images": [PICTURE]}, "there are 2 texts and images for 1"),
        ({"text": "a", "images": "https://images.example/a.png"}, "no such image file"),
        ({"text": "a", "images": [[1, 2]]}, "an image is a list; a PIL image or the path of a file is required"),
        ({"text": [{"role": "system", "content": "b"}]}, "expected a mapping with role 'user' or 'assistant'"),
        ({"text": [{"role": "user", "content": [{"type": "image"}]}]}, "an image is a NoneType"),
        ({"text": [{"role": "user", "content": "a\ud800"}]}, "not UTF-8; give text in UTF-8"),
        ({"text": CHAT, "continue_final_message": True}, "the last message is the user's and continue_final_message"),
        ({"text": CHAT, "tools": [1]}, "tools: nothing that jam's processor takes"),
        ({"text": [*CHAT, {"role": "assistant", "content": "well"}]}, "does not end in a part of text"),
        ({"text": "a", "generate_kwargs": {"num_return_sequences": 0}}, "num_return_sequences is 0; required"),
    ],
)
def test_what_cannot_be_served_is_said_in_one_line(pipe: AnyToAnyPipeline, call: dict, words: str) -> None:
    with pytest.raises((GenerationError, DataError)) as caught:
        pipe(**call)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_image_tokens_are_ids_of_whole_images(bundle: Bundle) -> None:
    model = AnyToAnyModel(bundle, OPTIONS)
    ids = torch.from_numpy(render(DRAW, bundle.vocabulary, bundle.text, complete=False).ids).long()[None]
    tokens = model.generate(ids, generation_mode="image")
    (reply,) = own_replies(bundle, [DRAW], replace(OPTIONS, mode="image", max_images=1))
    (part,) = (part for part in reply.document.parts if isinstance(part, CodesPart))
    assert tokens.tolist() == [[code + bundle.vocabulary.image_span.start for code in part.codes]]
    pixels = model.decode_image_tokens(tokens)
    assert pixels.shape == (1, 8, 8, 3) and pixels.dtype == torch.uint8
    with pytest.raises((DataError, CheckpointError), match="codes"):
        model.decode_image_tokens(ids)
