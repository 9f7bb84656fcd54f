"""``jam merge`` as users run it: every method, every bad input as one line and exit code 2, kills at any point."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as torch_save_file

import merge.stream
from jam.checkpoint import INDEX, WEIGHTS, open_checkpoint
from jam.cli import main
from jam.recipe import load_recipe
from merge.recipe import MergeRecipe
from merge.run import METHODS
from tests.tiny import tiny_pair

ROOT = Path(__file__).parents[2]
FC1 = "model.decoder.layers.0.fc1.weight"


@pytest.fixture(scope="module")
def built_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    tiny_pair(folder)
    return folder


@pytest.fixture
def pair(tmp_path: Path, built_pair: Path) -> tuple[Path, Path]:
    shutil.copytree(built_pair, tmp_path / "parents")
    return tmp_path / "parents" / "text", tmp_path / "parents" / "image"


def command(pair: tuple[Path, Path], out: Path, method: str, *more: str) -> list[str]:
    return ["merge", "--method", method, "--text", str(pair[0]), "--image", str(pair[1]), "--out", str(out), *more]


@pytest.mark.parametrize("method", METHODS)
def test_merges_and_leaves_the_recipe_that_makes_it_again(tmp_path: Path, pair: tuple[Path, Path], method: str):
    out = tmp_path / "out"
    (pair[0] / "chat_template.jinja").write_text("{{ messages }}")
    assert main(command(pair, out, method, "seed=4")) == 0
    assert main(["merge", str(out / "merge.yaml"), f"out={tmp_path / 'again'}"]) == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    recipe = load_recipe(out / "merge.yaml", MergeRecipe)
    assert (recipe.method, recipe.seed, recipe.dtype) == (method, 4, "bfloat16")
    names = {"config.json", "generation_config.json", "jam.json", "merge.yaml", "report.json", "README.md", WEIGHTS}
    assert names | {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "image_tokenizer"} == {
        file.name for file in out.iterdir()
    }


def test_another_image_tokenizer_may_be_named(tmp_path: Path, pair: tuple[Path, Path], capsys):
    given = tmp_path / "given"
    shutil.copytree(pair[1] / "image_tokenizer", given)
    (given / "notes.txt").write_text("sharpened")
    assert main(command(pair, tmp_path / "out", "cross", "--image-tokenizer", str(given))) == 0
    assert (tmp_path / "out/image_tokenizer/notes.txt").read_text() == "sharpened"
    assert json.loads((tmp_path / "out/report.json").read_text())["image_tokenizer"] == "given, as the recipe says"
    capsys.readouterr()
    assert main(command(pair, tmp_path / "none", "cross", "--image-tokenizer", str(pair[0]))) == 2
    assert "no tensor quantize.embedding.weight" in capsys.readouterr().err
    assert main(command(pair, given / "out", "cross", "--image-tokenizer", str(given))) == 2
    assert "lies inside the image tokenizer" in capsys.readouterr().err
    assert main(command(pair, tmp_path / "none", "cross", "--image-tokenizer", str(tmp_path / "none"))) == 2
    assert "no config.json; a folder with an image tokenizer is required" in capsys.readouterr().err


def test_merging_loads_no_torch(tmp_path: Path, pair: tuple[Path, Path]):
    program = (
        "import sys; from jam.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers'} & set(sys.modules); sys.exit(code or bool(heavy))"
    )
    for method in METHODS:
        arguments = command(pair, tmp_path / method, method)
        assert subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT).returncode == 0


def test_dry_run_prints_every_tensor_and_row_and_writes_nothing(
    tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    assert main(command(pair, tmp_path / "out", "cross", "--dry-run")) == 0
    printed = capsys.readouterr().out
    assert f"text.{FC1} [64, 32] = 2,048: copied from text {FC1}" in printed
    assert "cross.1.image.gate [1] = 1: new: 0 everywhere" in printed
    assert "[5, 6): foreign: text eos row" in printed and "151,044 parameters" in printed
    assert not (tmp_path / "out").exists()


def edit_config(folder: Path, **changes: object) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | changes))


def poison(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors[FC1][3, 5] = tensors[FC1][0, 0] = float("nan")
    save_file(tensors, folder / WEIGHTS)


def split_and_lose(folder: Path) -> None:
    names = sorted(load_file(folder / WEIGHTS))
    mapping = {name: f"model-0000{1 + (at > 5)}-of-00002.safetensors" for at, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"weight_map": mapping}))
    (folder / WEIGHTS).rename(folder / "model-00001-of-00002.safetensors")


def pack(folder: Path, dtype: type) -> None:
    """One weight as packed integers, as quantised checkpoints have it."""
    tensors = load_file(folder / WEIGHTS)
    tensors[FC1] = tensors[FC1].astype(dtype)
    save_file(tensors, folder / WEIGHTS)


def as_float8(folder: Path) -> None:
    tensors = {name: torch.from_numpy(tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    tensors[FC1] = tensors[FC1].to(torch.float8_e4m3fn)
    torch_save_file(tensors, folder / WEIGHTS)


def leak(folder: Path) -> None:
    """A side file that is a link to a file of this machine."""
    secret = folder.parent / "secret"
    secret.write_text("{{ secret }}")
    (folder / "chat_template.jinja").symlink_to(secret)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"neither {WEIGHTS}"),
    "lost shard": (split_and_lose, "1 of 2 shards are missing"),
    "cut shard": (lambda f: cut(f / WEIGHTS), "truncated"),
    "NaN": (poison, f"tensor {FC1} has 2 of 2048 values that are NaN or infinite"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json"),
    "bad tokenizer": (lambda f: cut(f / "tokenizer.json"), "cannot be read as JSON"),
    "no jam.json, no tokenizer": (
        lambda f: [(f / name).unlink() for name in ("jam.json", "tokenizer.json")],
        "neither jam.json nor tokenizer.json",
    ),
    "family": (lambda f: edit_config(f, model_type="mamba"), "known families are opt, llama"),
    "int8": (lambda f: pack(f, np.int8), f"tensor {FC1} is I8: the weights are quantised"),
    "int32": (lambda f: pack(f, np.int32), f"tensor {FC1} is I32: the weights are quantised"),
    "float8": (as_float8, f"tensor {FC1} is F8_E4M3: the weights are quantised"),
    "quantised": (
        lambda f: edit_config(f, quantization_config={"quant_method": "fp8"}),
        "config.json has a quantization_config",
    ),
    "link": (leak, "outside of the checkpoint's folder"),
    "config lies": (lambda f: edit_config(f, ffn_dim=128), "is [64, 32], config.json asks for [128, 32]"),
}


CASES = [(name, "cross") for name in BAD_FOLDERS] + [("NaN", "uniform"), ("NaN", "width"), ("bad tokenizer", "width")]


@pytest.mark.parametrize(("name", "method"), CASES)
@pytest.mark.parametrize("side", [0, 1])
def test_a_bad_parent_is_one_line_and_leaves_nothing(
    tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], name: str, side: int, method: str
):
    spoil, message = BAD_FOLDERS[name]
    spoil(pair[side])
    assert main(command(pair, tmp_path / "out", method)) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("error: ") and message in printed and str(pair[side]) in printed
    assert [path.name for path in tmp_path.iterdir()] == ["parents"]


@pytest.mark.parametrize(
    ("method", "changes", "messages"),
    [
        ("uniform", {"image_hidden_size": 48}, ["embed_positions", "use --method cross"]),
        ("uniform", {"image_ffn_dim": 128}, [FC1, "[64, 32] in the text parent and [128, 32]", "use --method cross"]),
        ("uniform", {"image_num_attention_heads": 8}, ["head_dim is 8 in the text parent and 4", "use --method cross"]),
        ("uniform", {"image_num_hidden_layers": 6}, ["layers is 4 in the text parent and 6", "use --method cross"]),
        ("uniform", {"image_max_position_embeddings": 128}, ["embed_positions", "use --method cross"]),
        ("width", {"image_max_position_embeddings": 128}, ["positions are 258 and 130", "use --method cross"]),
        ("width", {"image_ffn_dim": 128}, [FC1, "width.off_diagonal=zero does not", "use --method cross"]),
        ("width", {"image_family": "llama"}, ["opt and llama; one family is required", "use --method cross"]),
        ("width", {"image_enable_bias": True}, ["enable_bias is False in the text parent and True", "--method cross"]),
    ],
)
def test_parents_that_do_not_fit_are_told_what_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, changes: dict, messages: list[str]
):
    pair = tiny_pair(tmp_path / "parents", **changes)
    assert main(command(pair, tmp_path / "out", method)) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith(f"error: {method} merge: ") and all(message in printed for message in messages), printed
    assert not (tmp_path / "out").exists()


def test_unequal_widths_merge_by_zero_blocks_as_promised(tmp_path: Path):
    pair = tiny_pair(tmp_path, image_hidden_size=48, image_num_attention_heads=6, image_ffn_dim=96)
    assert main(command(pair, tmp_path / "out", "width", "width.off_diagonal=zero")) == 0
    merged = load_file_shapes(tmp_path / "out")
    assert merged[FC1] == (160, 80) and merged["model.decoder.embed_tokens.weight"] == (304, 80)


def load_file_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in open_checkpoint(folder).tensors.items()}


def test_an_output_that_is_not_empty_is_kept(
    tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("x")
    assert main(command(pair, out, "uniform")) == 2
    assert "the output folder is not empty (it holds mine.txt)" in capsys.readouterr().err
    assert [file.name for file in out.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("weight", ["1.5", "half", "-1"])
def test_a_bad_setting_is_named(
    tmp_path: Path, pair: tuple[Path, Path], weight: str, capsys: pytest.CaptureFixture[str]
):
    assert main(command(pair, tmp_path / "out", "uniform", f"uniform.weight={weight}")) == 2
    assert "uniform.weight" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_values_that_overflow_the_output_type_are_refused(
    tmp_path: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    tensors = load_file(pair[0] / WEIGHTS)
    tensors[FC1][0, 0] = tensors[FC1][63, 31] = 1e6  # in two blocks
    monkeypatch.setattr(merge.stream, "BLOCK", 100)
    save_file(tensors, pair[0] / WEIGHTS)
    assert main(command(pair, tmp_path / "out", "cross", "dtype=float16")) == 2
    assert f"text.{FC1}: 2 of 2048 values overflow F16; choose dtype=bfloat16 or float32" in capsys.readouterr().err
    assert main(command(pair, tmp_path / "out", "cross", "dtype=bfloat16")) == 0


class Free(NamedTuple):
    """What ``disk_usage`` returns, as far as it is used."""

    free: int


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("believed_free", [None, 1 << 40], ids=["seen before", "met while writing"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    small_disk: Path,
    pair: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    believed_free: int | None,
):
    if believed_free is not None:
        monkeypatch.setattr("jam.shards.shutil.disk_usage", lambda path: Free(believed_free))
    assert main(command(pair, small_disk / "out", "cross")) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    said = "disk full" if believed_free is None else "No space left on device"
    assert len(printed) == 1 and printed[0].startswith("error: ") and said in printed[0]
    assert not list(small_disk.iterdir())


@pytest.mark.parametrize("side", ["text", "image"])
def test_a_result_inside_a_parent_is_refused(tmp_path: Path, pair: tuple[Path, Path], side: str, capsys):
    parent = pair[0] if side == "text" else pair[1]
    before = sorted(parent.rglob("*"))
    assert main(command(pair, parent / "sub", "cross")) == 2
    assert f"lies inside the {side} parent" in capsys.readouterr().err
    assert sorted(parent.rglob("*")) == before


def test_the_output_folder_defaults_to_where_the_shipped_recipes_look(tmp_path, monkeypatch):
    text, image = tiny_pair(tmp_path / "parents")
    monkeypatch.chdir(tmp_path)
    assert main(["merge", "--method", "cross", "--text", str(text), "--image", str(image)]) == 0
    assert (tmp_path / "runs/merged-cross/config.json").exists()
    assert "model: runs/merged-cross" in (Path(__file__).parents[2] / "recipes/pretrain.yaml").read_text()


def test_a_flag_and_its_override_are_not_both_taken(pair: tuple[Path, Path], tmp_path: Path, capsys) -> None:
    more = [f"out={tmp_path / 'second'}"]
    assert main([*command(pair, tmp_path / "first", "cross"), *more]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert len(printed) == 1 and "--out and out=... are both given" in printed[0]
    assert not list(tmp_path.glob("first")) and not list(tmp_path.glob("second"))
