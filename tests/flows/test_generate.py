"""`jam generate` on a tiny fused folder: random replies, real files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from jam.cli import main
from jam.document import TextPart
from jam.generate import user_turn
from jam.tokens.image import open_image
from jam.tokens.vq import VQModel
from tests.tiny import VQ, edit_json

SHORT = ["--max-tokens", "40"]


def reply(out: Path) -> list[dict]:
    return json.loads((out / "out.json").read_text())


def test_generate_writes_images_in_order(fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "reply"
    arguments = ["--out", str(out), "--mode", "image", "--max-images", "2", *SHORT]
    assert main(["generate", str(fused), "--prompt", "draw a cat", *arguments]) == 0
    entries = reply(out)
    assert [entry["type"] for entry in entries] in (["image"], ["image", "image"])
    assert {path.name for path in out.iterdir()} == {"out.json", *(entry["path"] for entry in entries)}
    assert open_image(out / "image-0.png").size == (8, 8)
    assert f"{out / 'out.json'}: 0 texts, {len(entries)} images" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("rank", ["likelihood", "ratio"])
def test_generate_ranks_candidates(fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: str) -> None:
    out = tmp_path / "reply"
    more = ["--candidates", "4", "--rank", rank, "--out", str(out), *SHORT]
    assert main(["generate", str(fused), "--prompt", "draw a cat", *more]) == 0
    entries = reply(out)
    scores = [entry["score"] for entry in entries]
    assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
    assert sorted(entry["guidance"] for entry in entries) == ["cd_k", "cd_k", "cfg", "cfg"]
    assert [entry["path"] for entry in entries] == [f"image-{number}.png" for number in range(4)]
    assert all((out / entry["path"]).is_file() for entry in entries)
    assert f"4 images, best first by the model's own {rank}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--device", "cuda:7"], "device is cuda:7 and PyTorch sees"),
        (["--device", "tpu"], "device is 'tpu'; required: auto, cpu, cuda or cuda:N"),
    ],
)
def test_generate_refuses_a_device(
    fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["generate", str(fused), "--prompt", "a", "--out", str(tmp_path / "reply"), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_generate_in_half_precision(fused: Path, tmp_path: Path) -> None:
    more = ["--device", "cpu", "--dtype", "bfloat16", "--mode", "image", "--out", str(tmp_path / "reply")]
    assert main(["generate", str(fused), "--prompt", "draw a cat", *more]) == 0
    assert open_image(tmp_path / "reply" / "image-0.png").size == (8, 8)


def test_generate_compiled_says_the_same(fused: Path, tmp_path: Path) -> None:
    same = ["--prompt", "draw a cat", "--mode", "image", "--image-temperature", "0"]
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        assert main(["generate", str(fused), *same, "--out", str(tmp_path / name), *flags]) == 0
    one, other = (open_image(tmp_path / name / "image-0.png").tobytes() for name in ("plain", "compiled"))
    assert one == other


def test_candidates_are_images(fused: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--candidates", "4", "--mode", "text", "--out", str(tmp_path / "reply")]
    assert main(["generate", str(fused), "--prompt", "draw a cat", *more]) == 2
    error = capsys.readouterr().err
    assert "mode is text and candidates is 4" in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_generate_stops_before_a_string_and_takes_every_setting(fused: Path, tmp_path: Path) -> None:
    settings = ["--mode", "free", "--guidance", "cd_k", "--image-top-k", "5", "--repetition-penalty", "1.2"]
    every = [flag for letter in "abcdefghijklmnopqrstuvwxyz " for flag in ("--stop", letter)]
    for name, stops in (("whole", []), ("cut", every)):
        more = ["--out", str(tmp_path / name), *settings, *stops, *SHORT]
        assert main(["generate", str(fused), "--prompt", "say it", *more]) == 0
    said = ["".join(part.get("text", "") for part in reply(tmp_path / name)) for name in ("whole", "cut")]
    assert len(said[1]) < len(said[0]) and not set(said[1]) & set("abcdefghijklmnopqrstuvwxyz ")


def test_generate_text_mode_is_text(fused: Path, tmp_path: Path) -> None:
    assert main(["generate", str(fused), "--prompt", "hi", "--out", str(tmp_path / "a"), "--mode", "text", *SHORT]) == 0
    assert {entry["type"] for entry in reply(tmp_path / "a")} <= {"text"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out.json"]


def test_generate_same_seed_same_bytes_other_seed_other_text(fused: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        out = ["--out", str(tmp_path / name), "--seed", seed]
        assert (
            main(["generate", str(fused), "--prompt", "go", *out, "--mode", "text", "--temperature", "1", *SHORT]) == 0
        )
    assert reply(tmp_path / "a") == reply(tmp_path / "b") != reply(tmp_path / "c")


def test_generate_reads_images_and_empty_folders_are_fine(fused: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    prompt = ["--prompt", "what is <image>?", "--image", str(picture)]
    assert main(["generate", str(fused), *prompt, "--out", str(out), *SHORT]) == 0
    assert (out / "out.json").exists()


def test_generate_fills_a_hole_and_writes_the_whole(fused: Path, picture: Path, tmp_path: Path) -> None:
    """Text around a hole in text, a given image as it was given, an image in the hole's place."""
    arguments = ["--prompt", "A small <mask> on white <image>", "--image", str(picture), "--temperature", "1", *SHORT]
    assert main(["generate", str(fused), *arguments, "--out", str(tmp_path / "text")]) == 0
    text, image = reply(tmp_path / "text")
    assert text["text"].startswith("A small") and text["text"].endswith(" on white")
    assert "<mask>" not in text["text"] and len(text["text"]) > len("A small on white")
    assert open_image(tmp_path / "text" / image["path"]).tobytes() == open_image(picture).tobytes()
    arguments = ["--prompt", "<mask> a red dot", "--mode", "image", *SHORT]
    assert main(["generate", str(fused), *arguments, "--out", str(tmp_path / "image")]) == 0
    image, text = reply(tmp_path / "image")
    assert text == {"type": "text", "text": "a red dot"}
    assert open_image(tmp_path / "image" / image["path"]).size == (8, 8)
    assert main(["generate", str(fused), *arguments, "--candidates", "2", "--out", str(tmp_path / "some")]) == 0
    assert [entry["type"] for entry in reply(tmp_path / "some")] == ["image", "image"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "a <mask> or a <mask>"], ["2 holes", "one is filled"]),
        (["--prompt", "a <mask>", "--mode", "image", "--max-tokens", "4"], ["max_tokens is 4", "needs 5"]),
        (["--prompt", "x" * 300], ["303", "256", "shorten the prompt"]),
        (["--prompt", "x", "--image", "missing.png"], ["missing.png", "no such image"]),
        (["--prompt", "<image> and <image>", "--image", "PICTURE"], ["2 <image> markers", "1 images"]),
        (["--prompt", "  "], ["prompt is empty"]),
        (["--prompt", "x", "--mode", "image", "--max-tokens", "5"], ["max_tokens is 5", "needs 7"]),
        (["--prompt", "x", "--mode", "image", "--max-images", "0"], ["max_images 0"]),
        (["--prompt", "x", "--top-p", "0"], ["text_top_p is 0", "above 0"]),
        (["--prompt", "x", "--temperature", "1e-320"], ["text_temperature is 1e-320", "from 0.0001"]),
        (["--prompt", "x", "--guidance-scale", "1e308"], ["guidance_scale is 1e+308", "0 to 1000"]),
        (["--prompt", "x\udcff"], ["not UTF-8 at character 1"]),
        (["--prompt", "x", "--rank", "ratio"], ["rank is ratio and no number of candidates"]),
        (["--prompt", "x", "--temperature", "1e39"], ["text_temperature is 1e+39", "to 1000"]),
    ],
)
def test_generate_refuses_in_one_line_and_writes_nothing(
    fused: Path,
    picture: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: list[str],
) -> None:
    arguments = [str(picture) if argument == "PICTURE" else argument for argument in arguments]
    assert main(["generate", str(fused), *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and all(word in error for word in words)
    assert list(tmp_path.iterdir()) == [picture]


def test_generate_refuses_a_folder_in_use_before_loading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The model does not even exist: the folder is checked first, so that no minute is lost."""
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["generate", "nowhere", "--prompt", "x", "--out", str(tmp_path)]) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_generate_refuses_images_for_a_text_model(
    parents: tuple[Path, Path], picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompt", "x", "--image", str(picture), "--out", str(tmp_path / "out")]
    assert main(["generate", str(parents[0]), *arguments]) == 2
    assert "no image tokenizer" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["interleaved", "image"])
def test_generate_refuses_a_hole_for_a_text_model(
    parents: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    arguments = ["--prompt", "a <mask>", "--mode", mode, "--out", str(tmp_path / "out")]
    assert main(["generate", str(parents[0]), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the prompt has a hole" in error and "no 'mask' control" in error and "CM3" in error


def test_a_mask_in_a_conversation_is_text() -> None:
    (said,) = user_turn("what is a <mask>?", [])
    assert said == TextPart("what is a <mask>?", "user", 0.0)


def test_generate_of_a_model_whose_image_tokenizer_only_reads(
    parents: tuple[Path, Path], picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says before it draws anything that there would be no pixels, and reads images all the same."""
    model = tmp_path / "model"
    shutil.copytree(parents[1], model)
    VQModel(replace(VQ, decoder=False)).save(model / "image_tokenizer")
    arguments = ["--prompt", "x", "--image", str(picture), "--out", str(tmp_path / "out"), *SHORT]
    assert main(["generate", str(model), *arguments]) == 2
    error = capsys.readouterr().err
    assert "encoder only" in error and "jam convert vqgan.ckpt" in error and "mode text" in error
    assert main(["generate", str(model), *arguments, "--mode", "text"]) == 0


def test_generate_continues_a_text_model(parents: tuple[Path, Path], tmp_path: Path) -> None:
    """A model without role controls goes on with the prompt as a plain document."""
    assert main(["generate", str(parents[0]), "--prompt", "the", "--out", str(tmp_path / "out"), *SHORT]) == 0
    assert {entry["type"] for entry in reply(tmp_path / "out")} <= {"text"}


def test_a_killed_writer_leaves_no_folder(fused: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("jam.generate.json.dumps", fail)
    arguments = ["--mode", "text", "--out", str(tmp_path / "out"), *SHORT]
    assert main(["generate", str(fused), "--prompt", "x", *arguments]) == 130
    assert list(tmp_path.iterdir()) == []


def test_generate_takes_the_mode_of_the_model(fused: Path, tmp_path: Path) -> None:
    """What is not said comes from jam.json; the flag's own default must not speak over it."""
    own = shutil.copytree(fused, tmp_path / "own")
    edit_json(own / "jam.json", {"sampling": {"mode": "image", "max_images": 1}})
    assert main(["generate", str(own), "--prompt", "draw", "--out", str(tmp_path / "reply")]) == 0
    assert [entry["type"] for entry in reply(tmp_path / "reply")] == ["image"]
