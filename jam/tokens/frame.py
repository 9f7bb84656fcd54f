"""An image as a model writes it: which ids its frame puts after the control that opens it, and where its codes go.

    plain         c c c c <end>                                   one number of codes, one shape
    size in text  9 0 * 9 0 <codes> c c <row> c c <row> <frame> <end>      Emu3: rows*columns in the text's own tokens
    size tokens   <64> <48> c c <row> c c <row> <end>             Lumina-mGPT: one control each for rows and columns

What is there follows from the controls: ``end_row`` makes a frame of rows, ``begin_codes`` ends a size in text,
``size_N`` says N rows or columns, ``end_frame`` stands before the closing control. A model that writes no size has one.
Everything but the codes follows from the size, so that a decoder need not ask for it.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from jam.errors import DataError
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import Vocabulary

Grid = tuple[int, int]  # rows, columns of codes
MAX_RATIO = 4  # of an image's sides (Lumina-mGPT)
_WRITTEN = re.compile(r"([1-9][0-9]{0,4})\*([1-9][0-9]{0,4})")


@dataclass(frozen=True)
class Frame:
    """The places of an image after its opening control, numbered from 0.

    Attributes:
        opening: ids before the first code.
        rows, columns: of codes; one row without ``row_end``.
        row_end: the id after each row; None for codes that run on.
        closing: ids after the last code, of which the last closes the image.
        spoken: how many ids of ``opening`` the text head predicts: a size in text, and the control after it.
    """

    opening: tuple[int, ...]
    rows: int
    columns: int
    row_end: int | None
    closing: tuple[int, ...]
    spoken: int = 0

    @property
    def codes(self) -> int:
        return self.rows * self.columns

    @property
    def grid(self) -> Grid | None:
        """None for codes that run on, whose shape the image tokenizer knows alone."""
        return None if self.row_end is None else (self.rows, self.columns)

    @property
    def last(self) -> int:
        """The place of the control that closes the image."""
        return len(self) - 1

    def __len__(self) -> int:
        return len(self.opening) + self._body + len(self.closing)

    @property
    def _body(self) -> int:
        return self.codes if self.row_end is None else self.codes + self.rows

    def forced(self, place: int) -> int | None:
        """The id that stands at a place; None for a code.

        >>> frame = Frame((7,), 2, 2, 8, (9,))
        >>> [frame.forced(place) for place in range(len(frame))]
        [7, None, None, 8, None, None, 8, 9]
        """
        at = place - len(self.opening)
        if at < 0:
            return self.opening[place]
        if at >= self._body:
            return self.closing[at - self._body]
        return None if self.row_end is None or at % (self.columns + 1) < self.columns else self.row_end

    def run(self, place: int) -> int:
        """How many codes stand from a place on before an id that is forced."""
        if self.forced(place) is not None:
            return 0
        at = place - len(self.opening)
        return self.codes - at if self.row_end is None else self.columns - at % (self.columns + 1)

    def filled(self, ids: Sequence[int]) -> list[int]:
        """Every id of the image after its opening control, from those of its codes."""
        if self.row_end is None:
            return [*self.opening, *ids, *self.closing]
        starts = range(0, self.codes, self.columns)
        body = [token for at in starts for token in (*ids[at : at + self.columns], self.row_end)]
        return [*self.opening, *body, *self.closing]


def default_grid(vocabulary: Vocabulary) -> Grid:
    """The square of ``codes_per_image``."""
    side = math.isqrt(vocabulary.codes_per_image)
    return side, side


def frame_of(vocabulary: Vocabulary, text: TextTokenizer | None = None, grid: Grid | None = None) -> Frame:
    """The frame of an image.

    Args:
        text: writes a size in text; other frames do without.
        grid: None is the vocabulary's own number of codes, as a square where there are rows.

    Raises:
        DataError: a size that this vocabulary, or its text tokenizer, cannot write.
    """
    controls, own = vocabulary.controls, default_grid(vocabulary)
    rows, columns = own if grid is None else grid
    if not (type(rows) is type(columns) is int and min(rows, columns) > 0):
        raise DataError(f"an image of {rows!r:.20} x {columns!r:.20} codes; two whole numbers from 1 are required")
    end = (controls["end_image"],)
    if not vocabulary.framed:
        if grid is not None and grid != own:
            raise DataError(
                f"an image of {rows} x {columns} codes; this vocabulary's images have exactly "
                f"{vocabulary.codes_per_image} in a square, make it that"
            )
        return Frame((), 1, vocabulary.codes_per_image, None, end)
    if "end_frame" in controls:
        end = (controls["end_frame"], *end)
    opening: tuple[int, ...] = ()
    spoken, sizes = 0, vocabulary.sizes
    if "begin_codes" in controls:
        assert text is not None, "a size in text needs the text tokenizer"
        written = text.encode(f"{rows}*{columns}")
        if _read(text.decode(written)) != (rows, columns):
            raise DataError(
                f"this model's tokenizer writes the image size {rows}*{columns} as {text.decode(written)!r:.40}; one "
                "that has digits is required, use the model with text alone"
            )
        opening = (*written, controls["begin_codes"])
        spoken = len(opening)
    elif sizes:
        if missing := next((side for side in (rows, columns) if side not in sizes), None):
            raise DataError(
                f"an image of {rows} x {columns} codes; this vocabulary has no token for {missing}, but for "
                f"{min(sizes)} to {max(sizes)} ({len(sizes)} sizes): choose two of them"
            )
        opening = (sizes[rows], sizes[columns])
    elif (rows, columns) != own:
        raise DataError(
            f"an image of {rows} x {columns} codes; this vocabulary writes no size, {own[0]} x {own[1]} is it"
        )
    return Frame(opening, rows, columns, controls["end_row"], end, spoken)


def read_grid(ids: Sequence[int], at: int, vocabulary: Vocabulary, text: TextTokenizer) -> Grid | None:
    """The size that a stream gives the image which opens before ``at``; None where it writes none.

    Raises:
        DataError: no size stands there.
    """
    controls = vocabulary.controls
    if not vocabulary.framed:
        return None
    found = None
    if "begin_codes" in controls:
        # two numbers of five digits are eleven tokens at most, a tokenizer's own space included
        stop = next((n for n in range(at, min(at + 13, len(ids))) if ids[n] == controls["begin_codes"]), None)
        found = None if stop is None else _read(text.decode(list(ids[at:stop])))
    elif vocabulary.sizes:
        side = {index: size for size, index in vocabulary.sizes.items()}
        rows, columns = (side.get(index) for index in (*ids[at : at + 2], -1, -1)[:2])
        found = None if rows is None or columns is None else (rows, columns)
    else:
        return default_grid(vocabulary)
    if found is None:
        raise DataError(f"token {at - 1}: an image opens without its size; the stream breaks the grammar")
    return found


def _read(written: str) -> Grid | None:
    read = _WRITTEN.fullmatch(written.strip())
    return None if read is None else (int(read[1]), int(read[2]))


def nearest_grid(width: int, height: int, vocabulary: Vocabulary) -> Grid:
    """The size for a picture of so many pixels, of those that ``size_N`` controls write: the nearest ratio of sides
    among those of about ``codes_per_image`` codes.

    Lumina-mGPT's choice: at most so many codes, sides of at most 4 to 1, and no room for one more of both.
    """
    sides, most = sorted(vocabulary.sizes), vocabulary.codes_per_image
    more = dict(zip(sides, [*sides[1:], math.inf], strict=True))
    grids = [
        (rows, columns)
        for rows in sides
        for columns in sides
        if rows * columns <= most < more[rows] * more[columns] and max(rows, columns) <= MAX_RATIO * min(rows, columns)
    ]
    if not grids:
        return default_grid(vocabulary)

    def match(grid: Grid) -> tuple[float, int]:
        across, down = grid[1] / width, grid[0] / height
        return min(across, down) / max(across, down), grid[1]

    return max(grids, key=match)
