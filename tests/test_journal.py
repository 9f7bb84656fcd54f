"""Locks and journals: one living writer a folder, nothing left by a dead one, and only whole shards are trusted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jam.digest import StreamHash, sha256_of
from jam.errors import CheckpointError, JamError
from jam.journal import Journal, Lock, Shard, partial_folder
from jam.shards import ShardWriter, TensorSpec

ROOT = Path(__file__).parents[1]
SPECS = [TensorSpec(name, "F32", (4, 3)) for name in "abcd"]
VALUES = {spec.name: np.random.default_rng(0).standard_normal((4, 3), dtype=np.float32) for spec in SPECS}


def write(out: Path, stop_after: int | None = None, key: str | None = "k", **settings: bool) -> set[str]:
    """One shard a tensor; ends by Ctrl+C after some of them. Returns what was written before."""
    with ShardWriter(out, SPECS, shard_bytes=1, key=key, **settings) as writer:
        before = set(writer.written)
        for at, spec in enumerate(SPECS):
            if at == stop_after:
                raise KeyboardInterrupt
            if spec.name not in before:
                writer.write(spec.name, VALUES[spec.name])
        writer.finish()
    return before


def stopped(out: Path, after: int, **settings: bool) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(out, after, **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("hashed", [False, True])
@pytest.mark.parametrize("after", range(5))
def test_goes_on_after_the_last_whole_shard_to_the_same_bytes(tmp_path: Path, after: int, hashed: bool):
    write(tmp_path / "whole", hashed=hashed)
    if after < 4:
        stopped(tmp_path / "out", after, hashed=hashed)
    # a tensor's shard is closed when the next one begins
    assert write(tmp_path / "out", hashed=hashed) == {spec.name for spec in SPECS[: max(0, after % 4 - 1)]}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "whole"]


def test_other_work_starts_anew_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stopped(tmp_path / "out", 3)
    assert "2 whole shards are kept" in capsys.readouterr().err
    assert write(tmp_path / "out", key="other") == set()
    assert capsys.readouterr().err.splitlines() == [
        f"{tmp_path / 'out'}: other work under this name was left unfinished; starting anew"
    ]


def test_without_a_key_nothing_is_kept(tmp_path: Path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", 3, key=None)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_work_keeps_nothing(tmp_path: Path):
    with pytest.raises(ValueError), ShardWriter(tmp_path / "out", SPECS, shard_bytes=1, key="k") as writer:
        writer.write("a", VALUES["a"])
        writer.write("b", VALUES["b"])
        raise ValueError
    assert not list(tmp_path.iterdir())


def overwrite(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize("spoil", [overwrite, cut, Path.unlink])
def test_a_shard_that_changed_since_is_written_again(tmp_path: Path, spoil):
    write(tmp_path / "whole")
    stopped(tmp_path / "out", 3)
    spoil(partial_folder(tmp_path / "out") / "model-00001-of-00004.safetensors")
    assert write(tmp_path / "out") == {"b"}
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_hash_finds_a_shard_that_changed_behind_its_time(tmp_path: Path):
    stopped(tmp_path / "out", 3, hashed=True)
    file = partial_folder(tmp_path / "out") / "model-00002-of-00004.safetensors"
    before = file.stat()
    overwrite(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert write(tmp_path / "out", hashed=True) == {"a"}


def test_an_interrupt_while_kept_shards_are_looked_over_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    stopped(tmp_path / "out", 3, hashed=True)

    def interrupted(file: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("jam.shards.sha256_of", interrupted)
        write(tmp_path / "out", hashed=True)
    assert write(tmp_path / "out", hashed=True) == {"a", "b"}


@pytest.mark.parametrize("key", ["k", None])
def test_a_place_filled_meanwhile_is_one_line_and_the_work_is_kept(tmp_path: Path, key: str | None):
    write(tmp_path / "whole")
    out = tmp_path / "out"
    with ShardWriter(out, SPECS, shard_bytes=1, key=key) as writer:
        for spec in SPECS:
            writer.write(spec.name, VALUES[spec.name])
        out.mkdir()
        (out / "mine.txt").write_text("x")
        state = "nothing is left" if key is None else "all 4 whole shards are kept"
        with pytest.raises(CheckpointError, match=f"was filled during the work.*{state}, empty it"):
            writer.finish()
    assert [file.name for file in out.iterdir()] == ["mine.txt"]
    (out / "mine.txt").unlink()
    assert write(out) == (set() if key is None else set("abcd"))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("entry", ["[" * 100_000, *(Shard(name, 1, 1) for name in ("x" * 5000, "journal.jsonl/x"))])
def test_a_strange_line_costs_no_whole_shard(tmp_path: Path, entry: str | Shard):
    stopped(tmp_path / "out", 3)
    journal = partial_folder(tmp_path / "out") / "journal.jsonl"
    strange = entry if isinstance(entry, str) else json.dumps(vars(entry))
    journal.write_text(f"{journal.read_text()}{strange}\n")
    assert write(tmp_path / "out") == {"a", "b"}


def test_links_in_the_place_of_work_are_removed_and_not_followed(tmp_path: Path):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    (elsewhere / "mine.txt").write_text("x")
    partial_folder(out).symlink_to(elsewhere)
    write(out)
    stopped(tmp_path / "next", 3)
    (partial_folder(tmp_path / "next") / "link").symlink_to(elsewhere)
    assert write(tmp_path / "next") == {"a", "b"}
    assert contents(out) == contents(tmp_path / "next")
    assert contents(elsewhere) == {"mine.txt": b"x"}


@pytest.mark.parametrize("keep", [0, 1, 20, -1, -20])
def test_a_journal_cut_anywhere_is_read_as_far_as_it_is_whole(tmp_path: Path, keep: int):
    write(tmp_path / "whole")
    stopped(tmp_path / "out", 3)
    journal = partial_folder(tmp_path / "out") / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:keep])
    expected = {-1: {"a", "b"}, -20: {"a"}}.get(keep, set())
    assert write(tmp_path / "out") == expected
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_journal_names_no_file_elsewhere(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"x")
    (tmp_path / "p").mkdir()
    journal = Journal(tmp_path / "p")
    journal.start("k", [])
    journal.add(Shard("../f", 1, (tmp_path / "f").stat().st_mtime_ns))
    assert [shard.name for shard in journal.read("k")] == []


def test_a_second_writer_is_refused_while_the_first_lives(tmp_path: Path):
    with ShardWriter(tmp_path / "out", SPECS) as first:
        for _ in range(2):
            with (
                pytest.raises(JamError, match="another process is writing this folder"),
                ShardWriter(tmp_path / "out", SPECS),
            ):
                pass
        first.write("a", VALUES["a"])
        with ShardWriter(tmp_path / "other", SPECS):
            pass
    with ShardWriter(tmp_path / "out", SPECS):
        pass
    assert not list(tmp_path.iterdir())


HOLDER = """
import sys, time
from pathlib import Path
from jam.journal import Lock
Lock(Path(sys.argv[1])).acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_process_leaves_no_lock(tmp_path: Path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "out")]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with pytest.raises(JamError, match="another process is writing this folder"):
            Lock(tmp_path / "out").acquire()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    lock = Lock(tmp_path / "out")
    assert lock.path.exists()  # the file, which nobody holds
    lock.acquire()
    lock.release()
    assert not list(tmp_path.iterdir())


def test_a_stream_and_its_file_have_one_hash(tmp_path: Path):
    data = np.random.default_rng(0).bytes(3_000_001)
    (tmp_path / "f").write_bytes(data)
    stream = StreamHash()
    for at in range(0, len(data), 70_001):
        stream.update(data[at : at + 70_001])
    assert stream.finish() == sha256_of(tmp_path / "f")
