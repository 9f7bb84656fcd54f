"""``jam.json``: what a version does not know is refused and not passed over."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest

from jam import assets
from jam.cli import main
from jam.decode.options import SamplingOptions
from jam.errors import CheckpointError
from jam.tokens.vocabulary import KEYS, SAMPLING_NAMES, JamFile, Vocabulary
from tests.tiny import edit_json, tiny_pair

SMALL = JamFile(Vocabulary.from_json({"spans": [["control", 0, 3]], "controls": {"eos": 2}, "codes_per_image": 0}))


def test_what_is_written_is_read(tmp_path: Path):
    full = replace(SMALL, image_tokenizer="x", unconditional=("bos",), fusion={"a": 1}, sampling={"image_beams": 4})
    for record in (SMALL, full):
        record.write(tmp_path)
        assert JamFile.read(tmp_path) == record
    assert tuple(json.loads((tmp_path / "jam.json").read_text())) == KEYS


@pytest.mark.parametrize("file", sorted(assets.SHIPPED.rglob("jam.json")), ids=lambda file: file.parent.name)
def test_shipped_files_are_read(file: Path):
    assert JamFile.read(file.parent).vocabulary.size > 0


def test_a_file_without_format_is_read_as_the_present_one(tmp_path: Path):
    SMALL.write(tmp_path)
    raw = json.loads((tmp_path / "jam.json").read_text())
    del raw["format"]
    (tmp_path / "jam.json").write_text(json.dumps(raw))
    assert JamFile.read(tmp_path) == SMALL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samplng": {}}, "unknown key samplng; keys are format, vocabulary, image_tokenizer, unconditional, fusion, "),
        ({"a\n\x1b[2Jb": 1}, r"unknown key 'a\n\x1b[2Jb'; keys are format"),
        ({"version": 2}, "unknown key version; keys are format"),
        ({"format": 2}, "format 2; 1 is read, use the jam that wrote it"),
        ({"format": 2, "more": 1}, "format 2; 1 is read, use the jam that wrote it"),
        ({"format": True}, "format True; 1 is read"),
        ({"format": None}, "format None; 1 is read"),
        ({"format": "1"}, "format '1'; 1 is read"),
        ({"sampling": {"image_beam": 4}}, "sampling names image_beam; names are mode, max_tokens"),
        ({"sampling": []}, "sampling is []; a mapping is required"),
    ],
)
def test_what_it_does_not_know_is_refused_in_one_line(tmp_path: Path, change: dict, message: str):
    SMALL.write(tmp_path)
    edit_json(tmp_path / "jam.json", change)
    with pytest.raises(CheckpointError) as error:
        JamFile.read(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'jam.json'}: {message}") and "\n" not in str(error.value)


def test_the_names_of_sampling_are_those_of_its_options():
    assert tuple(field.name for field in fields(SamplingOptions)) == SAMPLING_NAMES


@pytest.mark.parametrize("more", [["--dry-run"], []], ids=["dry run", "merge"])
@pytest.mark.parametrize(("change", "named"), [({"sampling": {"beams": 4}}, "beams"), ({"turn": []}, "turn")])
def test_a_merge_hands_no_unknown_name_on(tmp_path: Path, change: dict, named: str, more: list[str], capsys):
    text, image = tiny_pair(tmp_path)
    edit_json(image / "jam.json", change)
    arguments = ["--method", "cross", "--text", str(text), "--image", str(image), "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(["merge", *arguments, *more]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert str(image / "jam.json") in said and f" {named}; " in said
    assert not (tmp_path / "out").exists()
