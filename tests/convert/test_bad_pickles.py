"""Pickles that ``jam convert`` refuses, and what the process that reads them cannot do."""

import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from jam.convert.pickles import Pickles
from jam.errors import CheckpointError
from jam.header import shown
from tests.convert.owners import DDCONFIG, metaseq_args, refused, write_vqgan, write_yaml

ROOT = Path(__file__).parents[2]


class Payload:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("place", ["weights", "settings", "old format", "plain pickle"])
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, capsys, place: str):
    marker = tmp_path / "marker"
    payload, file = Payload(f"touch {marker}"), tmp_path / "vqgan.ckpt"
    write_yaml(tmp_path / "vqgan.yaml", {"embed_dim": 4, "n_embed": 16, "ddconfig": DDCONFIG})
    if place == "plain pickle":
        file.write_bytes(pickle.dumps({"state_dict": payload}))
    else:
        content = {"state_dict": payload} if place == "weights" else {"state_dict": {}, "args": metaseq_args(x=payload)}
        torch.save(content, file, _use_new_zipfile_serialization=place != "old format")
    said = refused(capsys, file)
    if place != "plain pickle":  # which torch.save never wrote
        assert "asks for posix.system" in said and "was not loaded" in said and "safetensors" in said
    assert not marker.exists()


def test_the_process_that_reads_pickles_has_no_network(tmp_path: Path):
    """Where the system lets it leave: a socket that listens here is out of its reach."""
    program = ROOT / "jam" / "convert" / "unpickle.py"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        script = (
            "import runpy, socket\n"
            f"gone = runpy.run_path({str(program)!r})['leave_network']()\n"
            "try:\n"
            f"    socket.create_connection(('127.0.0.1', {port}), 2)\n"
            "    print(gone, True)\n"
            "except OSError:\n"
            "    print(gone, False)\n"
        )
        said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert said in (["True", "False"], ["False", "True"])


def test_the_process_that_reads_pickles_writes_no_files(tmp_path: Path):
    program = ROOT / "jam" / "convert" / "unpickle.py"
    script = (
        f"import runpy\nrunpy.run_path({str(program)!r})['write_no_files']()\n"
        f"open({str(tmp_path / 'x')!r}, 'wb', 0).write(b'x')\n"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False).stderr
    assert "File too large" in said and not (tmp_path / "x").read_text()
    assert "jam" not in {name.split(".")[0] for name in runpy.run_path(str(program))}


def test_damaged_pickles_are_refused(tmp_path: Path, capsys):
    write_vqgan(tmp_path / "in")
    whole = (tmp_path / "in" / "vqgan.ckpt").read_bytes()
    for number, content in enumerate((whole[: len(whole) // 2], whole[:3], b"", b"no pickle at all")):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "vqgan.ckpt").write_bytes(content)
        said = refused(capsys, folder / "vqgan.ckpt")
        assert "cannot be read as a pickle of weights" in said and "truncated, damaged or none" in said


def test_a_reader_that_dies_is_one_line(tmp_path: Path):
    write_vqgan(tmp_path)
    with Pickles([tmp_path / "vqgan.ckpt"]) as pickles:
        tensor = pickles.state()["encoder.conv_in.weight"]
        pickles._process.send_signal(signal.SIGKILL)
        with pytest.raises(
            CheckpointError, match=r"vqgan\.ckpt: the process that reads pickles stopped .*signal 9"
        ) as e:
            pickles.raw(tensor)
    assert "\n" not in str(e.value)


def test_content_without_end_and_zips_that_grow_are_refused(tmp_path: Path, capsys):
    endless: dict = {}
    endless |= {"a": endless, "t": torch.zeros(1)}
    deep, doubled = [torch.zeros(1)], [torch.zeros(1)]
    for _ in range(200):
        deep = [deep]
    for _ in range(40):
        doubled = [doubled, doubled]
    for name, content in {"self": endless, "deep": {"x": deep}, "twice": {"x": doubled}}.items():
        (tmp_path / name).mkdir()
        torch.save(content, tmp_path / name / "a.pt")
        said = refused(capsys, tmp_path / name / "a.pt")
        assert "nested deeper than 64 levels" in said
    (tmp_path / "zip").mkdir()
    file = tmp_path / "zip" / "a.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 20))
    assert "'a/data.pkl' in it is compressed" in refused(capsys, file)


def test_names_are_printed_safely(tmp_path: Path, capsys):
    for number, name in enumerate(("a\x1b[31mX\nerror: fake", "a\nb", "")):
        (tmp_path / str(number)).mkdir()
        torch.save({name: torch.ones(2)}, tmp_path / str(number) / "a.pt")
        said = refused(capsys, tmp_path / str(number) / "a.pt")
        assert f"a tensor named {shown(name)}; " in said and "\x1b" not in said
        assert "names must be printable" in said


def test_a_truncated_file_is_said_in_our_words(tmp_path: Path, capsys):
    (tmp_path / "in").mkdir()
    torch.save({"w": torch.ones(999)}, tmp_path / "in" / "a.pt", _use_new_zipfile_serialization=False)
    content = (tmp_path / "in" / "a.pt").read_bytes()
    (tmp_path / "in" / "a.pt").write_bytes(content[:400])
    said = refused(capsys, tmp_path / "in" / "a.pt")
    assert "weights; the file is truncated, damaged or none that torch.save wrote, fetch it again (torch says" in said
