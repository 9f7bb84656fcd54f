"""Activation checkpointing changes memory and nothing else; every rank and step draws its own numbers."""

import json

import pytest
import torch

from finetune.loop import checkpoint_layers, step_seed
from finetune.loss import TokenLoss
from finetune.recipe import FinetuneRecipe, LossSection
from finetune.run import run_finetune
from jam.models.load import load_bundle
from tests.finetune.test_loss import batch_of
from tests.laws.test_data_laws import recipe_for
from tests.laws.test_training_laws import final_weights, log_lines
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross


@pytest.mark.parametrize("name", ["opt", "chameleon", "gemma3_text", "separate", "shared"])
def test_checkpointing_makes_layers_twice_to_the_same_bits(tmp_path, name):
    cross = name in ("separate", "shared")
    text, folder = tiny_pair(tmp_path, **({} if cross else {"family": name}))
    folder = tiny_cross(tmp_path / "fused", text, folder, gate=0.5, tables=name) if cross else folder
    found, calls = [], []
    for on in (False, True):
        bundle = load_bundle(folder)
        bundle.model.train()
        if on:
            checkpoint_layers(bundle.model)
        count = [0]
        for module in bundle.model.modules():
            if isinstance(module, torch.nn.Linear) and module is not bundle.model.get_output_embeddings():
                module.register_forward_hook(lambda *unused, count=count: count.__setitem__(0, count[0] + 1))
        nats = TokenLoss(bundle, LossSection())(batch_of())[0]
        nats.mean().backward()
        found.append([nats.detach(), *(parameter.grad for parameter in bundle.model.parameters())])
        calls.append(count[0])
    assert calls[1] > 1.7 * calls[0]
    assert all(torch.equal(plain, again) for plain, again in zip(*found, strict=True))


@pytest.mark.parametrize("lora", [None, {"r": 2, "dropout": 0.2}])
def test_a_run_with_checkpointing_equals_one_without(tmp_path, lora):
    text, image = tiny_pair(tmp_path)
    raw = recipe_for(tmp_path).model_dump(mode="json")
    raw |= {"model": str(tiny_cross(tmp_path / "fused", text, image, gate=0.5)), "lora": lora}
    finals = []
    for on in (False, True):
        raw["train"]["checkpointing"], raw["output_dir"] = on, str(tmp_path / f"{on}")
        finals.append(run_finetune(FinetuneRecipe.model_validate(raw)))
    plain, again = (final_weights(folder) for folder in finals)
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())
    losses = [[line["loss"] for line in log_lines(folder.parent)] for folder in finals]
    assert losses[0] == losses[1]


def test_every_rank_and_step_draws_its_own_numbers():
    """A CPU's generator leaves out all but 32 bits of its seed: ranks told apart above them drew the same."""
    found = set()
    for rank in range(8):
        for step in range(4):
            torch.manual_seed(step_seed(3, step, rank))
            found.add(tuple(torch.rand(2).tolist()))
    assert len(found) == 32


def test_a_model_without_a_pad_token_trains_the_same(tmp_path):
    """As language models are published: Llama's and Mistral's have none."""
    _, image = tiny_pair(tmp_path)
    recipe = recipe_for(tmp_path)
    padded = final_weights(run_finetune(recipe))
    record = json.loads((image / "jam.json").read_text())
    del record["vocabulary"]["controls"]["pad"]
    (image / "jam.json").write_text(json.dumps(record))
    plain = run_finetune(recipe.model_copy(update={"output_dir": tmp_path / "plain"}))
    assert all(torch.equal(tensor, padded[name]) for name, tensor in final_weights(plain).items())
