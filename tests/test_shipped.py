"""The shipped default: built from its parts once, found again, never half there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jam import assets
from jam import shipped as shipped_module
from jam.difference import write_difference
from jam.errors import CheckpointError
from jam.models.load import load_bundle
from jam.recipe import dump_recipe
from jam.shipped import parts_of, shipped_model
from merge.recipe import MergeRecipe
from merge.run import run_merge
from tests.tiny import tiny_pair


@pytest.fixture
def shipped(tmp_path, monkeypatch) -> Path:
    """A tiny installation: parents, and a cross chat model as recipe + difference. Returns the tuned model's folder."""
    text, image = tiny_pair(tmp_path / "parents", num_hidden_layers=2)
    chat, tuned = tmp_path / "chat", tmp_path / "tuned"
    recipe = MergeRecipe(method="cross", text=text, image=image, out=tmp_path / "merged")
    run_merge(recipe)
    bundle = load_bundle(recipe.out)
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if name.endswith("gate"):
                parameter.fill_(0.5)
    shutil.copytree(recipe.out, tuned)
    bundle.model.to(torch.bfloat16).save_pretrained(tuned)
    shutil.copy2(recipe.out / "config.json", tuned / "config.json")
    chat.mkdir()
    plain = recipe.model_copy(update={"text": None, "image": None, "out": Path("chat")})
    (chat / "merge.yaml").write_text(dump_recipe(plain))
    (chat / "README.md").write_text("the card of the chat model\n")
    write_difference(recipe.out, tuned, chat / "difference.safetensors")
    monkeypatch.setattr(assets, "TEXT_PARENT", text)
    monkeypatch.setattr(assets, "IMAGE_PARENT", image)
    monkeypatch.setattr(assets, "CHAT", chat)
    monkeypatch.setenv("JAM_CACHE", str(tmp_path / "cache"))
    return tuned


def cached(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def test_first_use_gives_the_tuned_model(shipped, tmp_path):
    found, expected = load_bundle(shipped_model()), load_bundle(shipped)
    wanted = expected.model.state_dict()
    assert any(name.endswith("gate") and tensor.item() == 0.5 for name, tensor in wanted.items())
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name
    assert (found.path / "README.md").read_text() == "the card of the chat model\n"
    assert cached(tmp_path) == [found.path.name]


def test_what_a_killed_builder_left_is_removed_and_no_step_is_told(shipped, tmp_path, capsys):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    final = shipped_model()
    shutil.rmtree(final)
    (tmp_path / "cache" / f".{final.name}.tmp-{dead.pid}" / "merged").mkdir(parents=True)
    capsys.readouterr()
    shipped_model()
    assert cached(tmp_path) == [final.name]
    assert capsys.readouterr().err == "jam: making the shipped model mini from its parts, once (seconds)\n"


def test_the_second_use_builds_nothing(shipped, monkeypatch):
    first = shipped_model()
    monkeypatch.setattr(shipped_module, "_build", lambda *unused: pytest.fail("built twice"))
    assert shipped_model() == first


def test_other_weights_are_another_model(shipped):
    first = shipped_model()
    shutil.rmtree(assets.TEXT_PARENT)
    shutil.rmtree(assets.IMAGE_PARENT)
    tiny_pair(assets.TEXT_PARENT.parent, seed=1, num_hidden_layers=2)
    assert parts_of("mini").key not in first.name


def test_a_failure_leaves_nothing_and_the_next_call_works(shipped, tmp_path, monkeypatch):
    def broken(parts: shipped_module.Parts, work: Path) -> None:
        (work / "tuned").mkdir(parents=True)
        (work / "tuned" / "config.json").write_text("{}")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shipped_module, "_build", broken)
        with pytest.raises(OSError, match="No space left"):
            shipped_model()
    assert cached(tmp_path) == []
    assert (shipped_model() / "model.safetensors").exists()


def test_a_difference_of_other_parents_is_refused(shipped, tmp_path):
    recipe = assets.CHAT / "merge.yaml"
    recipe.write_text(recipe.read_text().replace("ffn_ratio: 4", "ffn_ratio: 2"))
    with pytest.raises(CheckpointError, match="made for base"):
        shipped_model()
    assert cached(tmp_path) == []


def test_a_whole_model_is_used_where_it_lies(shipped, monkeypatch):
    monkeypatch.setattr(assets, "CHAT", shipped)
    assert shipped_model() == shipped


def test_missing_parts_are_named(shipped):
    (assets.CHAT / "difference.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"difference\.safetensors: missing; .* give the path of a model"):
        shipped_model()
