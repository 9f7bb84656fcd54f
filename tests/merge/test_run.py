"""What a merge refuses about its inputs and its place, what it says of itself, and in which words."""

import json
import os
import warnings
from pathlib import Path

import pytest

import merge.run
from jam.checkpoint import WEIGHTS
from jam.cli import main
from jam.errors import MergeError
from merge.plan import Plan
from merge.recipe import MergeRecipe
from merge.report import compact_json
from merge.run import run_merge
from tests.tiny import tiny_pair, tiny_parent


def command(pair: tuple[Path, Path], out: Path, method: str, *more: str) -> list[str]:
    return ["merge", "--method", method, "--text", str(pair[0]), "--image", str(pair[1]), "--out", str(out), *more]


def error(pair: tuple[Path, Path], out: Path, capsys: pytest.CaptureFixture[str], method: str, *more: str) -> str:
    capsys.readouterr()  # what made the parents
    assert main(command(pair, out, method, *more)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("side", [0, 1])
def test_an_input_that_changes_during_the_stream_is_refused(tmp_path: Path, side: int, monkeypatch: pytest.MonkeyPatch):
    pair = tiny_pair(tmp_path / "parents")
    file, plain = pair[side] / WEIGHTS, merge.run.stream

    def rewritten(plan: Plan, writer: object) -> None:
        stat = file.stat()
        plain(plan, writer)
        file.write_bytes(file.read_bytes())
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))

    monkeypatch.setattr(merge.run, "stream", rewritten)
    with pytest.raises(MergeError, match="an input file changed while it was read"):
        run_merge(MergeRecipe(method="cross", text=pair[0], image=pair[1], out=tmp_path / "out"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["parents"]


@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_place_that_is_taken_or_an_inputs_is_refused_by_a_dry_run_too(tmp_path: Path, more: list[str], capsys):
    pair = tiny_pair(tmp_path)
    base = tiny_parent(tmp_path / "base", False, 9)
    assert "lies inside the image parent" in error(pair, pair[1] / "out", capsys, "cross", *more)
    given = f"uniform.base={base}"
    found = error(pair, base / "out", capsys, "uniform", given, "uniform.rule=task_arithmetic", *more)
    assert "lies inside the ancestor" in found
    assert "is not empty" in error(pair, base, capsys, "cross", *more)
    assert "the output is a file" in error(pair, base / "config.json", capsys, "cross", *more)


def test_doubts_are_said_by_a_merge_and_stand_in_its_card(tmp_path: Path, capsys):
    pair = tiny_pair(tmp_path, text_max_position_embeddings=64)
    assert main(command(pair, tmp_path / "out", "cross")) == 0
    doubt = "check: positions are 64 and 256: the result's context is 64"
    assert doubt in capsys.readouterr().err.splitlines()
    assert f"* {doubt}" in (tmp_path / "out/README.md").read_text().splitlines()
    even = tiny_pair(tmp_path / "even")
    assert main(command(even, tmp_path / "uniform", "uniform")) == 0
    shown = capsys.readouterr().err
    assert "check: lineage" in shown and "equal in both" not in shown + (tmp_path / "uniform/README.md").read_text()
    assert any("equal in both" in one for one in json.loads((tmp_path / "uniform/report.json").read_text())["checks"])


@pytest.mark.parametrize(("side", "whose"), [("image", "the image parent has 5"), ("text", "the result has 5")])
def test_positions_too_few_for_an_image_are_said(tmp_path: Path, side: str, whose: str, capsys):
    pair = tiny_pair(tmp_path, **{f"{side}_max_position_embeddings": 5})
    assert main(command(pair, tmp_path / "out", "cross", "--dry-run")) == 0
    found = f"check: an image takes 6 positions with its two controls, and {whose}: no whole image fits"
    assert found in capsys.readouterr().out.splitlines()


def test_a_hint_names_other_methods_and_only_where_they_help(tmp_path: Path, capsys):
    pair = tiny_pair(tmp_path)
    assert error(pair, tmp_path / "out", capsys, "cross", "cross.every=99").endswith("; lower cross.every")
    for method in ("cross", "uniform", "width"):
        assert error(pair[::-1], tmp_path / "out", capsys, method).endswith("; swap --text and --image")


@pytest.mark.parametrize("init", ["quantiles", "sums"])
def test_an_overflow_is_its_error_alone(tmp_path: Path, init: str, capsys):
    pair = tiny_pair(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = error(pair, tmp_path / "out", capsys, "cross", "cross.init_std=1e300", f"cross.init={init}")
        assert "overflow BF16" in found
        base = [
            "uniform.rule=task_arithmetic",
            "uniform.scale=1e300",
            f"uniform.base={tiny_parent(tmp_path / 'b', False, 9)}",
        ]
        assert "overflow BF16" in error(pair, tmp_path / "out", capsys, "uniform", *base)


def test_a_quiet_merge_says_nothing(tmp_path: Path, capsys):
    text, image = tiny_pair(tmp_path)
    capsys.readouterr()
    run_merge(MergeRecipe(method="uniform", text=text, image=image, out=tmp_path / "out"), quiet=True)
    assert capsys.readouterr().err == ""


def test_a_report_keeps_its_strings():
    value = {"a": "p [x  y]", "b": [1, 2, "c  d"], "e": [], "f": "\\n  [\n  ]"}
    assert json.loads(compact_json(value)) == value
    assert ' "b": [ 1, 2, "c  d" ]' in compact_json(value)
