"""``jam data``: from a user's files to a folder that a recipe trains on; every mistake one line and exit code 2."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from finetune.data.look import fill_of, histogram
from finetune.data.readers import FORMS
from finetune.data.shards import open_shards
from finetune.data.sources import open_source
from finetune.order.plan import PackedSource
from finetune.recipe import FinetuneRecipe
from jam.cli import main
from jam.data_cli import Reader
from jam.models.load import load_bundle
from tests.tiny import tiny_pair
from tests.tiny_framed import framed_parent

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_pair(tmp_path_factory.mktemp("pair"))[1]


@pytest.fixture
def talk(tmp_path) -> Path:
    Image.effect_noise((20, 12), 90).convert("RGB").save(tmp_path / "a.png")
    turns = [{"role": "user", "content": "draw\nthe \x1b[2Jcat"}, {"role": "assistant", "content": "here <image>"}]
    rows = [
        {"messages": turns, "images": ["a.png"]},
        {"messages": [turns[0], {"role": "assistant", "content": "no"}]},
    ]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 20))
    return tmp_path / "talk.jsonl"


def said(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    assert main(["data", *map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.out, captured.err


def test_the_readers_of_the_door_are_those_of_the_house():
    assert list(get_args(Reader)) == list(FORMS)


def test_prepare_check_stats_show(tmp_path, talk, model, capsys):
    out = tmp_path / "out"
    assert said(capsys, "check", talk, "--reader", "messages")[0] == f"{talk}: 40 documents, all of them good\n"
    printed, told = said(capsys, "prepare", talk, "--reader", "messages", "--model", model, "--out", out)
    assert re.fullmatch(rf"{out}: 40 documents, [\d,]+ tokens, 20 images\n", printed)
    assert told.startswith("shard-00000: 40 documents, ")
    assert "1 shard as written; 40 documents" in said(capsys, "check", out, "--model", model)[0]
    printed, _ = said(capsys, "stats", out, "--seq-len", "64")
    assert "conversations  40, plain documents 0" in printed
    assert "image codes    80 tokens" in printed and "0 texts are cut, 0 documents with images are too long" in printed
    printed, _ = said(capsys, "show", out, "--model", model, "-n", "2", "--out", tmp_path / "shown")
    picture = tmp_path / "shown/document-0-1.png"
    assert printed.splitlines()[1:] == [
        f"document 0: {len(open_shards(out).tokens(0))} tokens, 9 learnt",
        "        <bos> <user>",
        "        draw the [2Jcat",  # no escape reaches the terminal
        "        <assistant>",
        "  *     here",
        "  *     <begin_image>",
        f"  *     an image of 4 codes: {picture}",
        "  *     <begin_image>",  # and closes it: CM3Leon's <break> does both
        "  *     <eos>",
        f"document 1: {len(open_shards(out).tokens(1))} tokens, 3 learnt",
        "        <bos> <user>",
        "        draw the [2Jcat",
        "        <assistant>",
        "  *     no",
        "  *     <eos>",
    ]
    assert Image.open(picture).size == (8, 8)


def test_show_of_images_with_sizes(tmp_path, capsys):
    model = framed_parent(tmp_path / "model", "text")
    Image.effect_noise((24, 12), 90).convert("RGB").save(tmp_path / "wide.png")
    (tmp_path / "c.jsonl").write_text('{"image": "wide.png", "caption": "x"}\n')
    arguments = ("--reader", "captions", "--model", model, "--own-sizes", "--out", tmp_path / "out")
    said(capsys, "prepare", tmp_path / "c.jsonl", *arguments)
    printed, _ = said(capsys, "show", tmp_path / "out", "--model", model, "--out", tmp_path / "shown")
    assert "  *     an image of 10 codes, 2 rows of 5: " in printed
    assert Image.open(tmp_path / "shown/document-0-1.png").size == (10, 4)


def test_check_names_every_bad_row(tmp_path, talk, model, capsys):
    lines = talk.read_text().splitlines(True)
    bad = (3, 17, 40)
    for number in bad:
        lines[number - 1] = '{"messages": "\x07"}\n' if number == 17 else lines[number - 1].replace("a.png", "b.png")
    lines[2], lines[39] = "{\n", "[]\n"
    talk.write_text("".join(lines))
    for more in ((), ("--model", model), ("--workers", "2")):
        printed, told = said(capsys, "check", talk, "--reader", "messages", *more, code=2)
        *rows, last = told.splitlines()
        assert printed == "" and [int(row.split(f"{talk}:")[1].split(":")[0]) for row in rows] == list(bad)
        assert last == (f"error: {talk}: 3 of 40 rows cannot be used; mend or remove them, or prepare with --skip-bad")
    out = tmp_path / "out"
    _, told = said(capsys, "prepare", talk, "--reader", "messages", "--model", model, "--out", out, code=2)
    assert len(told.splitlines()) == 3 and not out.exists()
    arguments = ("--reader", "messages", "--model", model, "--out", out, "--skip-bad")
    assert ", 3 rows left out" in said(capsys, "prepare", talk, *arguments)[0]


def test_check_names_an_altered_file(tmp_path, talk, model, capsys):
    out = tmp_path / "out"
    said(capsys, "prepare", talk, "--reader", "messages", "--model", model, "--out", out)
    data = bytearray((out / "shard-00000.bin").read_bytes())
    data[7] ^= 1
    (out / "shard-00000.bin").write_bytes(data)
    _, told = said(capsys, "check", out, code=2)
    assert told == (
        f"error: {out}/shard-00000.bin: altered since it was written (SHA-256 differs); restore it or prepare the "
        "source again\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "{tmp}/talk.jsonl"), "needs --reader"),
        (("check", "{tmp}/none", "--reader", "text"), "no such file or folder"),
        (("stats", "{tmp}"), "no prepared source"),
        (("show", "{tmp}", "--model", "{model}"), "no prepared source"),
        (("prepare", "{tmp}/talk.jsonl", "--reader", "text", "--model", "{tmp}/no", "--out", "{tmp}/out"), "/no: "),
        (("prepare", "{tmp}/talk.jsonl", "--reader", "text", "--model", "{model}", "--out", "{tmp}"), "exists already"),
        (
            ("prepare", "{tmp}/talk.jsonl", "--reader", "messages", "--model", "{text}", "--out", "{tmp}/out"),
            "has no image tokenizer",
        ),
        (
            ("check", "{tmp}/talk.jsonl", "--reader", "messages", "--image-map", "{tmp}/no.jsonl"),
            "no such image map",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, talk, model, arguments, message, capsys):
    places = {"tmp": tmp_path, "model": model, "text": model.parent / "text"}
    _, told = said(capsys, *(argument.format(**places) for argument in arguments), code=2)
    assert message in told and all(line.startswith("error: ") for line in told.splitlines())


def test_a_prepared_source_is_trained_on(tmp_path, talk, model, capsys):
    out = tmp_path / "out"
    said(capsys, "prepare", talk, "--reader", "messages", "--model", model, "--out", out)
    recipe = {
        "kind": "finetune",
        "model": str(model),
        "output_dir": str(tmp_path / "run"),
        "data": {"seq_len": 64, "mix": {"talk": {"kind": "shards", "path": str(out), "weight": 1.0}}},
        "train": {"steps": 2, "micro_batch_size": 2, "global_batch_size": 2},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    assert main(["finetune", str(tmp_path / "r.yaml")]) == 0
    logged = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[-1])
    assert logged["loss/source/talk"] > 0 and logged["loss/image"] > 0


def test_the_fill_is_that_of_training(tmp_path, model, capsys):
    """Of one whole epoch, where all windows are measured."""
    lengths = np.random.default_rng(1).integers(1, 90, 300).tolist()
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": "x " * n + "y"}) + "\n" for n in lengths))
    said(capsys, "prepare", tmp_path / "t.jsonl", "--reader", "text", "--model", model, "--out", tmp_path / "out")
    bundle = load_bundle(model)
    raw = {
        "model": str(model),
        "output_dir": str(tmp_path / "run"),
        "data": {"seq_len": 100, "mix": {"t": {"kind": "shards", "path": str(tmp_path / "out"), "weight": 1.0}}},
        "objective": {"condition_drop": 0.0},
        "train": {"steps": 1},
    }
    recipe = FinetuneRecipe.model_validate(raw)
    packed = PackedSource(open_source("t", recipe.data.mix["t"], bundle), 0, bundle, recipe, 128)
    sequences = packed._pack(0)
    taken = sum(len(placed.tokens) for sequence in sequences for placed in sequence)
    fill = fill_of(open_shards(tmp_path / "out"), 100)
    assert fill.share == pytest.approx(taken / (100 * len(sequences))) and fill.documents == 300
    assert fill.cut == int((open_shards(tmp_path / "out").lengths() > 100).sum()) > 50
    assert sum(count for *_, count in histogram(open_shards(tmp_path / "out").lengths())) == 300


def test_a_killed_prepare_goes_on(tmp_path, model, capsys, monkeypatch):
    """SIGKILL as soon as a shard is there; its worker processes go too."""
    rows = [{"text": f"line {number} " + "of the cat " * 3000} for number in range(130)]
    source = tmp_path / "t.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["data", "prepare", str(source), "--reader", "text", "--model", str(model), "--shard-mb", "1"]
    command = [sys.executable, "-m", "jam.cli", *arguments, "--workers", "2", "--out", str(tmp_path / "out")]
    child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    first = child.stderr.readline()
    workers = children(child.pid)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert first.startswith("shard-00000: ") and workers
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    capsys.readouterr()
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.startswith("going on after ")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir()) and len(names) > 5
    assert all((tmp_path / "whole" / n).read_bytes() == (tmp_path / "out" / n).read_bytes() for n in names)
    for _ in range(600):
        if not any(alive(worker) for worker in workers):
            break
        time.sleep(0.1)
    assert not any(alive(worker) for worker in workers)


def children(process: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
