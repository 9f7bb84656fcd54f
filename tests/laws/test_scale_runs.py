"""Runs on several ranks: they go on under another engine and world, repeat bit for bit, and end together."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from finetune.recipe import FinetuneRecipe
from finetune.run import run_finetune
from tests.flows.test_training_mistakes import POISON
from tests.laws.ranks import launch
from tests.laws.test_data_laws import recipe_for
from tests.laws.test_training_laws import StopAfter, final_weights, log_lines
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross

needs_deepspeed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is no dependency")


def written(tmp_path: Path, cross: bool = False, **changes) -> Path:
    """A recipe of 10 steps with an average, saved every third step, as a file."""
    text, image = tiny_pair(tmp_path)
    raw = recipe_for(tmp_path).model_dump(mode="json")
    raw["model"] = str(tiny_cross(tmp_path / "fused", text, image, gate=0.5) if cross else image)
    raw["train"] |= {"steps": 10, "ema": 0.9, "micro_batch_size": 1}
    raw |= {"save": {"every": 3, "keep": 3}, "log": {"every": 1}} | changes
    file = tmp_path / "recipe.json"
    file.write_text(FinetuneRecipe.model_validate(raw).model_dump_json())
    return file


def recipe_at(file: Path, run: Path) -> FinetuneRecipe:
    return FinetuneRecipe.model_validate(json.loads(file.read_text()) | {"output_dir": str(run)})


def test_a_run_travels_from_one_process_to_ddp_to_fsdp2_and_back(tmp_path):
    file = written(tmp_path, cross=True)
    straight = run_finetune(recipe_at(file, tmp_path / "straight"))
    recipe = recipe_at(file, tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        run_finetune(recipe, reporter=StopAfter(4))
    launch(2, tmp_path / "ranks", "tests.laws.scale_runs:travel", file, tmp_path / "run")
    travelled = run_finetune(recipe)
    for name, tensor in final_weights(straight).items():
        torch.testing.assert_close(final_weights(travelled)[name], tensor, rtol=1e-4, atol=2e-5)
    expected, found = log_lines(tmp_path / "straight"), log_lines(tmp_path / "run")
    assert [line["step"] for line in found] == list(range(1, 11))
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]


def test_kills_and_resumes_under_ranks_change_no_bit(tmp_path):
    file = written(tmp_path)
    launch(2, tmp_path / "ranks", "tests.laws.scale_runs:repeat", file, tmp_path)
    for name in ("ddp", "fsdp2"):
        straight, broken = (tmp_path / f"{name}-{how}" for how in ("straight", "broken"))
        weights = final_weights(broken / "final")
        assert all(torch.equal(tensor, weights[key]) for key, tensor in final_weights(straight / "final").items())
        assert [line["loss"] for line in log_lines(straight)] == [line["loss"] for line in log_lines(broken)]


def test_adapters_train_under_ddp_as_on_one_process_and_are_refused_over_shards(tmp_path):
    file = written(tmp_path, lora={"r": 2, "new_rows": True})
    raw = json.loads(file.read_text())
    raw["train"] |= {"ema": None, "steps": 4}
    file.write_text(json.dumps(raw))
    one = run_finetune(recipe_at(file, tmp_path / "one"))
    launch(2, tmp_path / "ranks", "tests.laws.scale_runs:adapters", file, tmp_path / "two")
    for name, tensor in final_weights(one).items():
        torch.testing.assert_close(final_weights(tmp_path / "two/final")[name], tensor, rtol=1e-4, atol=2e-5)
    losses = [[line["loss"] for line in log_lines(tmp_path / run)] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_what_fails_on_one_rank_ends_all_of_them_in_its_words(tmp_path):
    launch(2, tmp_path / "ranks", "tests.laws.scale_runs:fail", written(tmp_path), tmp_path / "run")


def test_a_document_that_spoils_a_step_is_named_by_all_ranks(tmp_path):
    file = written(tmp_path)
    texts = tmp_path / "text.jsonl"
    texts.write_text(texts.read_text().replace("line 3 ", f"line 3 {POISON} "))
    launch(2, tmp_path / "ranks", "tests.laws.scale_runs:spoil", file, tmp_path / "run")


def test_an_error_of_all_ranks_is_said_once(tmp_path):
    launch(2, tmp_path / "ranks", "tests.laws.scale_runs:voices", written(tmp_path))
    said = "".join(log.read_text() for log in (tmp_path / "ranks").glob("*.log"))
    assert said.count("error: ") == 1 and "nowhere: no such folder" in said


@needs_deepspeed
def test_zero_3_goes_on_with_one_process_and_trains_the_same(tmp_path):
    file = written(tmp_path, cross=True)
    raw = json.loads(file.read_text())
    raw["train"]["ema"] = None
    raw["optim"]["groups"] = [{"match": r"layers\.0\.", "lr_mul": 0.0}, {"match": "embed", "lr_mul": 3.0}]
    file.write_text(json.dumps(raw))
    straight = run_finetune(recipe_at(file, tmp_path / "straight"))
    with pytest.raises(KeyboardInterrupt):
        run_finetune(recipe_at(file, tmp_path / "run"), reporter=StopAfter(4))
    launch(2, tmp_path / "ranks", "tests.laws.scale_runs:zero", file, tmp_path / "run")
    for name, tensor in final_weights(straight).items():
        torch.testing.assert_close(final_weights(tmp_path / "run/final")[name], tensor, rtol=1e-4, atol=2e-5)
    losses = [[line["loss"] for line in log_lines(tmp_path / run)] for run in ("straight", "run")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_rank_with_another_recipe_is_refused_before_anything_is_written(tmp_path):
    launch(2, tmp_path / "ranks", "tests.laws.scale_runs:differ", written(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
