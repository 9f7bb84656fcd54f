"""Pictures and foreign text in a terminal, without one: consoles that write to memory."""

import io

import pytest
from PIL import Image
from rich.console import Console

from jam.chat import _Screen
from jam.decode.stream import ImageDone, ImageProgress, ImageStart, Stop, TextDelta
from jam.errors import printable
from jam.terminal import UPPER_HALF, half_blocks, shows_images


def console(terminal: bool = True, **changes) -> Console:
    settings = {"file": io.StringIO(), "force_terminal": terminal, "width": 80, "emoji": False, "_environ": {}}
    return Console(**settings | ({"color_system": "truecolor"} if terminal else {}) | changes)


def picture() -> Image.Image:
    """Red above blue."""
    image = Image.new("RGB", (64, 64), (255, 0, 0))
    image.paste((0, 0, 255), (0, 32, 64, 64))
    return image


def test_half_blocks_have_the_pixels_colours() -> None:
    text = half_blocks(picture(), 10)
    lines = text.plain.split("\n")
    assert [len(line) for line in lines] == [10] * 5
    styles = [span.style for span in text.spans]
    assert styles[0].color.triplet == styles[0].bgcolor.triplet == (255, 0, 0)
    assert styles[-1].color.triplet == styles[-1].bgcolor.triplet == (0, 0, 255)


@pytest.mark.parametrize(
    ("screen", "shown"),
    [
        (console(), True),
        (console(terminal=False), False),
        (console(_environ={"NO_COLOR": "1"}), False),
        (console(color_system=None), False),
    ],
)
def test_images_are_drawn_in_colour_terminals_only(screen: Console, shown: bool) -> None:
    assert shows_images(screen) is shown


def events(screen: Console, inline: bool = True) -> str:
    view = _Screen(screen, inline)
    for event in (
        TextDelta(0, "a cat :cat: [red]x[/red] \x1b[2J"),
        ImageStart(0, 0),
        ImageProgress(0, 0, 1, 2),
        ImageDone(0, 0, (1, 2), picture()),
        TextDelta(0, "done"),
        Stop(0, "length"),
    ):
        view.show(event, "chat/image-0.png")
    view.close()
    return screen.file.getvalue()


def test_a_reply_on_a_terminal() -> None:
    output = events(console())
    assert UPPER_HALF in output and "\x1b[38;2;255;0;0;48;2;255;0;0m" in output
    assert "[image: chat/image-0.png]" in output and "(cut:" in output


def test_a_reply_in_a_pipe_is_plain_and_literal() -> None:
    """Markup and emoji names that a model writes are its words; its control characters are not passed on."""
    assert events(console(terminal=False)) == (
        "a cat :cat: [red]x[/red] [2J\n[image: chat/image-0.png]\ndone\n"
        "(cut: the token budget or the context is used up)\n"
    )


def test_inline_images_can_be_off() -> None:
    assert UPPER_HALF not in events(console(), inline=False)


def test_long_lines_are_not_broken() -> None:
    screen = console(terminal=False)
    _Screen(screen, False).show(TextDelta(0, "word " * 60), "")
    assert "\n" not in screen.file.getvalue()


def test_printable_keeps_every_script() -> None:
    said = "naïve 你好 🐈 👩\u200d🚀 a\u00a0b\t\n"
    assert printable(said) == said
    assert printable("a\x07\x1b\x9bb\x00") == "ab"
