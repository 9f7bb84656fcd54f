"""Laws of a training that survives: stops, damage, full disks and other numbers of ranks change nothing in silence."""

import errno
import json
import os
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import run as run_module
from finetune.loop import Trainer
from finetune.order.plan import PackedSource
from finetune.order.supply import EPOCHS
from finetune.recipe import FinetuneRecipe
from finetune.run import Interrupted, Reporter, run_finetune
from finetune.saving import checkpoint
from jam.errors import RunError
from jam.models.load import load_bundle
from tests.kill_points import outcome
from tests.laws.test_data_laws import plan_for, recipe_for
from tests.laws.test_training_laws import StopAfter
from tests.tiny import tiny_pair


class Lines(Reporter):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def recipe_in(tmp_path: Path, name: str = "run", **train) -> FinetuneRecipe:
    """Saves at 2, 4 and 6 of 7 steps, logs across them, and keeps an average."""
    raw = recipe_for(tmp_path).model_dump(mode="json")
    raw["train"] |= {"steps": 7, "ema": 0.9, "threads": 1} | train
    raw |= {"save": {"every": 2, "keep": 9}, "log": {"every": 3}, "output_dir": str(tmp_path / name)}
    return FinetuneRecipe.model_validate(raw)


def changed(recipe: FinetuneRecipe, **changes) -> FinetuneRecipe:
    return FinetuneRecipe.model_validate(recipe.model_dump(mode="json") | changes)


def train_of(recipe: FinetuneRecipe, **changes) -> dict:
    return recipe.model_dump(mode="json")["train"] | changes


@pytest.fixture
def whole(tmp_path) -> tuple[FinetuneRecipe, Path]:
    """A finished run, and what it came to."""
    tiny_pair(tmp_path)
    recipe = recipe_in(tmp_path)
    run_finetune(recipe)
    return recipe, tmp_path / "run"


def test_twenty_steps_equal_ten_and_ten(tmp_path):
    """Losses, weights, average and optimizer to the bit; on other threads sums end in other last bits, if let."""
    tiny_pair(tmp_path)
    run_finetune(recipe_in(tmp_path, "straight", steps=20))
    with pytest.raises(KeyboardInterrupt):
        run_finetune(recipe_in(tmp_path, "halves", steps=20), reporter=StopAfter(11))
    before = [folder.name for folder in checkpoint.listed(tmp_path / "halves")]
    assert before[0] == "checkpoint-10"
    shutil.copytree(tmp_path / "halves", tmp_path / "threads", symlinks=True)
    run_finetune(recipe_in(tmp_path, "halves", steps=20))
    straight, halves = outcome(tmp_path / "straight"), outcome(tmp_path / "halves")
    assert [line["step"] for line in straight["log"]] == [3, 6, 9, 12, 15, 18, 20]
    assert straight == halves
    told = Lines()
    try:
        other = recipe_in(tmp_path, "threads", steps=20, threads=2)
        with pytest.raises(RunError, match=r"train\.threads: was 1, is 2\); .* resume_allow"):
            run_finetune(other)
        run_finetune(changed(other, resume_allow=["train.threads"]), reporter=told)
    finally:
        torch.set_num_threads(1)
    assert "going on with what resume_allow names: train.threads: was 1, is 2" in told.lines
    assert not [line for line in told.lines if "read again" in line]
    for one, line in zip(straight["log"], outcome(tmp_path / "threads")["log"], strict=True):
        assert line["loss"] == pytest.approx(one["loss"], abs=1e-5) and line["tokens"] == one["tokens"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_ends_as_one_that_was_not(tmp_path, number):
    class Asks(Reporter):
        def step(self, report) -> None:
            if report.step == 5:
                os.kill(os.getpid(), number)

    tiny_pair(tmp_path)
    run_finetune(recipe_in(tmp_path, "straight"))
    with pytest.raises(Interrupted) as caught:
        run_finetune(recipe_in(tmp_path), reporter=Asks())
    assert caught.value.exit_code == 128 + number
    assert checkpoint.listed(tmp_path / "run")[0].name == "checkpoint-5"
    run_finetune(recipe_in(tmp_path))
    assert outcome(tmp_path / "run") == outcome(tmp_path / "straight")


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one(tmp_path, world):
    tiny_pair(tmp_path)
    plan, recipe = plan_for(tmp_path), recipe_in(tmp_path)

    def batch(rank: int, ranks: int, step: int):
        trainer = object.__new__(Trainer)
        trainer.plan, trainer.recipe = plan, recipe
        trainer.bundle = SimpleNamespace(vocabulary=plan.sources[0].bundle.vocabulary)
        trainer.accelerator = SimpleNamespace(num_processes=ranks, process_index=rank, device=torch.device("cpu"))
        return trainer.batch(step)

    for step in (0, 26, 3):  # 26 lies across two blocks of the mix
        alone, parts = batch(0, 1, step), [batch(rank, world, step) for rank in range(world)]
        for name in alone.__dataclass_fields__:
            joined = torch.stack([getattr(part, name) for part in parts], 1).flatten(0, 1)
            assert torch.equal(getattr(alone, name), joined), name


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        at = data.index(b'"sha256": "') + 20 if path.name == "MANIFEST.json" else len(data) // 2
        data[at] ^= 1
        path.write_bytes(data)


FILES = ("model.safetensors", "train/optimizer.safetensors", "train/ema.safetensors", "state.json", "MANIFEST.json")


@pytest.mark.parametrize("how", ["delete", "truncate", "flip"])
@pytest.mark.parametrize("victim", FILES)
def test_a_damaged_checkpoint_costs_steps_and_nothing_else(whole, victim, how):
    """The older one is used, aloud, and the run ends as it did; with every one damaged it says so and touches none."""
    recipe, run = whole
    wanted = outcome(run)
    shutil.rmtree(run / "final")
    newest, *older = checkpoint.listed(run)
    damage(newest / victim, how)
    told = Lines()
    run_finetune(recipe, reporter=told)
    assert [line for line in told.lines if line.startswith("WARNING")] == [
        line for line in told.lines if str(newest) in line and "is skipped" in line
    ]
    assert any(f"resuming from {older[0]} (step 6" in line for line in told.lines)
    assert outcome(run) == wanted
    for folder in checkpoint.listed(run):
        damage(folder / victim, how)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "run.lock"}
    with pytest.raises(RunError, match="holds checkpoints, but none verifies"):
        run_finetune(recipe)
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize("lost", ["train/optimizer.safetensors", "train/ema.safetensors"])
@pytest.mark.parametrize("way", ["unlisted", "emptied"])
def test_no_optimizer_or_average_is_ever_begun_afresh(whole, lost, way):
    """A checkpoint whose manifest agrees with the loss: the file is gone from both, or holds nothing in both."""
    recipe, run = whole
    for folder in checkpoint.listed(run):
        manifest = json.loads((folder / "MANIFEST.json").read_text())
        if way == "unlisted":
            (folder / lost).unlink()
            del manifest[lost]
        else:
            save_file({}, folder / lost)
            manifest[lost] = {"size": (folder / lost).stat().st_size, "sha256": checkpoint._digest(folder / lost)}
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"none verifies|covers 0 parameters|has 0 averages of \d+ tensors"):
        run_finetune(recipe)


def full(*unused, **also_unused):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["write_tensors", "header_of", "sync_path", "os.rename", "os.replace"])
def test_a_disk_that_fills_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch, place):
    tiny_pair(tmp_path)
    recipe, run = recipe_in(tmp_path), tmp_path / "run"
    run_finetune(recipe_in(tmp_path, "straight"))
    with pytest.raises(KeyboardInterrupt):
        run_finetune(recipe, reporter=StopAfter(3))
    with monkeypatch.context() as patch:
        target = checkpoint.os if place.startswith("os.") else checkpoint
        patch.setattr(target, place.removeprefix("os."), full)
        with pytest.raises(
            RunError, match=r"No space left on device.*, earlier checkpoints stay; free space"
        ) as caught:
            run_finetune(recipe)
    assert "\n" not in str(caught.value)
    assert not [path.name for path in run.iterdir() if "tmp" in path.name and "last" not in path.name]
    assert checkpoint.verify(run / "checkpoint-2") is None
    run_finetune(recipe)
    assert outcome(run) == outcome(tmp_path / "straight")


@contextmanager
def files_end_at(size: int):
    """No file of this process grows beyond so many bytes: the system's own refusal, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("place", ["log", "checkpoint", "final", "plot"])
def test_a_write_that_ends_halfway_is_gone_on_from(tmp_path, monkeypatch, place):
    tiny_pair(tmp_path)
    recipe, run = recipe_in(tmp_path), tmp_path / "run"
    run_finetune(recipe_in(tmp_path, "straight"))
    owner, name, size = {
        "log": (run_module, "append_log", 800),
        "checkpoint": (checkpoint, "save", 40_000),
        "final": (run_module, "write_final", 40_000),
        "plot": (run_module, "loss_curves", 2_000),
    }[place]
    real, calls = getattr(owner, name), []

    def limited(*args, **keywords):
        calls.append(name)
        if place in ("log", "checkpoint") and len(calls) < 2:
            return real(*args, **keywords)
        if place == "plot":
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            return real(*args, **keywords)
        with files_end_at(size):
            return real(*args, **keywords)

    with files_end_at(resource.RLIM_INFINITY), monkeypatch.context() as patch:
        patch.setattr(owner, name, limited)
        with pytest.raises(RunError, match="could not be written") as caught:
            run_finetune(recipe)
    assert "\n" not in str(caught.value)
    whole = checkpoint.listed(run)
    assert whole and all(checkpoint.verify(folder) is None for folder in whole)
    assert not (run / "final").exists() and not list(run.glob(".final*"))
    if place == "log":
        assert not (run / "log.jsonl").read_text().endswith("\n")  # half a line
    run_finetune(recipe)
    assert outcome(run) == outcome(tmp_path / "straight")


def test_other_data_is_refused_by_name_and_allowed_by_name(whole, tmp_path):
    recipe, _ = whole
    more = tmp_path / "more.jsonl"
    more.write_text(more.read_text().replace("other 3", "other 4"))
    with pytest.raises(RunError, match=r"\(content\.data\.mix\.b: was \w{12}, is \w{12}\); resume with the old"):
        run_finetune(recipe)
    told = Lines()
    run_finetune(changed(recipe, resume_allow=["content.data.mix.b"]), reporter=told)
    assert any(line.startswith("going on with what resume_allow names: content.data.mix.b") for line in told.lines)
    assert "step 7 is counted under these: some data may be read again and some left out" in told.lines


def test_other_words_of_the_same_model_are_refused(whole, tmp_path):
    recipe, _ = whole
    path = tmp_path / "image/tokenizer.json"
    words = json.loads(path.read_text())
    words["model"]["merges"].pop()
    path.write_text(json.dumps(words))
    with pytest.raises(RunError, match=r"content\.model\.text: was"):
        run_finetune(recipe)


@pytest.mark.parametrize("lora", [True, False])
def test_another_base_is_refused_under_adapters_alone(tmp_path, lora):
    """Adapters lie over the base's weights; a checkpoint without adapters has all of its own."""
    _, image = tiny_pair(tmp_path)
    recipe = changed(recipe_in(tmp_path, ema=None), lora={"r": 2} if lora else None)
    run_finetune(recipe)
    weights = load_file(image / "model.safetensors")
    name = next(key for key in weights if "fc1" in key)
    weights[name][0, 0] += 1
    save_file(weights, image / "model.safetensors", metadata={"format": "pt"})
    assert load_bundle(image)
    if lora:
        with pytest.raises(RunError, match=r"content\.model\.weights: was"):
            run_finetune(recipe)
    else:
        run_finetune(recipe)


def test_a_checkpoint_that_records_no_inputs_goes_on_and_says_so(whole):
    recipe, run = whole
    for folder in checkpoint.listed(run):
        state, manifest = (json.loads((folder / name).read_text()) for name in ("state.json", "MANIFEST.json"))
        del state["inputs"], state["read"], state["pending"]
        (folder / "state.json").write_text(json.dumps(state))
        path = folder / "state.json"
        manifest["state.json"] = {"size": path.stat().st_size, "sha256": checkpoint._digest(path)}
        (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    told = Lines()
    run_finetune(recipe, reporter=told)
    assert len([line for line in told.lines if "does not record its data and model" in line]) == 1


def test_an_average_that_is_asked_for_later_begins_with_the_weights_of_then(whole):
    """Once it began with the weights of before the run, which a finished run then put into ``final``."""
    recipe, _ = whole
    plain = changed(recipe, output_dir=recipe.output_dir.with_name("plain"), train=train_of(recipe, ema=None))
    trained = load_file(run_finetune(plain) / "model.safetensors")
    later = run_finetune(changed(plain, train=train_of(recipe, ema=0.9), resume_allow=["train.ema"]))
    for name, tensor in load_file(later / "model.safetensors").items():
        assert torch.equal(tensor, trained[name]), name


def test_an_average_that_is_given_up_is_gone(whole):
    recipe, run = whole
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoint-7")
    run_finetune(changed(recipe, train=train_of(recipe, ema=None), resume_allow=["train.ema"]))
    newest = checkpoint.listed(run)[0]
    assert newest.name == "checkpoint-7" and not (newest / "train/ema.safetensors").exists()
    weights = load_file(newest / "model.safetensors")
    for name, tensor in load_file(run / "final/model.safetensors").items():
        assert torch.equal(tensor, weights.get(name, tensor)), name


def test_damaged_checkpoints_never_cost_the_one_that_was_just_written(whole):
    """They are newer by number, and were once kept in its place."""
    recipe, run = whole
    for folder in checkpoint.listed(run)[:2]:
        damage(folder / "state.json", "truncate")
    with pytest.raises(KeyboardInterrupt):
        run_finetune(changed(recipe, save={"every": 5, "keep": 1}), reporter=StopAfter(6))
    assert [folder.name for folder in checkpoint.listed(run)] == ["checkpoint-7", "checkpoint-6", "checkpoint-5"]
    assert checkpoint.newest(run, lambda line: None) == run / "checkpoint-5"
    run_finetune(changed(recipe, save={"every": 5, "keep": 1}))
    assert [folder.name for folder in checkpoint.listed(run)] == ["checkpoint-7"]
    assert checkpoint.verify(run / "checkpoint-7") is None


def test_a_resumed_run_walks_no_window_again_unless_something_changed(tmp_path, monkeypatch):
    tiny_pair(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run_finetune(recipe_in(tmp_path, steps=60), reporter=StopAfter(54))
    shutil.copytree(tmp_path / "run", tmp_path / "other", symlinks=True)
    state = json.loads((checkpoint.listed(tmp_path / "run")[0] / "state.json").read_text())
    packed, pack = [], PackedSource._pack

    def noted(self, number):
        packed.append((self.number, number))
        return pack(self, number)

    monkeypatch.setattr(PackedSource, "_pack", noted)
    run_finetune(recipe_in(tmp_path, steps=60))
    for number, (window, start) in enumerate(state["walked"]):
        found = {one for source, one in packed if source == number}
        assert start > 0 and min(found - {*range(EPOCHS)}) == window > EPOCHS  # the first ones tell of the supply
    packed.clear()
    moved = changed(recipe_in(tmp_path, "other", steps=60), resume_allow=["objective"], objective={"cm3": 0.1})
    run_finetune(moved)
    assert {(0, EPOCHS), (1, EPOCHS)} <= set(packed)  # other lengths, other windows
