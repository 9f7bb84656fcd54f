"""What a merge refuses about its inputs and its place, what it says of itself, and in which words."""

import errno
import json
import os
import warnings
from collections.abc import Callable
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


def below_a_file(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file" / "out"


def far_below_a_file(folder: Path) -> Path:
    return below_a_file(folder) / "more" / "out"


def below_a_lost_link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "absent")
    return folder / "link" / "out"


def below_a_circle_of_links(folder: Path) -> Path:
    (folder / "circle").symlink_to(folder / "circle")
    return folder / "circle" / "out"


def where_the_system_makes_no_files(folder: Path) -> Path:
    if not Path("/proc/self").is_dir():
        pytest.skip("this system has no /proc")
    return Path("/proc/new/out")


PLACES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "below a file": (below_a_file, "file is no folder; a path below a folder that can be written is required"),
    "far below a file": (far_below_a_file, "file is no folder; a path below a folder that can be written is required"),
    "below a lost link": (below_a_lost_link, "link is no folder; a path below a folder"),
    "below a circle of links": (below_a_circle_of_links, "circle is no folder; a path below a folder"),
    "a long name": (lambda folder: folder / ("n" * 250), "(File name too long); a path below a folder that can be"),
    "a longer name": (lambda folder: folder / ("n" * 300), "choose a shorter path"),
    "below a long name": (lambda folder: folder / "new" / ("n" * 300) / "out", "(File name too long); a path below"),
    "where the system makes no files": (where_the_system_makes_no_files, "nothing can be made in /proc ("),
    "a file": (lambda folder: below_a_file(folder).parent, "the output is a file"),
    "a lost link": (lambda folder: below_a_lost_link(folder).parent, "the output is a file"),
}


@pytest.mark.parametrize(("place", "message"), PLACES.values(), ids=PLACES.keys())
def test_a_place_where_no_folder_can_be_made_is_refused_by_a_dry_run_in_the_same_words(
    tmp_path: Path, place: Callable[[Path], Path], message: str, capsys
):
    pair = tiny_pair(tmp_path / "parents")
    (tmp_path / "places").mkdir()
    out = place(tmp_path / "places")
    before = sorted((tmp_path / "places").rglob("*"))
    said = [error(pair, out, capsys, "cross", *more) for more in (["--dry-run"], [])]
    assert said[0] == said[1] and message in said[0]
    assert sorted((tmp_path / "places").rglob("*")) == before


@pytest.mark.parametrize("out", ["out", "new/out"])
def test_a_folder_without_leave_to_write_is_refused_by_a_dry_run_in_the_same_words(
    tmp_path: Path, out: str, capsys, monkeypatch: pytest.MonkeyPatch
):
    """A system that refuses is played here: root may write everywhere."""
    pair, opened = tiny_pair(tmp_path / "parents"), os.open

    def refused(path: str, *arguments: int, **more: int) -> int:
        if Path(path) == tmp_path or Path(path).parent == tmp_path:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, *arguments, **more)

    monkeypatch.setattr(os, "open", refused)
    said = [error(pair, tmp_path / out, capsys, "cross", *more) for more in (["--dry-run"], [])]
    assert said[0] == said[1] and f"nothing can be made in {tmp_path} (Permission denied); a path below" in said[0]


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    pair, out = tiny_pair(tmp_path / "parents"), tmp_path / "out"
    out.mkdir()
    (tmp_path / "link").symlink_to(out)
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(out))
    for given in (out, tmp_path / "link"):
        for more in (["--dry-run"], []):
            assert "is a mount point; a new folder is required" in error(pair, given, capsys, "cross", *more)


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
