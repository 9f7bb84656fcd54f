"""The log on boards: each step once also after a resume, packages asked for only if wanted, no network by default.

W&B is a stand-in module with the calls that are made of it.
"""

import json
import sys
from types import SimpleNamespace

import pytest

from finetune.recipe import FinetuneRecipe
from finetune.run import run_finetune
from jam.cli import main
from jam.recipe import dump_recipe
from tests.laws.test_data_laws import recipe_for
from tests.laws.test_training_laws import StopAfter, log_lines
from tests.tiny import tiny_pair


def logged(tmp_path, log: dict) -> FinetuneRecipe:
    raw = recipe_for(tmp_path).model_dump(mode="json")
    raw["train"] |= {"steps": 8}
    return FinetuneRecipe.model_validate(raw | {"save": {"every": 3, "keep": 2}, "log": {"every": 1} | log})


def test_tensorboard_reads_back_the_log_with_each_step_once_after_a_kill(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install 'jam[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tiny_pair(tmp_path)
    recipe = logged(tmp_path, {"tensorboard": True})
    for stop in (2, 5):  # before the first checkpoint, and two steps after it
        with pytest.raises(KeyboardInterrupt):
            run_finetune(recipe, reporter=StopAfter(stop))
    run_finetune(recipe)
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    lines = log_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 9))
    for name in ("loss", "loss/text", "share/a", "target/a", "lr", "tokens_per_second"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(line["step"], pytest.approx(line[name], rel=1e-5)) for line in lines]


class Wandb:
    """What is used of the package."""

    def __init__(self) -> None:
        self.begun: list[dict] = []
        self.steps: list[int] = []
        self.finished = 0

    def init(self, **arguments):
        self.begun.append(arguments)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values: dict, step: int) -> None:
        assert values["loss"] > 0 and "step" not in values
        self.steps.append(step)

    def finish(self) -> None:
        self.finished += 1

    Settings = SimpleNamespace


def test_wandb_is_offline_and_is_sent_each_step_once(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    tiny_pair(tmp_path)
    recipe = logged(tmp_path, {"wandb": "cats"})
    with pytest.raises(KeyboardInterrupt):
        run_finetune(recipe, reporter=StopAfter(5))
    run_finetune(recipe)
    assert wandb.steps == list(range(1, 9))  # 4 was logged, then trained again
    assert [one["mode"] for one in wandb.begun] == ["offline"] * 2 and wandb.finished == 2
    assert len({one["id"] for one in wandb.begun}) == 1
    assert (wandb.begun[0]["project"], wandb.begun[0]["config"]["train"]["steps"]) == ("cats", 8)
    assert json.loads((tmp_path / "run/wandb.json").read_text())["step"] == 8
    monkeypatch.setenv("WANDB_MODE", "disabled")
    run_finetune(recipe)
    assert wandb.begun[-1]["mode"] == "disabled"


@pytest.mark.parametrize(("package", "log"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "cats"})])
def test_a_missing_package_is_one_line_before_the_run_starts(tmp_path, monkeypatch, capsys, package, log):
    for name in [name for name in sys.modules if package in name.split(".")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)  # an import fails
    tiny_pair(tmp_path)
    capsys.readouterr()
    (tmp_path / "recipe.yaml").write_text(dump_recipe(logged(tmp_path, log)))
    assert main(["finetune", str(tmp_path / "recipe.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: log.{package}: the package {package} cannot be imported")
    assert f"pip install 'jam[{package}]'" in line
    assert not (tmp_path / "run").exists()


def test_nothing_is_imported_that_was_not_asked_for(tmp_path, monkeypatch):
    for package in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, package, None)  # an import would fail
    tiny_pair(tmp_path)
    run_finetune(logged(tmp_path, {}))
