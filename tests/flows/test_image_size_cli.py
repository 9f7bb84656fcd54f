"""`--image-size` through the doors, on a tiny model whose images carry their size."""

import json
from pathlib import Path

import pytest
from PIL import Image

from jam.cli import main
from jam.tokens.image import open_image
from tests.tiny import edit_json, tiny_pair
from tests.tiny_framed import framed_parent

SIZED = ["--image-size", "6x10", "--guidance-scale", "1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = framed_parent(tmp_path_factory.mktemp("framed") / "model", "text")
    edit_json(folder / "jam.json", {"sampling": {"min_images": 1, "max_images": 1, "max_tokens": 60}})
    return folder


def test_generate_reads_and_draws_at_sizes(model: Path, tmp_path: Path) -> None:
    Image.effect_noise((40, 20), 90).convert("RGB").save(tmp_path / "wide.png")
    seen = ["--prompt", "this: <image>", "--image", str(tmp_path / "wide.png")]
    assert main(["generate", str(model), *seen, "--out", str(tmp_path / "out"), *SIZED]) == 0
    entries = json.loads((tmp_path / "out/out.json").read_text())
    assert [entry["path"] for entry in entries if entry["type"] == "image"] == ["image-0.png"]
    assert open_image(tmp_path / "out/image-0.png").size == (6, 10)
    more = ["--candidates", "3", "--out", str(tmp_path / "several"), "--image-size", "8x4"]
    assert main(["generate", str(model), "--prompt", "a cat", *more]) == 0
    assert {open_image(path).size for path in (tmp_path / "several").glob("*.png")} == {(8, 4)}


def test_chat_keeps_the_size_of_what_it_drew(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["draw a cat", "another", "/save", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", str(model), "--out", str(tmp_path), *SIZED]) == 0
    assert "error" not in capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    said = json.loads((folder / "chat.json").read_text())
    images = [part for message in said for part in message["content"] if part["type"] == "image"]
    assert [(part["grid"], len(part["codes"])) for part in images] == [([5, 3], 15)] * 2
    assert open_image(folder / "image-1.png").size == (6, 10)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ("7x10", "multiples of 2 px"),
        ("40x40", "400 codes, and the model's context is 256"),
        ("0x0", "required: WIDTHxHEIGHT in pixels"),
        ("large", "required: WIDTHxHEIGHT in pixels"),
    ],
)
def test_a_size_that_cannot_be_is_one_line(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, words: str
) -> None:
    asked = ["--image-size", size, "--out", str(tmp_path / "out")]
    assert main(["generate", str(model), "--prompt", "a cat", *asked]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_model_of_squares_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    square = tiny_pair(tmp_path)[1]
    asked = ["--image-size", "16x8", "--out", str(tmp_path / "out")]
    assert main(["generate", str(square), "--prompt", "a cat", *asked]) == 2
    assert "this model's images are all 8x8; leave it out" in capsys.readouterr().err
