"""What stands around and among an image's codes: written, read back, and refused where it does not hold."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models

from jam.document import CodesPart, Document, TextPart
from jam.errors import CheckpointError, DataError
from jam.tokens.frame import frame_of, nearest_grid
from jam.tokens.render import parse, render
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import JamFile, Vocabulary
from tests.tiny import tiny_tokenizer, tiny_vocabulary
from tests.tiny_framed import OWN, SHARED, SPANS, framed_vocabulary

TEXT = TextTokenizer(tiny_tokenizer())
KINDS = ("text", "tokens")
BEGIN, END, ROW = (SHARED[name] for name in ("begin_image", "end_image", "end_row"))
FIRST = SPANS[-1].start


def ids_of(kind: str, document: Document) -> list[int]:
    return render(document, framed_vocabulary(kind), TEXT).ids.tolist()


def test_every_token_of_both_kinds():
    document = Document((CodesPart((3, 1, 2, 0, 15, 4), grid=(2, 3)),))
    rows = [FIRST + 3, FIRST + 1, FIRST + 2, ROW, FIRST, FIRST + 15, FIRST + 4, ROW]
    codes, frame = OWN["text"]["begin_codes"], OWN["text"]["end_frame"]
    assert ids_of("text", document) == [0, BEGIN, *TEXT.encode("2*3"), codes, *rows, frame, END, 2]
    sizes = [OWN["tokens"]["size_2"], OWN["tokens"]["size_3"]]
    assert ids_of("tokens", document) == [0, BEGIN, *sizes, *rows, END, 2]


@pytest.mark.parametrize("kind", KINDS)
def test_parse_inverts_render(kind: str):
    document = Document(
        (
            TextPart("5*5 <break>", "user", 0.0),
            CodesPart(tuple(range(10)), "user", 0.0, (2, 5)),
            CodesPart(tuple(range(15)), "assistant", 1.0, (5, 3)),
            TextPart("and", "assistant", 1.0),
        )
    )
    ids = ids_of(kind, document)
    assert parse(ids, framed_vocabulary(kind), TEXT) == document
    square = Document((CodesPart((1, 2, 3, 4)),))
    assert parse(ids_of(kind, square), framed_vocabulary(kind), TEXT).parts[0].grid == (2, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_places_agree_with_what_is_written(kind: str):
    for vocabulary, grid in ((framed_vocabulary(kind), (3, 4)), (tiny_vocabulary(True), None)):
        frame = frame_of(vocabulary, TEXT, grid)
        written = frame.filled([-1] * frame.codes)
        forced = [frame.forced(place) for place in range(len(frame))]
        assert [-1 if token is None else token for token in forced] == written and forced.count(None) == frame.codes
        assert written[frame.last] == vocabulary.controls["end_image"]
        for place in range(len(frame)):
            rest = [*forced[place:], 0]
            assert frame.run(place) == next(n for n, token in enumerate(rest) if token is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_that_breaks_its_frame_is_refused_wherever_it_does(kind: str):
    """Any token inside an image left out, doubled or replaced by another one's neighbour."""
    vocabulary = framed_vocabulary(kind)
    ids = ids_of(kind, Document((TextPart("a"), CodesPart(tuple(range(6)), grid=(3, 2)))))
    begin = ids.index(BEGIN)
    stop = ids.index(END)
    for at in range(begin + 1, stop + 1):
        other = FIRST if ids[at] < FIRST else ROW
        for broken in (ids[:at] + ids[at + 1 :], [*ids[:at], other, *ids[at + 1 :]], ids[:at]):
            with pytest.raises(DataError, match=r"^token \d+: an? ") as error:
                parse(broken, vocabulary, TEXT)
            assert "\n" not in str(error.value)


def test_sizes_that_cannot_be_written_are_refused():
    for kind, part, message in (
        ("text", CodesPart((0,) * 5, grid=(2, 3)), "an image of 5 codes; .* exactly 6 at 2 x 3"),
        ("text", CodesPart((0,) * 5), "an image of 5 codes; .* exactly 4 at 2 x 2"),
        ("tokens", CodesPart((0,) * 12, grid=(2, 6)), r"no token for 6, but for 2 to 5 \(4 sizes\)"),
    ):
        with pytest.raises(DataError, match=message):
            render(Document((part,)), framed_vocabulary(kind), TEXT)
    plain = tiny_vocabulary(images=True)
    with pytest.raises(DataError, match="an image of 1 x 4 codes; this vocabulary's images have exactly 4 in a square"):
        render(Document((CodesPart((0,) * 4, grid=(1, 4)),)), plain, TEXT)
    sizeless = Vocabulary(SPANS, SHARED, 4)
    assert len(render(Document((CodesPart((0,) * 4),)), sizeless, TEXT)) == 10
    with pytest.raises(DataError, match="writes no size, 2 x 2 is it"):
        render(Document((CodesPart((0,) * 4, grid=(1, 4)),)), sizeless, TEXT)


def test_a_tokenizer_without_digits_is_refused():
    bare = Tokenizer(models.BPE({"a": 8, "*": 9}, []))
    bare.decoder = decoders.Fuse()
    with pytest.raises(DataError, match=r"writes the image size 2\*2 as '.*'; one that has digits is required"):
        frame_of(framed_vocabulary("text"), TextTokenizer(bare))


@pytest.mark.parametrize(
    "change",
    [{"end_image": BEGIN}, {"codes_per_image": 6}],
)
def test_a_file_whose_rows_do_not_hold_is_refused(tmp_path: Path, change: dict):
    vocabulary = framed_vocabulary("text")
    JamFile(vocabulary).write(tmp_path)
    assert JamFile.read(tmp_path).vocabulary == vocabulary
    raw = vocabulary.to_json()
    raw["codes_per_image"] = change.pop("codes_per_image", 4)
    raw["controls"] |= change
    with pytest.raises(CheckpointError, match=r"end_row, .* a square number and an end_image of its own"):
        Vocabulary.from_json(raw)
    for name in ("size_0", "size_x", "size_", "size_123456"):
        with pytest.raises(CheckpointError, match=f"control {name}=3 is unknown"):
            Vocabulary(SPANS, SHARED | {name: 3}, 4)


def test_the_nearest_size_is_luminas():
    """Against a walk along the border of what fits, each step one row more or one column less."""
    for units in (4, 9, 24, 64):
        controls = SHARED | {f"size_{2 * number}": 3 for number in range(1, 2 * units)}
        vocabulary = Vocabulary(SPANS, controls, 4 * units)
        walked, columns, rows = [], units, 1
        while columns:
            if max(columns, rows) <= 4 * min(columns, rows):
                walked.append((2 * rows, 2 * columns))
            rows, columns = (rows + 1, columns) if (rows + 1) * columns <= units else (rows, columns - 1)
        for width, height in ((640, 480), (100, 100), (300, 900), (77, 1000), (1920, 1080), (512, 500)):
            ratios = [sorted((columns / width, rows / height)) for rows, columns in walked]
            best = max(low / high for low, high in ratios)
            rows, columns = nearest_grid(width, height, vocabulary)
            low, high = sorted((columns / width, rows / height))
            assert (rows, columns) in walked and low / high == pytest.approx(best)
