"""Data as users have it: each form and each container to the documents that it means; what is wrong with a row."""

import base64
import csv
import io
import json
import re
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from finetune.data.readers import FORMS, Context, Media, array, read_map, rows_of
from finetune.data.readers.containers import Torn
from jam.document import CodesPart, Document, ImagePart, TextPart
from jam.errors import DataError

COLOURS = ("red", "green", "blue")


@pytest.fixture
def root(tmp_path) -> Path:
    for colour in COLOURS:
        Image.new("RGB", (9, 9), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


def png(colour: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (9, 9), colour).save(stream, "PNG")
    return stream.getvalue()


def read(form: str, source: Path, root: Path | None = None, **local: str) -> list[Document | str]:
    """Every row as its document or its error, as ``finetune.data.rendering`` words it."""
    context, found = Context(Media(root or source.parent, local), 4), []
    for row in rows_of(source):
        try:
            fields = row.fields()
            if fields is not None:
                found.append(FORMS[form](fields, context))
        except DataError as error:
            assert "\n" not in str(error)
            found.append(f"{row.where}: {error}")
    return found


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def seen(document: Document) -> list[tuple[str, object, float]]:
    """Role, text or colour, and loss of every part."""
    assert isinstance(document, Document), document
    found = []
    for part in document.parts:
        if isinstance(part, ImagePart):
            pixel = part.image.getpixel((4, 4))
            value = next(c for c in COLOURS if Image.new("RGB", (1, 1), c).getpixel((0, 0)) == pixel)
        else:
            value = part.text if isinstance(part, TextPart) else part.codes
        found.append((part.role, value, part.loss))
    return found


ASKED = [("user", "red", 0.0), ("user", "What is this?", 0.0), ("assistant", "It is red.", 1.0)]
DRAWN = [("user", "draw", 0.0), ("assistant", "here", 1.0), ("assistant", "green", 1.0)]
ANSWER = {"role": "assistant", "content": "It is red."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image", "path": "red.png"}]},
                    {"role": "user", "content": "What is this?"},
                    ANSWER,
                ]
            },
            ASKED,
        ),
        ({"messages": [{"role": "user", "content": "<image>\nWhat is this?"}, ANSWER], "images": ["red.png"]}, ASKED),
        ({"messages": [{"role": "user", "content": "What is this?"}, ANSWER], "images": ["red.png"]}, ASKED),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "It is red."}]},
                ],
                "images": ["red.png"],
            },
            ASKED,
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [
                            {
                                "type": "image_url",
                                "image_url": {"url": "data:image/png;base64," + base64.b64encode(png("red")).decode()},
                            },
                            {"type": "text", "text": "What is this?"},
                        ],
                    },
                    ANSWER,
                ]
            },
            ASKED,
        ),
        (
            {
                "id": 7,
                "image": "red.png",
                "conversations": [
                    {"from": "human", "value": "<image>\nWhat is this?"},
                    {"from": "gpt", "value": "It is red."},
                ],
            },
            ASKED,
        ),
        (
            {
                "image": ["green.png"],
                "conversations": [{"from": "user", "value": "draw"}, {"from": "gpt", "value": "here <image>"}],
            },
            DRAWN,
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": "draw"},
                    {"role": "assistant", "content": [{"type": "text", "text": "here"}, {"type": "image", "url": "u"}]},
                ]
            },
            DRAWN,
        ),
    ],
    ids=["parts", "tags", "none placed", "trl", "openai", "llava", "sharegpt", "mapped"],
)
def test_messages(root, row, expected):
    (document,) = read("messages", lines(root / "m.jsonl", row), u="green.png")
    assert seen(document) == expected


def test_images_go_to_their_places_in_order(root):
    row = {
        "messages": [
            {"role": "user", "content": "<image> or <image>?"},
            {"role": "assistant", "content": "<image>, this one"},
        ],
        "images": ["red.png", "blue.png", "green.png"],
    }
    (document,) = read("messages", lines(root / "m.jsonl", row))
    assert [value for _, value, _ in seen(document)] == ["red", "or", "blue", "?", "green", ", this one"]


def chat(*contents: object, **more: object) -> dict:
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]} | more


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat("<image> <image>", "x", images=["red.png"]), "2 places for images .* and 1 images"),
        (chat("<image>", "x"), "1 places for images .* and 0 images"),
        (chat("<image>", "x", images=["red.png"], image="red.png"), "'images' and 'image' are both there"),
        (chat("hm", "x", images=[3]), "an image is a int; a path, bytes"),
        (chat("hm"), "no turn of the assistant"),
        (chat("hm", ""), r"messages\[1\]: neither words nor an image"),
        (chat(" \n", "x"), r"messages\[0\]: neither words nor an image"),
        (chat("hm", "x", images=["loop.png"]), "a circle of links"),
        (chat("hm", "x", images=["a" * 5000 + ".png"]), "File name too long"),
        ({"messages": []}, "expected a non-empty list of turns"),
        ({"turns": 1}, "expected a non-empty list of turns"),
        ({"messages": [{"role": "system", "content": "be good"}]}, "the speaker is 'system'; human, user"),
        ({"conversations": [{"from": 3, "value": "x"}]}, "the speaker is '3'"),
        (chat(None, "x"), r"messages\[0\]: expected text or"),
        (chat([{"type": "audio"}], "x"), r"messages\[0\]\.content\[0\]: expected"),
        (chat([{"type": "image", "path": "red.png", "url": "b"}], "x"), "an image by path and url; name it once"),
        (chat("hm", "x", images=["http://a/b.png"]), "downloads nothing"),
        (chat("hm", "x", images=["data:image/png,abc"]), "a data URL that is damaged"),
        (chat("hm", "x", images=["data:image/png;base64,%%"]), "a data URL that is damaged"),
        (chat("hm", "x", images=["data:image/png;base64,AAAA"]), "not a readable PNG, JPEG or WebP"),
        (chat("hm", "x", images=["../red.png"]), "lies outside"),
        (chat("hm", "x", images=["/etc/passwd"]), "lies outside"),
        (chat("hm", "x", images=["link.png"]), "lies outside"),
        (chat("hm", "x", images=["none.png"]), "no such image file"),
        (chat("hm", "x", images=["bomb.png"]), "Mpx"),
    ],
)
def test_bad_messages_are_named_with_file_and_line(root, row, message):
    data = root / "data"
    data.mkdir()
    (root / "red.png").rename(data / "red.png")
    (data / "link.png").symlink_to(root / "blue.png")
    (data / "loop.png").symlink_to("loop.png")
    if "bomb.png" in str(row):
        Image.new("1", (13_000, 13_000)).save(data / "bomb.png")
    good, found = read("messages", lines(data / "m.jsonl", chat("hi", "ho"), row))
    assert isinstance(good, Document)
    assert isinstance(found, str) and found.startswith(f"{data / 'm.jsonl'}:2: ")
    assert re.search(message, found), found


def test_captions_of_every_container(root):
    rows = [(f"{colour}.png", f"a {colour} square") for colour in COLOURS]
    expected = [[("document", caption, 1.0), ("document", name[:-4], 1.0)] for name, caption in rows]
    sources = [lines(root / "c.jsonl", *({"image": name, "caption": caption} for name, caption in rows))]
    for folder, suffix in (("one", "jsonl"), ("two", "csv")):  # image folders
        (root / folder).mkdir()
        for name, _ in rows:
            (root / folder / name).write_bytes((root / name).read_bytes())
        path = root / folder / f"metadata.{suffix}"
        if suffix == "jsonl":
            lines(path, *({"file_name": name, "text": caption} for name, caption in rows))
        else:
            with path.open("w", newline="") as file:
                csv.writer(file).writerows([("file_name", "text"), *rows])
        sources.append(root / folder)
    with tarfile.open(root / "c.tar", "w") as archive:
        for number, (name, caption) in enumerate(rows):
            for suffix, data in (("png", (root / name).read_bytes()), ("txt", caption.encode()), ("json", b"{}")):
                member = tarfile.TarInfo(f"pairs/{number:04d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    sources.append(root / "c.tar")
    table = {"image": [{"bytes": png(colour), "path": None} for colour in COLOURS], "text": [c for _, c in rows]}
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    saved = datasets.Dataset.from_dict(table, features=features)
    saved.to_parquet(root / "c.parquet")
    saved.save_to_disk(root / "saved")
    sources += [root / "c.parquet", root / "saved"]
    for source in sources:
        own = source if source.is_dir() else root
        assert [seen(document) for document in read("captions", source, own)] == expected, source


def test_a_folder_of_parts_is_read_by_name(tmp_path):
    for number in (2, 0, 1):
        lines(tmp_path / f"part-{number}.jsonl", {"text": f"of {number}"})
    assert [d.parts[0].text for d in read("text", tmp_path)] == ["of 0", "of 1", "of 2"]
    (tmp_path / "more.txt").write_text("x\n")
    with pytest.raises(DataError, match=r"files of \.jsonl and \.txt; one of"):
        list(rows_of(tmp_path))


def test_plain_text_is_a_document_a_line(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\n  two\n\xff\nthree")
    found = read("text", tmp_path / "t.txt")
    assert [d.parts[0].text for d in found if isinstance(d, Document)] == ["one", "  two", "three"]
    assert [line for line in found if isinstance(line, str)] == [
        f"{tmp_path}/t.txt:4: not UTF-8 (invalid start byte); save the file as UTF-8"
    ]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_a_json_array_is_read_as_its_lines_are(tmp_path, monkeypatch, indent, chunk):
    monkeypatch.setattr(array, "CHUNK", chunk)
    rows = [{"text": 'a "[{\u00e9\n'}, {"text": "b", "more": [1, {"n": -2.5e3}]}, {"text": "\U0001f600"}]
    path = tmp_path / "llava.json"
    path.write_text("\ufeff\n" + json.dumps(rows, indent=indent, ensure_ascii=False), encoding="utf-8")
    found = list(rows_of(path))
    assert [row.fields() for row in found] == rows
    starts = [2, 2, 2] if indent is None else [3, 6, 15]
    assert [row.where for row in found] == [f"{path}:{line}" for line in starts]


@pytest.mark.parametrize(
    ("text", "good", "message"),
    [
        ("[]", 0, None),
        ('[{"a": 1}', 1, "line 1: found 'the end' where a comma or ] is due"),
        ('[{"a": 1} {"a": 2}]', 1, "line 1: found '{' where"),
        ('[{"a": 1},\n]', 1, "line 2: not valid JSON"),
        ('[{"a": 1},\n{"a": ', 1, "line 2: not valid JSON"),
        ('[{"a": 1}]\n{"a": 2}', 1, "line 2: something follows the array"),
        ("[" * 100_000, 0, "not usable JSON"),
    ],
)
def test_a_torn_json_array_is_one_mistake_and_cannot_be_left_out(tmp_path, text, good, message):
    path = tmp_path / "llava.json"
    path.write_text(text)
    *whole, last = [*rows_of(path), None] if message is None else rows_of(path)
    assert [row.fields() for row in whole] == [{"a": 1}] * good
    if message is not None:
        with pytest.raises(Torn, match=re.escape(message)):
            last.fields()


def test_pages_of_obelics(root):
    row = {"texts": ["before", None, " ", "after"], "images": [None, "http://far/1.png", None, None], "metadata": "[]"}
    (page,) = read("interleaved", lines(root / "o.jsonl", row), **{"http://far/1.png": "blue.png"})
    assert seen(page) == [("document", "before", 1.0), ("document", "blue", 1.0), ("document", "after", 1.0)]


def test_pages_of_mmc4(root):
    infos = [
        {"image_name": "blue.png", "raw_url": "http://x", "matched_text_index": 2, "matched_sim": 0.3},
        {"image_name": "red.png", "raw_url": "http://y", "matched_text_index": 0, "matched_sim": 0.2},
        {"raw_url": "http://z", "matched_text_index": 2},
    ]
    row = {"text_list": ["One.", "Two.", "Three.", "Four."], "image_info": infos, "similarity_matrix": []}
    (page,) = read("interleaved", lines(root / "m.jsonl", row), **{"http://z": "green.png"})
    assert [value for _, value, _ in seen(page)] == ["red", "One. Two.", "blue", "green", "Three. Four."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"texts": ["a"], "images": []}, "of one length"),
        ({"texts": ["a"], "images": ["red.png"]}, "place 0 of 'texts' and 'images': exactly one"),
        ({"texts": [None], "images": [None]}, "place 0 of"),
        ({"texts": [3], "images": [None]}, "place 0 of"),
        ({"texts": [" "], "images": [None]}, "neither text nor images"),
        ({"texts": [None], "images": ["http://far/1.png"]}, "downloads nothing"),
        ({"text_list": ["a", 3], "image_info": []}, "'text_list': expected a list of texts"),
        ({"text_list": ["a"], "image_info": 3}, "'image_info': expected a list"),
        ({"text_list": ["a"], "image_info": [{"image_name": "red.png", "matched_text_index": 1}]}, r"image_info\[0\]"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, r"image_info\[0\]"),
    ],
)
def test_bad_pages(root, row, message):
    (found,) = read("interleaved", lines(root / "p.jsonl", row))
    assert found.startswith(f"{root}/p.jsonl:1: ") and re.search(message, found), found


def test_codes_of_lvm(tmp_path):
    def line(codes: list[int]) -> dict:
        return {"tokens": base64.b64encode(np.array(codes, "<i4").tobytes()).decode()}

    rows = [line(list(range(8))), line([1, 2, 3]), {"tokens": "a"}, {"tokens": "AAA="}, {"tokens": ""}]
    good, *bad = read("codes", lines(tmp_path / "v.jsonl", *rows))
    assert good == Document((CodesPart((0, 1, 2, 3)), CodesPart((4, 5, 6, 7))))
    assert ["3 codes; this model's images have 4" in bad[0], "base64 of int32" in bad[1], "2 bytes" in bad[2]] == [
        True
    ] * 3
    assert "'tokens' is missing" in bad[3]


def archive_of(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for member, data in members:
            member.size = len(data) if member.isfile() else 0
            archive.addfile(member, io.BytesIO(data))
    return path


def test_members_of_an_archive_are_validated(tmp_path):
    def info(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, "/etc/passwd"
        return member

    source = archive_of(
        tmp_path / "c.tar",
        *((info("ok.png"), png("red")), (info("ok.txt"), b"fine")),
        *((info("../up.png"), png("red")), (info("../up.txt"), b"x")),
        *((info("link.png", tarfile.SYMTYPE), b""), (info("link.txt"), b"x")),
        *((info("big.png"), b"0" * 20_000_001), (info("big.txt"), b"x")),
        *((info("two.txt"), b"x"), (info("two.txt"), b"y"), (info("two.png"), png("red"))),
        *((info("both.jpg"), png("red")), (info("both.png"), png("red")), (info("both.txt"), b"x")),
        *((info("latin.png"), png("red")), (info("latin.txt"), b"\xe9")),
        *((info("torn.png"), png("red")[:40]), (info("torn.txt"), b"x")),
        *((info("alone.png"), png("red")),),
        *((info("text.txt"), b"no picture"),),
    )
    good, *bad = read("captions", source)
    assert seen(good)[1][1] == "red"
    expected = [
        "leads out",
        "a link or device",
        "at most",
        "two members .txt",
        "beside one .jpg",
        "not UTF-8",
        "not a readable PNG",
    ]
    expected += ["'caption' or 'text' or 'txt' is missing", "no image; one of"]
    names = ["../up", "link", "big", "two", "both", "latin", "torn", "alone", "text"]
    assert len(bad) == len(expected)
    for line, name, message in zip(bad, names, expected, strict=True):
        assert line.startswith(f"{source}:{name}: ") and message in line, line


def test_a_torn_archive_a_torn_table_and_a_bad_csv_end_in_one_line(tmp_path, root):
    member = tarfile.TarInfo("a.txt")
    path = archive_of(tmp_path / "t.tar", (member, b"x" * 2000))
    path.write_bytes(path.read_bytes()[:1500])
    assert "not a readable tar from here on" in read("captions", path)[-1]
    (tmp_path / "no.tar").write_bytes(b"hello")
    assert "not a readable tar" in read("captions", tmp_path / "no.tar")[0]
    (tmp_path / "t.parquet").write_bytes(b"PAR1 nothing")
    assert read("text", tmp_path / "t.parquet")[0].startswith(f"{tmp_path}/t.parquet:row 1: not readable parquet")
    (tmp_path / "c.csv").write_text("image,caption\nred.png,fine\nred.png\nred.png,a,b\n")
    good, *bad = read("captions", tmp_path / "c.csv")
    assert isinstance(good, Document) and [line.split(":")[1] for line in bad] == ["3", "4"]
    (tmp_path / "l.csv").write_bytes(b"text\nfine\ncaf\xe9\n")
    assert "not readable CSV" in read("text", tmp_path / "l.csv")[-1]
    saved = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(saved)
    next(saved.glob("*.arrow")).write_bytes(b"torn")
    assert "not a readable data set" in read("text", saved)[-1]


def test_splits_and_unknown_files_are_refused(tmp_path):
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(tmp_path / "all")
    with pytest.raises(DataError, match=r"splits \(train\)"):
        list(rows_of(tmp_path / "all"))
    (tmp_path / "data.xml").touch()
    (tmp_path / "none").mkdir()
    for name, message in (("data.xml", r"\.xml is not read"), ("none", "no known kind"), ("gone", "no such file")):
        with pytest.raises(DataError, match=message):
            list(rows_of(tmp_path / name))


def test_images_stored_as_paths_stay_under_the_root(tmp_path, root):
    (tmp_path / "sub").mkdir()
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = {"image": [{"bytes": None, "path": str(root / "red.png")}], "text": ["x"]}
    datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "sub/c.parquet")
    (found,) = read("captions", tmp_path / "sub/c.parquet")
    assert "c.parquet:row 1: image " in found and "lies outside" in found


def test_an_image_map_is_checked(tmp_path):
    good = lines(tmp_path / "map.jsonl", {"url": "http://a", "path": "a.png", "status": "success"})
    assert read_map(good) == {"http://a": "a.png"}
    with pytest.raises(DataError, match=r"map\.jsonl:2: expected"):
        read_map(lines(tmp_path / "map.jsonl", {"url": "a", "path": "b"}, {"url": "a"}))
    with pytest.raises(DataError, match="no such image map"):
        read_map(tmp_path / "none")


def test_a_call_of_a_tool_is_no_reply(tmp_path):
    said = {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}
    (found,) = read("messages", lines(tmp_path / "m.jsonl", {"messages": [{"role": "user", "content": "hm"}, said]}))
    assert "m.jsonl:1: messages[1]: tool_calls" in found


def test_what_is_named_twice_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "text": "b"}\n')
    (tmp_path / "a.csv").write_text("text,text\na,b\n")
    parquet.write_table(pyarrow.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    for name, message in (("jsonl", "key 'text' is there twice"), ("csv", "two columns"), ("parquet", "two columns")):
        (found,) = read("text", tmp_path / f"a.{name}")
        assert message in found, found


def test_a_table_with_values_that_python_has_not_is_torn(tmp_path):
    offsets = pyarrow.py_buffer(np.array([0, 2], "<i4").tobytes())
    bytes_ = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, pyarrow.py_buffer(b"\xff\xfe")])
    late = pyarrow.array([2**31 - 1], pyarrow.date32())
    for column in (bytes_, late):
        parquet.write_table(pyarrow.table({"text": ["a"], "other": column}), tmp_path / "a.parquet")
        (found,) = read("text", tmp_path / "a.parquet")
        assert "a.parquet:row 1: not readable parquet" in found
