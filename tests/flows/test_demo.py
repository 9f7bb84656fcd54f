"""``jam demo`` end to end on tiny parents and a handful of images: interrupted twice, gone on with, read."""

import json
import lzma
import os
import signal
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from finetune import run as finetune_run
from finetune.data import mini_data
from jam import assets, demo_samples
from jam.cli import main
from jam.demo_bench import METHODS, Settings, open_folder
from jam.errors import RunError
from merge.recipe import MergeRecipe
from merge.run import run_merge
from tests.tiny import tiny_pair

STYLES = ("noto", "flat", "twemoji")
SPLITS = ("train", "train", "validation", "combination", "train", "label")


def write_data(folder: Path) -> Path:
    """The shipped data's files with a few flat-coloured images, sentences and conversations."""
    folder.mkdir()
    rows = []
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for number in range(36):
            style, label = STYLES[number % 3], f"thing {number // 3}"
            row = {"file": f"{style}/{number}.webp", "style": style, "label": label, "tags": ["red"]}
            rows.append({**row, "group": "objects", "subgroup": "tool", "split": SPLITS[number // 6]})
            buffer = BytesIO()
            Image.new("RGB", (8, 8), (7 * number, 255 - 7 * number, 90)).save(buffer, "WEBP", lossless=True)
            archive.writestr(row["file"], buffer.getvalue())
    (folder / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, key in (("wikipedia", "title"), ("glosses", "lemma")):
        lines = [
            {
                key: f"T{n}",
                "text": f"the {name} of thing {n} and others",
                "split": ("train", "validation", "test")[n % 3],
            }
            for n in range(30)
        ]
        with lzma.open(folder / f"{name}.jsonl.xz", "wt") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
    talks = []
    for number in range(24):
        image = {"type": "image", "path": rows[number % 6]["file"]}
        shown = number % 2 == 1
        asked = [{"type": "text", "text": f"What is {number}?"}] + [image] * shown
        told = [{"type": "text", "text": "a thing"}] + [image] * (not shown) + [{"type": "text", "text": "of red."}]
        talks.append(
            {
                "id": str(number),
                "kind": "what" if shown else "show",
                "split": ("train", "wording", "subject", "train")[number // 6],
                "messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}],
            }
        )
    (folder / "conversations.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return folder


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory):
    """Tiny parents, data and default model in place of the shipped ones."""
    root = tmp_path_factory.mktemp("world")
    text, image = tiny_pair(root, num_hidden_layers=2, max_position_embeddings=512)
    run_merge(MergeRecipe(method="uniform", text=text, image=image, out=root / "chat"))
    cached = (mini_data.image_rows, mini_data.texts, mini_data.conversations, mini_data.scenes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini_data, "DATA", write_data(root / "data"))
        patch.setattr(mini_data, "SCENE_GROUPS", ("objects",))
        patch.setattr(mini_data, "TRAIN_SCENES", 8)
        patch.setattr(assets, "TEXT_PARENT", text)
        patch.setattr(assets, "IMAGE_PARENT", image)
        patch.setattr(assets, "CHAT", root / "chat")
        patch.setenv("JAM_CACHE", str(root / "cache"))
        for function in cached:
            function.cache_clear()
        yield root
    for function in cached:
        function.cache_clear()


def steps_logged(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_demo_stops_twice_and_goes_on(tiny_world, monkeypatch, capsys):
    """Stopped in a measurement and again in a training step, the third call ends with a page; nothing is done twice."""
    out = tiny_world / "demo"
    command = ["demo", "--out", str(out), "--quick"]
    real_losses, calls = demo_samples.held_out_losses, []

    def stop_at_third(*args):
        calls.append(args[0].name)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real_losses(*args)

    with monkeypatch.context() as patch:
        patch.setattr(demo_samples, "held_out_losses", stop_at_third)
        assert main(command) == 130
    assert sorted(path.name for path in (out / "merged").iterdir()) == sorted(METHODS)
    merged = {path: path.stat().st_mtime_ns for path in (out / "merged").rglob("*.safetensors")}
    assert not (out / "report.html").exists()

    real_log = finetune_run.append_log

    def stop_width(run: Path, line: dict) -> None:
        real_log(run, line)
        if run.name == "width" and line["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(demo_samples, "held_out_losses", lambda *args: calls.append(args[0].name) or real_losses(*args))
        patch.setattr(finetune_run, "append_log", stop_width)
        assert main(command) == 130
    assert (out / "results" / "train-uniform.json").exists() and not (out / "results" / "train-width.json").exists()
    assert steps_logged(out / "train" / "width") == [1, 2]

    assert main(command) == 0
    told = capsys.readouterr().err
    assert "resuming" in told and "best: " in told
    assert steps_logged(out / "train" / "width") == [1, 2, 3, 4]
    assert merged == {path: path.stat().st_mtime_ns for path in (out / "merged").rglob("*.safetensors")}
    assert calls.count("text") == 1  # the parent was measured in the first call and never again


def test_the_page_shows_every_promise(tiny_world):
    out = tiny_world / "demo"
    html = (out / "report.html").read_text()
    choice = {m: json.loads((out / "results" / f"measure-{m}-after-training.json").read_text()) for m in METHODS}
    for name in METHODS:
        assert f'<th scope="row">{name}' in html and f"{choice[name]['test']['text']:.3f}" in html
    assert html.count('<span class="badge">best</span>') == 1
    budgets = {json.loads((out / "results" / f"train-{m}.json").read_text())["budget"] for m in METHODS}
    assert budgets == {2048} and "2,048 tokens" in html
    assert html.count('<article class="card">') == 4  # two of each kind of held-out caption
    assert html.count('<article class="talk">') == 6
    assert html.count('class="bubble model"') == 12
    assert "currentColor" in html


def test_a_second_call_only_writes_the_page_anew(tiny_world):
    out = tiny_world / "demo"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert main(["demo", "--out", str(out), "--quick"]) == 0
    changed = {path.name for path, at in before.items() if path.stat().st_mtime_ns != at}
    assert changed == {"report.html"}


def test_a_folder_of_something_else_is_refused(tiny_world, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path), "--quick"]) == 2
    assert "not empty and holds no demo" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.txt"]


def test_other_settings_are_refused(tiny_world, capsys):
    assert main(["demo", "--out", str(tiny_world / "demo")]) == 2
    assert "made under other settings" in capsys.readouterr().err


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "demo.json").write_text('{"jam"')
    with pytest.raises(RunError, match=r"demo\.json: damaged"):
        open_folder(tmp_path, Settings("a", "b"))
