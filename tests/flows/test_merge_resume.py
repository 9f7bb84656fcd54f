"""Merges that are killed and run again: at any point, with any method, the bytes are those of a merge left alone."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jam.cli import main
from jam.journal import Lock, partial_folder
from tests.tiny import tiny_pair

ROOT = Path(__file__).parents[2]

KILLED = """
import os, signal, sys
import jam.journal, jam.shards
from jam.cli import main

calls, at, number = 0, int(sys.argv[1]), int(sys.argv[2])
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it


def deadly(function):
    def wrapped(*arguments, **keywords):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), number)
        return function(*arguments, **keywords)

    return wrapped


jam.shards.ShardWriter.append = deadly(jam.shards.ShardWriter.append)
jam.journal._append = deadly(jam.journal._append)
for name in ("fsync", "rename", "mkdir", "open"):
    setattr(os, name, deadly(getattr(os, name)))
code = main(sys.argv[3:])
print("calls", calls)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_pair(tmp_path_factory.mktemp("parents"))


def arguments(pair: tuple[Path, Path], out: Path, method: str, *more: str) -> list[str]:
    parents = ["--text", str(pair[0]), "--image", str(pair[1])]
    return ["merge", "--method", method, *parents, "--out", str(out), "shard_bytes=30000", *more]


def run(at: int, command: list[str], number: int = signal.SIGKILL) -> subprocess.CompletedProcess:
    program = [sys.executable, "-c", KILLED, str(at), str(int(number)), *command]
    return subprocess.run(program, cwd=ROOT, capture_output=True, text=True)


def digests(folder: Path) -> dict[str, str]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


CASES = [("cross", "cross.tables=shared"), ("uniform", "--hash"), ("width", "dtype=float16")]


@pytest.mark.parametrize(("method", "more"), CASES)
def test_killed_again_and_again_it_ends_with_the_same_bytes(
    tmp_path: Path, pair: tuple[Path, Path], method: str, more: str
):
    """Each run is killed later than the one before it and goes on where that one stopped: before a block, around a
    journal line, an fsync, and the final rename. Nothing stands under the final name before it is whole."""
    out = tmp_path / "out"
    command = arguments(pair, out, method, more)
    whole = run(0, command)
    assert whole.returncode == 0, whole.stderr
    expected, total = digests(out), int(whole.stdout.split()[-1])
    shutil.rmtree(out)
    draw, went_on = random.Random(0), 0
    for at in [1, total // 2, *(draw.randrange(1, total // 2) for _ in range(3)), 40, 30]:
        killed = run(at, command)
        went_on += "going on after" in killed.stderr
        if out.exists():  # killed after the rename, or past the last call
            assert digests(out) == expected
            shutil.rmtree(out)
        else:
            assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert went_on > 0
    if not out.exists():
        assert main(command) == 0
    assert digests(out) == expected
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("back", [0, 1, 2, 3, 6])
def test_killed_at_its_end_it_is_whole_or_absent(tmp_path: Path, pair: tuple[Path, Path], back: int):
    out = tmp_path / "out"
    command = arguments(pair, out, "cross")
    whole = run(0, command)
    expected, total = digests(out), int(whole.stdout.split()[-1])
    shutil.rmtree(out)
    assert run(total - back, command).returncode == -signal.SIGKILL
    assert digests(out) == expected if out.exists() else main(command) == 0
    assert digests(out) == expected
    shutil.rmtree(out)
    assert main(command) == 0 and [entry.name for entry in tmp_path.iterdir()] == ["out"]


def killed_after_shards(command: list[str], out: Path, number: int = signal.SIGKILL) -> subprocess.CompletedProcess:
    for at in range(30, 200, 10):
        found = run(at, command, number)
        if partial_folder(out).is_dir() and len(list(partial_folder(out).glob("*.safetensors"))) > 2:
            return found
    raise AssertionError("no kill left whole shards")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupt_keeps_whole_shards_and_says_so(tmp_path: Path, pair: tuple[Path, Path], number: int):
    out = tmp_path / "out"
    command = arguments(pair, out, "uniform")
    stopped = killed_after_shards(command, out, number)
    assert stopped.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    assert len([line for line in stopped.stderr.splitlines() if "whole shards are kept; the same command" in line]) == 1
    assert not Lock(out).path.exists()
    again = run(0, command)
    assert again.returncode == 0 and "going on after" in again.stderr
    assert main(arguments(pair, tmp_path / "whole", "uniform")) == 0
    found, expected = digests(out), digests(tmp_path / "whole")
    assert {name for name in expected if found[name] != expected[name]} == {"merge.yaml"}  # it names the folder


def test_the_bar_counts_what_was_written_before(tmp_path: Path, pair: tuple[Path, Path], monkeypatch):
    """A resumed merge's bar ends at its total, and begins with the bytes of the shards that were kept."""
    out, steps, totals = tmp_path / "out", [], []
    killed_after_shards(arguments(pair, out, "uniform"), out)
    kept = sum(file.stat().st_size for file in sorted(partial_folder(out).glob("*.safetensors"))[:-1])

    class Bar:
        def __init__(self, what: str) -> None: ...
        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: object) -> None: ...
        def add_task(self, name: str, total: int) -> int:
            totals.append(total)
            return 0

        def advance(self, task: int, count: int) -> None:
            steps.append(count)

    monkeypatch.setattr("merge.stream.byte_bar", Bar)
    assert main(arguments(pair, out, "uniform")) == 0
    assert sum(steps) == totals[0] and 0 < steps[0] <= kept


@pytest.mark.parametrize("change", ["recipe", "parent"])
def test_another_recipe_or_another_parent_starts_anew(tmp_path: Path, pair: tuple[Path, Path], change: str):
    parents = tmp_path / "text", tmp_path / "image"
    for source, target in zip(pair, parents, strict=True):
        shutil.copytree(source, target)
    out = tmp_path / "out"
    killed_after_shards(arguments(parents, out, "uniform"), out)
    more = ["uniform.weight=0.25"] if change == "recipe" else []
    if change == "parent":
        os.utime(parents[0] / "model.safetensors")
    found = run(0, arguments(parents, out, "uniform", *more))
    assert found.returncode == 0 and "starting anew" in found.stderr and "going on" not in found.stderr
    assert main(arguments(parents, tmp_path / "whole", "uniform", *more)) == 0
    first, second = digests(out), digests(tmp_path / "whole")
    assert {name for name in second if first[name] != second[name]} == {"merge.yaml"}


def test_a_bad_parent_found_late_keeps_nothing(tmp_path: Path, pair: tuple[Path, Path], capsys):
    from safetensors.numpy import load_file, save_file

    parents = tmp_path / "text", tmp_path / "image"
    for source, target in zip(pair, parents, strict=True):
        shutil.copytree(source, target)
    tensors = load_file(parents[0] / "model.safetensors")
    tensors["model.decoder.layers.3.fc2.weight"][0, 0] = float("inf")
    save_file(tensors, parents[0] / "model.safetensors")
    assert main(arguments(parents, tmp_path / "out", "uniform")) == 2
    assert "layers.3.fc2.weight has 1 of 2048 values" in capsys.readouterr().err
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["image", "text"]


def test_two_merges_to_one_folder_are_one_too_many(tmp_path: Path, pair: tuple[Path, Path]):
    out = tmp_path / "out"
    command = arguments(pair, out, "cross")
    first = subprocess.Popen(
        [sys.executable, "-c", KILLED, "60", str(int(signal.SIGSTOP)), *command],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not partial_folder(out).is_dir() and first.poll() is None:
            time.sleep(0.01)
        second = run(0, command)
        assert second.returncode == 2 and len(second.stderr.splitlines()) == 1
        assert "another process is writing this folder" in second.stderr
    finally:
        first.send_signal(signal.SIGCONT)
        first.communicate(timeout=60)
    assert first.returncode == 0 and json.loads((out / "report.json").read_text())["method"] == "cross"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
