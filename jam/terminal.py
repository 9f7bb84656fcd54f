"""Images and foreign text in a terminal.

An image becomes rows of half blocks: each cell shows two pixels, the upper one as its foreground (the glyph is the
upper half block), the lower one as its background, so that pixels are about square. rich lowers the colours to what the
terminal has. Nothing here reads the keyboard.
"""

from PIL import Image as Pil
from PIL.Image import Image
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

COLUMNS = 40
UPPER_HALF = "\u2580"


def half_blocks(image: Image, columns: int = COLUMNS) -> Text:
    """A square of ``columns`` cells a line and ``columns // 2`` lines.

    >>> tile = Pil.new("RGB", (2, 2), (255, 0, 0))
    >>> tile.putpixel((0, 1), (0, 0, 255))
    >>> cell = half_blocks(tile, 2).spans[0].style
    >>> cell.color.triplet.hex, cell.bgcolor.triplet.hex
    ('#ff0000', '#0000ff')
    """
    lines = max(1, columns // 2)
    fitted = image.convert("RGB").resize((columns, 2 * lines), Pil.Resampling.LANCZOS)
    text = Text(no_wrap=True)
    for line in range(lines):
        for column in range(columns):
            upper, lower = (Color.from_rgb(*fitted.getpixel((column, 2 * line + half))) for half in (0, 1))
            text.append(UPPER_HALF, Style(color=upper, bgcolor=lower))
        if line + 1 < lines:
            text.append("\n")
    return text


def shows_images(console: Console) -> bool:
    """Whether cells of colour make sense: a terminal, with colours, and NO_COLOR not set."""
    return console.is_terminal and not console.no_color and console.color_system is not None
