"""Stop strings: found wherever tokens cut them, never shown, and no end while images are owed."""

import random
from dataclasses import replace
from pathlib import Path

import pytest

from jam.decode.engine import generate
from jam.decode.grammar import Kind
from jam.decode.naive import generate_naive
from jam.decode.options import SamplingOptions
from jam.decode.stop import StopText
from jam.decode.stream import Stop, TextDelta, events, replies
from jam.document import Document, TextPart
from jam.errors import GenerationError
from jam.models.load import Bundle
from tests.decode.bundles import plain_bundle

PROMPT = Document((TextPart("say it", "user"),))
LONG = SamplingOptions(mode="text", max_tokens=60, text_temperature=1.0, text_top_p=1.0)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder: Path = tmp_path_factory.mktemp("stop")
    return plain_bundle(folder)


def test_random_cuts_never_show_a_stop_string() -> None:
    """Against the plain way: the text so far, searched whole after every piece."""
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choice("abc") for _ in range(draw.randrange(1, 25)))
        words = tuple("".join(draw.choice("abc") for _ in range(draw.randrange(1, 4))) for _ in range(2))
        stop, shown, at, places = StopText(words), "", 0, []
        while at < len(text) and not places:
            at += draw.randrange(1, 4)
            shown += stop.push(text[len(stop.text) : at])
            places = [text[:at].find(word) for word in words if word in text[:at]]
            assert stop.found == bool(places)
        assert shown + ("" if places else stop.flush()) == text[: min(places, default=None)]


def said(bundle: Bundle, seed: int) -> str:
    (reply,) = replies(bundle, [PROMPT], replace(LONG, seed=seed))
    return "".join(part.text for part in reply.document.parts)


def test_a_reply_ends_before_its_stop_string(bundle: Bundle) -> None:
    """Two characters of what a seed says, which tokens may cut anywhere."""
    ended = 0
    for seed in range(12):
        text = said(bundle, seed)
        pairs = [text[at : at + 2] for at in range(2, len(text) - 1)]
        if not (whole := [pair for pair in pairs if "\ufffd" not in pair]):
            continue
        word = whole[len(whole) // 2]
        options = replace(LONG, seed=seed, stop=(word, "never said"))
        (reply,) = replies(bundle, [PROMPT], options)
        found = "".join(part.text for part in reply.document.parts)
        assert found == text[: text.index(word)] and reply.stop == "stop"
        seen = list(events(bundle, [PROMPT], options))
        assert "".join(event.text for event in seen if isinstance(event, TextDelta)) == found
        assert seen[-1] == Stop(0, "stop")
        assert list(generate(bundle, [PROMPT], options)) == list(generate_naive(bundle, [PROMPT], options))
        ended += 1
    assert ended > 3


def test_a_stop_string_waits_for_the_images_that_are_owed(bundle: Bundle) -> None:
    """Every text holds one of the letters; without owed images the reply ends at the first."""
    letters = tuple("abcdefghijklmnopqrstuvwxyz ")
    options = replace(LONG, mode="interleaved", max_tokens=80, stop=letters, max_images=1)
    owing = replace(options, min_images=1)
    for seed in range(6):
        free, owed = (
            [step.kind for step in generate(bundle, [PROMPT], replace(own, seed=seed))] for own in (options, owing)
        )
        assert Kind.END in owed and len(owed) >= len(free)
        (reply,) = replies(bundle, [PROMPT], replace(owing, seed=seed))
        streamed = events(bundle, [PROMPT], replace(owing, seed=seed))
        text = "".join(part.text for part in reply.document.parts if isinstance(part, TextPart))
        assert "".join(event.text for event in streamed if isinstance(event, TextDelta)) == text


@pytest.mark.parametrize("stop", [("",), (3,), "END", ("x",) * 65])
def test_what_is_no_stop_string_is_refused(stop: object) -> None:
    with pytest.raises(GenerationError, match="stop is"):
        SamplingOptions(stop=stop)
    assert SamplingOptions(stop=["END"]).stop == ("END",)  # as a JSON file says it


def test_free_leaves_the_number_of_images_to_the_model(bundle: Bundle) -> None:
    """As interleaved without a bound: the same tokens where no bound is met."""
    shared = {"max_tokens": 80, "text_temperature": 1.0, "text_top_p": 1.0}
    for seed in range(3):
        free = SamplingOptions(mode="free", max_images=0, seed=seed, **shared)
        bound = SamplingOptions(mode="interleaved", max_images=80, seed=seed, **shared)
        assert list(generate(bundle, [PROMPT], free)) == list(generate(bundle, [PROMPT], bound))
    with pytest.raises(GenerationError, match="mode is free and min_images 1"):
        generate(bundle, [PROMPT], replace(free, min_images=1, max_images=1))
