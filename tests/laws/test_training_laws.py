"""Laws of training: packing changes no loss, micro-batches add up, kills and resumes change nothing."""

import errno
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune.data import code_cache
from finetune.loss import cross_entropy
from finetune.order.pack import Placed, collate
from finetune.recipe import FinetuneRecipe
from finetune.run import Reporter, run_finetune
from finetune.saving import checkpoint, final
from finetune.saving.resume import changed_settings, fixed_settings
from finetune.watching import log
from jam.errors import RunError
from jam.models.load import load_bundle
from tests.laws.scale_cases import trainer_of
from tests.laws.test_data_laws import recipe_for, tokens_of
from tests.tiny import tiny_pair

ROOT = Path(__file__).parents[2]


def nats(bundle, placed: list[Placed], length: int) -> torch.Tensor:
    batch = collate([placed], [0], length, pad=1)
    logits, _ = bundle.logits(batch.ids, batch.head_ids, attention_mask=batch.mask, position_ids=batch.positions)
    return cross_entropy(logits.float(), batch)[0][batch.labels[0] >= 0]


def test_packed_loss_equals_separate_documents(tmp_path):
    _, image = tiny_pair(tmp_path)
    bundle = load_bundle(image)
    placed = [Placed(tokens_of(seed, images=1), offset) for seed, offset in ((0, 0), (1, 31), (2, 7))]
    with torch.no_grad():
        packed = nats(bundle, placed, 128)
        separate = torch.cat([nats(bundle, [one], len(one.tokens)) for one in placed])
    assert torch.allclose(packed, separate, atol=1e-5)
    assert packed.std() > 0.1  # the tiny model is not uniform


def with_train(recipe: FinetuneRecipe, **train) -> FinetuneRecipe:
    raw = recipe.model_dump(mode="json")
    raw["train"] |= train
    raw["output_dir"] = raw["output_dir"] + "-" + "-".join(f"{k}{v}" for k, v in train.items())
    return FinetuneRecipe.model_validate(raw)


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def log_lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


class StopAfter(Reporter):
    """Cuts a run short as a kill would: an exception between two steps, nothing saved on the way out."""

    def __init__(self, step: int):
        self.last = step

    def step(self, report) -> None:
        if report.step == self.last:
            raise KeyboardInterrupt


def test_eight_micro_batches_of_one_equal_one_of_eight(tmp_path):
    tiny_pair(tmp_path)
    recipe = recipe_for(tmp_path)
    one = run_finetune(with_train(recipe, micro_batch_size=8, global_batch_size=8))
    many = run_finetune(with_train(recipe, micro_batch_size=1, global_batch_size=8))
    for name, tensor in final_weights(one).items():
        assert torch.allclose(tensor, final_weights(many)[name], atol=2e-5), name
    losses = [log_lines(folder.parent)[-1]["loss"] for folder in (one, many)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_gradients_of_eight_micro_batches_are_those_of_one(tmp_path):
    """In float64, before Adam, which would hide any factor on all of them."""
    tiny_pair(tmp_path)
    found = []
    for size in (8, 2, 1):
        raw = recipe_for(tmp_path, loss={"text": 0.7, "z": 1e-2}).model_dump(mode="json")
        raw["train"] |= {"micro_batch_size": size, "global_batch_size": 8}
        trainer = trainer_of(FinetuneRecipe.model_validate(raw))
        batch = trainer.batch(0)
        loss, logged, _ = trainer.backward(batch)
        assert batch.weights.sum(1).std() > 1  # rows that count unequally: a mean of means is another number
        gradients = {f"gradient.{name}": p.grad for name, p in trainer.bundle.model.named_parameters()}
        found.append(gradients | {"loss": loss, "logged": logged})
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("ema", "optimizer"), [(None, "adamw"), (0.9, "adamw"), (None, "muon")])
def test_killed_and_resumed_equals_uninterrupted_bit_for_bit(tmp_path, ema, optimizer):
    _, image = tiny_pair(tmp_path)
    base = recipe_for(tmp_path).model_dump(mode="json")
    base["save"] = {"every": 3, "keep": 2}
    base["train"] = base["train"] | {"steps": 10, "ema": ema}
    base["optim"] = base["optim"] | {"name": optimizer}
    straight = run_finetune(FinetuneRecipe.model_validate(base | {"output_dir": str(tmp_path / "straight")}))
    broken = FinetuneRecipe.model_validate(base | {"output_dir": str(tmp_path / "broken")})
    for stop in (4, 5, 8):
        with pytest.raises(KeyboardInterrupt):
            run_finetune(broken, reporter=StopAfter(stop))
    resumed = run_finetune(broken)
    before = final_weights(image)
    for name, tensor in final_weights(straight).items():
        assert torch.equal(tensor, final_weights(resumed)[name]), name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in final_weights(straight).items())
    steps = [line["step"] for line in log_lines(tmp_path / "broken")]
    assert steps == sorted(set(steps))


def train_a_little(tmp_path: Path) -> tuple[FinetuneRecipe, Path]:
    tiny_pair(tmp_path)
    raw = recipe_for(tmp_path).model_dump(mode="json")
    raw["save"] = {"every": 2, "keep": 3}
    recipe = FinetuneRecipe.model_validate(raw)
    run_finetune(recipe)
    return recipe, tmp_path / "run"


@pytest.mark.parametrize(
    "victim", ["model.safetensors", "train/optimizer.safetensors", "state.json", "COMPLETE", "MANIFEST.json"]
)
@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_damaged_checkpoint_is_never_resumed_in_silence(tmp_path, victim, damage):
    """transformers' Trainer resumes with a fresh optimizer where it is missing; here the older one is used, aloud."""
    _, run = train_a_little(tmp_path)
    newest = checkpoint.listed(run)[0]
    path = newest / victim
    if damage == "remove" or path.stat().st_size == 0:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    lines: list[str] = []
    found = checkpoint.newest(run, lines.append)
    assert found == checkpoint.listed(run)[1]
    assert len(lines) == 1 and str(newest) in lines[0]


@pytest.mark.parametrize("manifest", ["[1]", "{}", '{"model.safetensors": 3}', '{"model.safetensors": {"size": 1}}'])
def test_a_manifest_that_proves_nothing_is_not_trusted(tmp_path, manifest):
    _, run = train_a_little(tmp_path)
    (checkpoint.listed(run)[0] / "MANIFEST.json").write_text(manifest)
    lines: list[str] = []
    assert checkpoint.newest(run, lines.append) == checkpoint.listed(run)[1] and "MANIFEST.json" in lines[0]


def test_a_log_with_broken_lines_is_trimmed(tmp_path):
    recipe, run = train_a_little(tmp_path)
    whole = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(whole + '{"broken\n{"a": 1}\n{"step": 99}\n{"st')
    run_finetune(recipe)
    assert (run / "log.jsonl").read_text() == whole


@pytest.mark.parametrize("out", ["image", "image/run"])
def test_a_run_inside_its_model_is_refused(tmp_path, out):
    tiny_pair(tmp_path)
    raw = recipe_for(tmp_path).model_dump(mode="json")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunError, match="lies inside the model"):
        run_finetune(FinetuneRecipe.model_validate(raw | {"model": tmp_path / "image", "output_dir": tmp_path / out}))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_under_the_log_is_one_line(tmp_path, monkeypatch):
    tiny_pair(tmp_path)

    def full(run, line):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("finetune.run.append_log", full)
    with pytest.raises(RunError, match=r"run: could not be written \(No space left on device\)"):
        run_finetune(recipe_for(tmp_path))


def test_an_interrupt_while_saving_leaves_nothing_half_written(tmp_path, monkeypatch):
    tiny_pair(tmp_path)

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "_digest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_finetune(recipe_for(tmp_path))
    assert not [path for path in (tmp_path / "run").iterdir() if "tmp" in path.name or "checkpoint" in path.name]


def test_a_changed_setting_is_refused_with_its_name(tmp_path):
    recipe, _ = train_a_little(tmp_path)
    raw = recipe.model_dump(mode="json")
    raw["optim"]["lr"] = 0.5
    recorded = (tmp_path / "run/recipe.resolved.yaml").read_text()
    with pytest.raises(RunError, match=r"optim\.lr: was .* is 0\.5"):
        run_finetune(FinetuneRecipe.model_validate(raw))
    assert (tmp_path / "run/recipe.resolved.yaml").read_text() == recorded  # still that of the checkpoints


def test_a_run_can_be_repeated_from_its_own_record(tmp_path):
    recipe, run = train_a_little(tmp_path)
    (run / "recipe.source.yaml").write_text("kind: finetune\n")
    run_finetune(recipe, source=run / "recipe.source.yaml")
    assert (run / "recipe.source.yaml").read_text() == "kind: finetune\n"


def test_two_runs_on_one_folder_are_refused(tmp_path):
    from finetune.run import run_lock

    tiny_pair(tmp_path)
    with run_lock(tmp_path / "run"), pytest.raises(RunError, match="in use"):
        run_finetune(recipe_for(tmp_path))


def test_a_frozen_group_does_not_move_and_the_rest_does(tmp_path):
    _, image = tiny_pair(tmp_path)
    raw = recipe_for(tmp_path).model_dump(mode="json")
    raw["optim"]["groups"] = [{"match": r"layers\.0\.", "lr_mul": 0.0}]
    final = final_weights(run_finetune(FinetuneRecipe.model_validate(raw)))
    before = final_weights(image)
    frozen = [name for name in before if "layers.0." in name]
    assert frozen and all(torch.equal(before[name], final[name]) for name in frozen)
    assert not torch.equal(before["model.decoder.layers.1.fc1.weight"], final["model.decoder.layers.1.fc1.weight"])
    raw["optim"]["groups"] = [{"match": "no such name", "lr_mul": 0.0}]
    raw["output_dir"] = str(tmp_path / "other")
    with pytest.raises(RunError, match="no such name"):
        run_finetune(FinetuneRecipe.model_validate(raw))


def test_final_folder_loads_without_jam(tmp_path):
    from transformers import AutoModelForCausalLM

    _, image = tiny_pair(tmp_path)
    (image / "README.md").write_text("The weights are an initialisation: continue training before use.")
    run = run_finetune(recipe_for(tmp_path)).parent
    card = (run / "final/README.md").read_text()
    learnt = log_lines(run)[-1]["tokens"]
    assert "initialisation" not in card and f" {learnt:,} predicted tokens" in card and learnt < 4 * 4 * 64
    shutil.rmtree(image)
    assert (run / "final/model.safetensors").stat().st_mode == (run / "final/config.json").stat().st_mode
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    assert model.config.vocab_size == load_bundle(run / "final").vocabulary.size


def test_what_gets_a_name_by_renaming_is_on_disk_before(tmp_path, monkeypatch):
    """Else a name may outlive a power cut and its content not: a ``final`` that looks whole and is empty."""
    tiny_pair(tmp_path)
    synced: set[Path] = set()
    rename, whole = os.rename, []

    def renamed(old, new) -> None:
        if Path(new).name == "final":
            whole.append({Path(old), *Path(old).rglob("*")} <= synced)
        rename(old, new)

    for module in (final, log, code_cache):
        monkeypatch.setattr(module, "sync_path", synced.add)
    monkeypatch.setattr(os, "rename", renamed)
    run_finetune(recipe_for(tmp_path))
    assert whole == [True] and tmp_path / "run" in synced
    log.trim_log(tmp_path / "run", 0)
    assert tmp_path / "run/.log.jsonl.tmp" in synced
    code_cache._write_codes(tmp_path / "codes-0.npy", np.zeros((2, 4), np.uint16))
    assert [path for path in synced if path.name.startswith("codes-0.tmp-")]


def test_two_ranks_equal_one(tmp_path):
    """Guards the run folder's lock: every rank once asked for it, and the second was refused."""
    tiny_pair(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(recipe_for(tmp_path).model_dump(mode="json")))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    launcher += ["--config_file", str(ROOT / "recipes/launch/ddp.yaml")]
    command = [*launcher, "-m", "jam.cli", "finetune", str(recipe), f"output_dir={tmp_path / 'two'}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    one = run_finetune(recipe_for(tmp_path))
    for name, tensor in final_weights(one).items():
        assert torch.allclose(tensor, final_weights(tmp_path / "two/final")[name], atol=2e-5), name
    losses = [log_lines(run)[-1]["loss"] for run in (one.parent, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_a_checkpoint_that_is_being_removed_has_no_name_that_looks_whole(tmp_path, monkeypatch):
    """A kill in the middle of rotating old checkpoints once left a ``checkpoint-6`` without its state."""
    _, run = train_a_little(tmp_path)
    victims = checkpoint.listed(run)
    assert len(victims) > 1

    def killed(folder, **unused) -> None:
        raise KeyboardInterrupt  # at the first file that would go

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda f, ignore_errors=False: None if ignore_errors else killed(f))
        with pytest.raises(KeyboardInterrupt):
            checkpoint.rotate(run, 4, keep=1)
    assert len(checkpoint.listed(run)) == len(victims) - 1
    assert all(checkpoint.verify(folder) is None for folder in checkpoint.listed(run))
    checkpoint.remove_stale(run)
    assert not list(run.glob(".*.tmp-*"))


def test_a_setting_newer_than_the_checkpoint_had_its_default_and_an_older_one_is_named(tmp_path):
    recipe = recipe_for(tmp_path)
    recorded = fixed_settings(recipe)
    assert changed_settings(recorded, recipe) == []
    del recorded["objective"]["own_codes"]
    assert changed_settings(recorded, recipe) == []
    recorded["optim"]["lr"] = 7.0
    assert changed_settings(recorded, recipe) == [f"optim.lr: was 7.0, is {recipe.optim.lr}"]
    recorded["optim"]["lr"] = recipe.optim.lr
    assert changed_settings({key: recorded[key] for key in recorded if key != "order"}, recipe) == [
        "order: was shuffled, is feistel, cut for CM3, joined by choice, shares as asked"
    ]
    recorded["objective"]["gone"] = 1
    assert "objective.gone: was 1, is None" in changed_settings(recorded, recipe)


def shift(step: int, **changes: object) -> Callable[[Path], None]:
    """Rewrites state.json of a checkpoint, and its hash."""

    def change(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | {"step": step} | changes))

    return change


def reshaped(name: str, shape: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Rewrites the first matrix of a file of tensors."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / name)
        key = min(key for key, tensor in tensors.items() if tensor.dim() == 2)
        save_file(tensors | {key: shape(tensors[key]).contiguous()}, folder / name)

    return change


def hashed_again(folder: Path) -> None:
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    for name in manifest:
        data = (folder / name).read_bytes()
        manifest[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def averaged(tmp_path_factory) -> Path:
    """A run of five steps with an average, and checkpoints 2, 4 and 5; the recipe lies beside it."""
    root = tmp_path_factory.mktemp("averaged")
    tiny_pair(root)
    raw = recipe_for(root).model_dump(mode="json")
    raw |= {"save": {"every": 2, "keep": 9}}
    raw["train"] |= {"steps": 5, "ema": 0.9}
    (root / "raw.json").write_text(json.dumps(raw))
    run_finetune(FinetuneRecipe.model_validate(raw))
    return root


def resumable(averaged: Path, tmp_path: Path, **train: object) -> tuple[FinetuneRecipe, Path]:
    """A copy of the run that has checkpoints 2 and 4 alone."""
    raw = json.loads((averaged / "raw.json").read_text())
    shutil.copytree(averaged / "run", tmp_path / "run", symlinks=True)
    for name in ("checkpoint-5", "final"):
        shutil.rmtree(tmp_path / "run" / name)
    raw["train"] |= train
    allow = [f"train.{name}" for name in train]
    recipe = FinetuneRecipe.model_validate(raw | {"output_dir": str(tmp_path / "run"), "resume_allow": allow})
    return recipe, tmp_path / "run/checkpoint-4"


@pytest.mark.parametrize(
    "change",
    [shift(3), shift(-1), shift("4"), shift(4, tokens=None), shift(4, settings=[]), shift(4, read=["x"])],
)
def test_a_state_that_is_of_another_step_or_no_state_is_skipped_aloud(averaged, tmp_path, change):
    """Its hash may fit: what a state says is looked at too."""
    _, folder = resumable(averaged, tmp_path)
    change(folder)
    hashed_again(folder)
    lines: list[str] = []
    assert checkpoint.newest(folder.parent, lines.append) == folder.with_name("checkpoint-2")
    assert len(lines) == 1 and "its state.json" in lines[0]


@pytest.mark.parametrize("name", ["model.safetensors", "train/optimizer.safetensors", "train/ema.safetensors"])
@pytest.mark.parametrize("shape", [lambda t: t[:1], lambda t: t[0, 0], lambda t: t.half()], ids=["row", "one", "half"])
def test_tensors_of_another_shape_or_type_are_refused_and_never_spread(averaged, tmp_path, name, shape):
    recipe, folder = resumable(averaged, tmp_path)
    reshaped(name, shape)(folder)
    hashed_again(folder)
    with pytest.raises(RunError, match=r"the checkpoint's .* is F(16|32) \[.*\], F32 \[.*\] is required"):
        run_finetune(recipe)
    assert not (folder.parent / "final").exists()


def test_moments_of_another_optimizer_are_refused(averaged, tmp_path):
    recipe, _ = resumable(averaged, tmp_path)
    other = recipe.model_dump(mode="json") | {"resume_allow": ["optim"]}
    other["optim"] |= {"name": "muon"}
    with pytest.raises(RunError, match=r"keeps exp_avg, exp_avg_sq, step of .*, this run's momentum_buffer"):
        run_finetune(FinetuneRecipe.model_validate(other))


def test_an_average_may_be_given_up_on_the_way(averaged, tmp_path):
    recipe, _ = resumable(averaged, tmp_path, ema=None)
    assert run_finetune(recipe).is_dir()


def test_an_average_that_begins_on_the_way_begins_with_the_weights_of_then(averaged, tmp_path):
    recipe, folder = resumable(averaged, tmp_path, ema=None)
    run_finetune(recipe)
    last = checkpoint.listed(folder.parent)[0]
    shutil.rmtree(last)
    shutil.rmtree(folder.parent / "final")
    state = json.loads((folder / "state.json").read_text())
    state["settings"]["train"]["ema"] = None  # as a run without an average leaves it
    (folder / "state.json").write_text(json.dumps(state))
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    del manifest["train/ema.safetensors"]
    (folder / "train/ema.safetensors").unlink()
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    hashed_again(folder)
    again = recipe.model_dump(mode="json")
    again["train"]["ema"] = 0.9
    run_finetune(FinetuneRecipe.model_validate(again))
    before, after = (load_file(one / "model.safetensors") for one in (folder, last))
    decay = (1 + 4) / (10 + 4)  # of the fifth step
    for name, found in load_file(last / "train/ema.safetensors").items():
        torch.testing.assert_close(found, before[name].lerp(after[name], 1 - decay))


def test_a_run_is_not_cut_shorter_than_it_went(averaged, tmp_path):
    recipe, _ = resumable(averaged, tmp_path, steps=3)
    with pytest.raises(RunError, match="is 4 steps into a run of 3"):
        run_finetune(recipe)


def test_weights_that_are_no_numbers_are_never_the_final_ones(tmp_path):
    """A decay that overflows breaks them in the last step, which no loss sees any more."""
    tiny_pair(tmp_path)
    raw = recipe_for(tmp_path).model_dump(mode="json")
    raw["train"] |= {"steps": 1}
    raw["optim"] |= {"weight_decay": 1e308, "warmup": 0}
    with pytest.raises(RunError, match="has numbers that are not finite as float32"):
        run_finetune(FinetuneRecipe.model_validate(raw))
    assert not (tmp_path / "run/final").exists() and not list((tmp_path / "run").glob(".final*"))
