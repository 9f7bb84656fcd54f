"""A watched run: the same bits as one that is not, a table beside both parents, samples."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from finetune.recipe import FinetuneRecipe
from finetune.run import Reporter, run_finetune
from finetune.watching.retention import HeldOut, parents_of
from finetune.watching.watch import check_engine
from jam.errors import GenerationError, RunError
from jam.models.load import load_bundle
from merge.recipe import MergeRecipe
from merge.run import run_merge
from tests.laws.test_data_laws import recipe_for
from tests.laws.test_training_laws import StopAfter, final_weights, log_lines
from tests.tiny import tiny_pair


class Told(Reporter):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def fused(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("finetune.watching.watch.WORDS", 6)
    for number in range(4):
        Image.new("RGB", (8, 8), (60 * number, 0, 9)).save(tmp_path / f"{number}.png")
    lines = (json.dumps({"image": f"{number}.png", "caption": f"cat {number}"}) for number in range(4))
    (tmp_path / "cats.jsonl").write_text("\n".join(lines) + "\n")
    text, image = tiny_pair(tmp_path)
    merge = MergeRecipe(method="cross", text=text, image=image, out=tmp_path / "fused", dtype="float32")
    run_merge(merge, quiet=True)
    return tmp_path / "fused"


WATCH = {"every": 2, "retention": 3, "samples": 1}


def watched(tmp: Path, name: str, watch: dict | None = WATCH, train: dict | None = None, **sections) -> FinetuneRecipe:
    raw = recipe_for(tmp).model_dump(mode="json")
    raw["data"]["mix"]["b"] = {"kind": "captions", "path": str(tmp / "cats.jsonl"), "weight": 0.3}
    raw["train"] |= train or {}
    raw |= {"model": str(tmp / "fused"), "output_dir": str(tmp / name), "watch": watch, "log": {"every": 1}}
    return FinetuneRecipe.model_validate(raw | sections)


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "retention.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("train", "sections"),
    [
        ({"ema": 0.5, "checkpointing": True}, {"objective": {"cm3": 0.5, "own_codes": 1.0}}),
        (
            {"precision": "bf16", "ema": 0.5},
            {"lora": {"r": 2, "dropout": 0.2, "targets": "^(text|image)", "new_rows": True}},
        ),
    ],
)
def test_watching_changes_no_bit_of_the_training(tmp_path, fused, train, sections):
    AcceleratorState._reset_state(True)  # of another precision
    finals, losses = [], []
    for name, watch in (("plain", None), ("watched", WATCH)):
        finals.append(final_weights(run_finetune(watched(tmp_path, name, watch, train, **sections))))
        losses.append([(line["loss"], line["grad_norm"]) for line in log_lines(tmp_path / name)])
    assert losses[0] == losses[1] and len(losses[0]) == 4
    assert all(torch.equal(tensor, finals[1][name]) for name, tensor in finals[0].items())
    AcceleratorState._reset_state(True)
    assert not (tmp_path / "plain/retention.jsonl").exists()
    assert [row["of"] for row in rows(tmp_path / "watched")] == [
        *("text parent", "image parent", "step 0", "step 2", "step 4")
    ]


def test_the_table_is_of_the_parents_and_of_what_is_saved(tmp_path, fused):
    reporter = Told()
    recipe = watched(tmp_path, "run", train={"ema": 0.5})
    final = run_finetune(recipe, reporter=reporter)
    found = {row["of"]: row for row in rows(tmp_path / "run")}
    held_out = HeldOut.open(recipe.watch, load_bundle(fused), recipe.data.seq_len)
    places = {"text parent": "text", "image parent": "image", "step 0": "fused", "step 4": final}  # which is averaged
    for name, folder in places.items():
        wanted = held_out.losses(load_bundle(tmp_path / folder))
        assert found[name]["text"] == pytest.approx(wanted["text"], rel=1e-6)
        assert found[name]["image"] == (wanted["image"] and pytest.approx(wanted["image"], rel=1e-6))
    assert found["text parent"]["image"] is None and found["image parent"]["image"] is not None
    page = (tmp_path / "run/retention.md").read_text()
    assert f"| text parent | {found['text parent']['text']:.4f} |  | - |  |" in page and "| step 4 |" in page
    assert "+0.0 % |" in next(line for line in page.splitlines() if line.startswith("| step 0"))  # closed gates: images
    assert any(line.startswith("step 2: text ") and "% over text parent)" in line for line in reporter.lines)
    assert [line["step"] for line in log_lines(tmp_path / "run") if "retention/image" in line] == [2, 4]


def test_samples_are_pictures_and_replies_of_one_seed(tmp_path, fused):
    prompts = ["a cat", "say on", "left out"]
    run_finetune(watched(tmp_path, "run", {**WATCH, "retention": 0, "samples": 2, "prompts": prompts}))
    folders = sorted((tmp_path / "run/samples").iterdir())
    assert [folder.name for folder in folders] == ["step-000000", "step-000002", "step-000004"]
    for folder in folders:
        written = json.loads((folder / "samples.json").read_text())["samples"]
        assert [(one["kind"], one["prompt"]) for one in written] == [
            *(("picture", "a cat"), ("picture", "say on"), ("reply", "a cat"), ("reply", "say on"))
        ]
        for one in written[:2]:
            (block,) = one["answer"]
            assert Image.open(folder / block["path"]).size == (8, 8)
    assert not (tmp_path / "run/retention.jsonl").exists()


def test_a_resumed_run_measures_each_step_once_and_the_parents_no_more(tmp_path, fused):
    recipe = watched(tmp_path, "run", {**WATCH, "samples": 0}, {"steps": 8}, save={"every": 3, "keep": 2})
    straight = watched(tmp_path, "straight", {**WATCH, "samples": 0}, {"steps": 8})
    run_finetune(straight)
    with pytest.raises(KeyboardInterrupt):
        run_finetune(recipe, reporter=StopAfter(5))
    shutil.rmtree(tmp_path / "text")  # a parent that is gone stays as it was measured
    run_finetune(recipe)
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")
    assert (tmp_path / "run/retention.md").read_text() == (tmp_path / "straight/retention.md").read_text()
    shares = [[line["share/a"] for line in log_lines(tmp_path / name)] for name in ("run", "straight")]
    assert shares[0] == shares[1] and len(shares[0]) == 8  # counted from the first step on


def test_a_parent_that_is_gone_or_another_is_said_in_the_table(tmp_path, fused):
    shutil.rmtree(tmp_path / "text")
    shutil.rmtree(tmp_path / "image")
    tiny_pair(tmp_path / "other", family="llama")
    (tmp_path / "other/image").rename(tmp_path / "image")
    run_finetune(watched(tmp_path, "run", {**WATCH, "samples": 0}))
    page = (tmp_path / "run/retention.md").read_text()
    assert f"| text parent | not measured: {tmp_path / 'text'} is gone |" in page
    assert "image holds another model than the merge read |" in page
    assert [row["of"] for row in rows(tmp_path / "run")] == ["step 0", "step 2", "step 4"]


def test_ones_own_held_out_data(tmp_path, fused):
    (tmp_path / "held.jsonl").write_text('{"text": "the cat"}\n{"text": "on a hat"}\n')
    recipe = watched(tmp_path, "run", {**WATCH, "samples": 0, "texts": str(tmp_path / "held.jsonl")})
    assert HeldOut.open(recipe.watch, load_bundle(fused), 64).texts == ("the cat", "on a hat")
    run_finetune(recipe)
    assert "2 texts (15 bytes), 3 captioned images" in (tmp_path / "run/retention.md").read_text()


def test_a_model_of_text_alone_is_measured_on_text_and_draws_nothing(tmp_path, fused):
    reporter, recipe = Told(), watched(tmp_path, "run")
    raw = recipe.model_dump(mode="json") | {"model": str(tmp_path / "text"), "objective": {"cm3": 0.0}}
    raw["data"]["mix"].pop("b")
    run_finetune(FinetuneRecipe.model_validate(raw), reporter=reporter)
    assert [line for line in reporter.lines if line.startswith("watch:")] == [
        f"watch: {tmp_path / 'text'} has no image codes, or no image tokenizer; texts alone are measured",
        f"watch: {tmp_path / 'text'} cannot draw; no samples are made",
    ]
    assert not (tmp_path / "run/samples").exists()
    assert [row["image"] for row in rows(tmp_path / "run")] == [None] * 3
    assert parents_of(tmp_path / "text") == []


def test_what_cannot_be_watched_is_said_before_the_first_step(tmp_path, fused):
    recipe = watched(tmp_path, "run", {**WATCH, "retention": 0, "prompts": ["the cat " * 300]})
    with pytest.raises(GenerationError, match="shorten the prompt"):
        run_finetune(recipe)
    assert not (tmp_path / "run/log.jsonl").exists()
    with pytest.raises(RunError, match=r"watch over FSDP.*set watch: null"):
        check_engine(recipe, True, "FSDP")
    check_engine(watched(tmp_path, "run", None), True, "FSDP")


@pytest.mark.parametrize("watch", [{"retention": 0, "samples": 0}, {"samples": 0, "prompts": ["a"]}])
def test_a_section_that_would_do_nothing_is_refused(tmp_path, watch):
    with pytest.raises(ValueError, match="samples"):
        watched(tmp_path, "run", watch)
