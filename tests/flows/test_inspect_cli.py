"""``jam inspect``: what a folder is, and what two could become, from headers alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from jam.checkpoint import WEIGHTS
from jam.cli import main
from tests.tiny import edit_json, tiny_pair

ROOT = Path(__file__).parents[2]


def inspect(capsys: pytest.CaptureFixture[str], *paths: Path) -> str:
    capsys.readouterr()
    assert main(["inspect", *map(str, paths)]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_one_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, image = tiny_pair(tmp_path, text_family="llama")
    found = inspect(capsys, image)
    assert "family opt (OPTForCausalLM)" in found and "4 layers, width 32, 4 heads of 8, feed-forward 64" in found
    assert "control [0, 8), text [8, 288), image [288, 304)" in found and "begin_image 5" in found
    assert "50,752 in 26 tensors" in found and "float32" in found and "4 codes of 16, 8 px" in found
    found = inspect(capsys, text)
    assert "4 heads of 8 (2 key/value)" in found and "images none" in found


def test_a_fused_folder_without_its_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, image = tiny_pair(tmp_path)
    (image / "config.json").write_text('{"model_type": "jam_cross"}')
    capsys.readouterr()
    assert main(["inspect", str(image)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {image}/config.json: no text_config; ")
    (image / "config.json").write_text(
        '{"model_type": "jam_cross", "text_config": 3, "image_config": 3, "exchanges": "x", "tables": "separate"}'
    )
    assert main(["inspect", str(image)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {image}/config.json: no jam_cross configuration (")


def test_a_fused_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, image = tiny_pair(tmp_path, text_family="llama")
    arguments = ["--text", str(text), "--image", str(image), "--out", str(tmp_path / "out")]
    assert main(["merge", "--method", "cross", *arguments]) == 0
    found = inspect(capsys, tmp_path / "out")
    assert "jam_cross" in found and "after layers 2|2, 4|4" in found and "bfloat16" in found
    assert "fused by method cross, text llama, image opt" in found
    assert "context 256 positions, the fewer of both towers" in found and "turns user and assistant controls" in found
    assert "cross yes" in (pair := inspect(capsys, text, image)) and "parameters; context 256 positions; " in pair


def test_an_image_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    _, image = tiny_pair(tmp_path)
    found = inspect(capsys, image / "image_tokenizer")
    assert "image tokenizer 4 codes of 16, 8 px; give it to --image-tokenizer" in found and "parent" not in found
    (image / "image_tokenizer" / "config.json").write_text('{"model_type": "vqgan"}')
    assert main(["inspect", str(image / "image_tokenizer")]) == 2
    assert "no sizes of a vqgan network" in capsys.readouterr().err


def test_two_that_fit_by_every_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, image = tiny_pair(tmp_path)
    for paths in ((text, image), (image, text)):  # the order does not matter: one makes images
        found = inspect(capsys, *paths)
        assert f"text parent {text} image parent {image}" in found
        assert "uniform yes, 50,752 parameters" in found and "width yes, 167,040 parameters" in found
        assert "cross yes, 151,044 parameters" in found and "the diagonal blocks are the parents" in found


@pytest.mark.parametrize(
    ("changes", "uniform", "width"),
    [
        ({"image_family": "llama"}, "no: the parents are opt and llama", "no: the parents are opt and llama"),
        (
            {"image_hidden_size": 64, "image_num_attention_heads": 8},
            "no: tensor model.decoder.embed_positions.weight is [258, 32]",
            "yes with width.off_diagonal=zero",
        ),
        ({"image_num_hidden_layers": 6}, "no: layers is 4", "no: layers is 4"),
    ],
)
def test_two_that_fit_by_some(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict, uniform: str, width: str
):
    found = inspect(capsys, *tiny_pair(tmp_path, **changes))
    assert f"uniform {uniform}" in found and f"width {width}" in found and "cross yes" in found


def test_two_without_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, _ = tiny_pair(tmp_path)
    assert "has no image ids; use an image-text model" in inspect(capsys, text, text)


def test_reads_no_weights_and_no_torch(tmp_path: Path):
    """Weights are replaced by a hole in the file: headers are all that is left to read."""
    text, image = tiny_pair(tmp_path)
    for folder in (text, image):
        whole = (folder / WEIGHTS).read_bytes()
        header = 8 + int.from_bytes(whole[:8], "little")
        with (folder / WEIGHTS).open("wb") as file:
            file.write(whole[:header] + b"\xff" * (len(whole) - header))  # NaN everywhere
    program = (
        "import sys; from jam.cli import main; code = main(sys.argv[1:]); "
        "sys.exit(code or bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program, "inspect", str(text), str(image)], cwd=ROOT)
    assert done.returncode == 0


def test_a_folder_without_jam_json_or_of_another_family_is_still_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text, image = tiny_pair(tmp_path)
    (text / "jam.json").unlink()
    assert "text [8, 288)" in inspect(capsys, text)
    (text / "tokenizer.json").unlink()
    assert "neither jam.json nor tokenizer.json" in inspect(capsys, text)
    config = (image / "config.json").read_text()
    (image / "config.json").write_text(config.replace('"model_type": "opt"', '"model_type": "mamba"'))
    assert "mamba, which cannot be a parent; known families are opt, llama" in inspect(capsys, image)


def test_bad_folders_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text, image = tiny_pair(tmp_path)
    (image / WEIGHTS).write_bytes((image / WEIGHTS).read_bytes()[:-9])
    for paths, message in (([tmp_path / "nowhere"], "no such folder"), ([text, image], "truncated")):
        capsys.readouterr()
        assert main(["inspect", *map(str, paths)]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and not printed.out and len(printed.err.strip().splitlines()) == 1


ODD = "\x1b[2J\nerror: forged"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("jam.json", {"vocabulary.controls": {ODD: 1}}),
        ("jam.json", {"image_tokenizer": ODD}),
        ("config.json", {"model_type": ODD}),
        ("tokenizer.json", {"version": ODD}),
        ("config.json", {"hidden_size": [0] * 10_000}),
    ],
)
def test_what_a_file_says_steers_no_terminal_and_forges_no_error(tmp_path: Path, file: str, change: dict, capsys):
    _, image = tiny_pair(tmp_path)
    edit_json(image / file, change)
    capsys.readouterr()
    code = main(["inspect", str(image)])
    said = capsys.readouterr()
    lines = said.err.splitlines() + said.out.splitlines()
    assert code in (0, 2) and lines and not [line for line in lines if line.startswith("error: forged")]
    assert "\x1b" not in said.err + said.out and max(map(len, lines)) < 2100
    assert code == 0 or len(said.err.splitlines()) == 1
