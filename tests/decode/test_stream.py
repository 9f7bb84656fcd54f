"""Steps to events and documents."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jam.decode.engine import generate
from jam.decode.grammar import Kind, Step
from jam.decode.options import SamplingOptions
from jam.decode.stream import ImageDone, ImageProgress, ImageStart, ReplyStream, Stop, TextDelta, events, replies
from jam.document import CodesPart, Document, TextPart
from jam.models.load import Bundle
from jam.tokens.render import parse, render
from tests.decode.bundles import plain_bundle

USER = Document((TextPart("draw a cat", "user"),))
PLAIN = Document((TextPart("a cat"),))
OPTIONS = SamplingOptions(max_tokens=40, text_temperature=1.0, text_top_p=1.0, min_images=1)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return plain_bundle(tmp_path_factory.mktemp("stream"))


def steps_of(ids: list[int], kinds: list[Kind]) -> list[Step]:
    last = len(ids) - 1
    return [
        Step(0, at, token, kind, "eos" if at == last else None)
        for at, (token, kind) in enumerate(zip(ids, kinds, strict=True))
    ]


def test_reply_is_what_parse_reads(bundle: Bundle) -> None:
    """The document of a reply equals the parsed ids, roles and codes included, for a conversation and plain text."""
    for seed in range(4):
        options = SamplingOptions(max_tokens=40, text_temperature=1.0, text_top_p=1.0, min_images=1, seed=seed)
        found = replies(bundle, [USER, PLAIN], options)
        for row, prompt in enumerate((USER, PLAIN)):
            ids = render(prompt, bundle.vocabulary, bundle.text, complete=False).ids.tolist()
            ids += [step.token for step in generate(bundle, [USER, PLAIN], options) if step.row == row]
            parsed = parse(ids, bundle.vocabulary, bundle.text)
            if prompt is USER:
                parts = tuple(part for part in parsed.parts if part.role == "assistant")
                assert parts == found[row].document.parts
            else:  # the text that goes on from the prompt is one piece for parse
                codes = [part for part in parsed.parts if isinstance(part, CodesPart)]
                assert codes == [part for part in found[row].document.parts if isinstance(part, CodesPart)]
            drawn = sum(isinstance(part, CodesPart) for part in found[row].document.parts)
            assert drawn == len(found[row].images) >= 1


def test_deltas_join_to_the_document(bundle: Bundle) -> None:
    for seed in range(4):
        options = SamplingOptions(max_tokens=40, text_temperature=1.0, text_top_p=1.0, seed=seed)
        (reply,) = replies(bundle, [USER], options)
        seen = list(events(bundle, [USER], options))
        text = "".join(event.text for event in seen if isinstance(event, TextDelta))
        assert text == "".join(part.text for part in reply.document.parts if isinstance(part, TextPart))
        assert seen[-1] == Stop(0, reply.stop)


def test_events_come_in_order_and_images_when_whole(bundle: Bundle) -> None:
    seen = [event for event in events(bundle, [USER], OPTIONS) if isinstance(event, ImageStart | ImageDone)]
    assert seen and len(seen) % 2 == 0
    for index, (start, done) in enumerate(zip(seen[::2], seen[1::2], strict=True)):
        assert start == ImageStart(0, index)
        assert done.index == index and len(done.codes) == bundle.vocabulary.codes_per_image
        assert done.image.size == (8, 8)


def test_codes_decode_to_the_tokenizers_image(bundle: Bundle) -> None:
    (reply,) = replies(bundle, [USER], OPTIONS)
    codes = [part.codes for part in reply.document.parts if isinstance(part, CodesPart)]
    assert [image.tobytes() for image in reply.images] == [image.tobytes() for image in bundle.image.decode(codes)]


def test_a_reply_that_is_cut_anywhere_is_well_formed(bundle: Bundle) -> None:
    """Whatever step is the last one read, the prompt with the reply renders, and only whole images are in it."""
    steps = list(generate(bundle, [USER], OPTIONS))
    for length in range(len(steps)):
        stream = ReplyStream(bundle, [USER])
        for step in steps[:length]:
            stream.push(step)
        reply = stream.reply(0)
        assert reply.stop == "cut"
        render(Document((*USER.parts, *reply.document.parts)), bundle.vocabulary, bundle.text)
    assert any(isinstance(part, CodesPart) for part in reply.document.parts)


def test_characters_of_several_tokens_are_never_split(bundle: Bundle) -> None:
    """The tiny tokenizer writes an emoji as four byte tokens, also late in a text."""
    said = "it is a long text, then \U0001f408 and \u00e9\u00e8, \u4f60\u597d"
    ids = bundle.text.encode(said)
    stream = ReplyStream(bundle, [USER])
    deltas = [
        event.text
        for step in steps_of([*ids, 2], [Kind.TEXT] * len(ids) + [Kind.EOS])
        for event in stream.push(step)
        if isinstance(event, TextDelta)
    ]
    assert "".join(deltas) == said
    assert len(deltas) > 20 and not any("\ufffd" in delta for delta in deltas)


def test_bytes_that_are_no_text_end_as_replacement_characters(bundle: Bundle) -> None:
    """Half a character before the end is shown as such, once, in the delta and in the document."""
    half = bundle.text.encode("ok \U0001f408")[:-1]
    stream = ReplyStream(bundle, [USER])
    steps = steps_of([*half, 2], [Kind.TEXT] * len(half) + [Kind.EOS])
    deltas = [event.text for step in steps for event in stream.push(step) if isinstance(event, TextDelta)]
    assert "".join(deltas) == stream.reply(0).document.parts[0].text
    assert "".join(deltas).startswith("ok \ufffd")


def test_random_bytes_stream_to_the_same_text(bundle: Bundle) -> None:
    rng = random.Random(0)
    for _ in range(20):
        ids = [rng.randrange(8, 264) for _ in range(30)]
        stream = ReplyStream(bundle, [USER])
        steps = steps_of([*ids, 2], [Kind.TEXT] * len(ids) + [Kind.EOS])
        deltas = [event.text for step in steps for event in stream.push(step) if isinstance(event, TextDelta)]
        assert "".join(deltas) == stream.reply(0).document.parts[0].text


def test_without_an_image_tokenizer_codes_stay(bundle: Bundle) -> None:
    blind = type(bundle)(bundle.path, bundle.model, bundle.vocabulary, bundle.text, None, bundle.unconditional)
    (reply,) = replies(blind, [USER], OPTIONS)
    assert reply.images == () and any(isinstance(part, CodesPart) for part in reply.document.parts)


def test_no_prompts_no_replies(bundle: Bundle, tmp_path: Path) -> None:
    assert replies(bundle, [], OPTIONS) == []


def test_previews_come_every_so_many_rows_and_grow(bundle: Bundle) -> None:
    """The tiny image has two rows of two codes: one preview, of its upper half."""
    seen = list(events(bundle, [USER], OPTIONS, preview_rows=1))
    progress = [event for event in seen if isinstance(event, ImageProgress)]
    previews = [event for event in progress if event.preview is not None]
    assert previews and {event.done for event in previews} == {2}
    done = [event for event in seen if isinstance(event, ImageDone)]
    for event in previews:
        pixels = np.asarray(event.preview)
        assert pixels.shape == (8, 8, 3) and (pixels[4:] == 128).all() and not (pixels[:4] == 128).all()
        assert pixels.tobytes() == np.asarray(bundle.image.preview(done[event.index].codes[:3])).tobytes()
    assert [replace(event, preview=None) if isinstance(event, ImageProgress) else event for event in seen] == list(
        events(bundle, [USER], OPTIONS)
    )


def test_a_preview_of_all_codes_is_the_image(bundle: Bundle) -> None:
    codes = [3, 9, 1, 14]
    (whole,) = bundle.image.decode([codes])
    assert bundle.image.preview(codes).tobytes() == whole.tobytes()
    assert set(bundle.image.preview(codes[:1]).get_flattened_data()) == {(128, 128, 128)}
