"""Every class that jam runs under transformers' Trainer and peft, as users drive them without jam's own training."""

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from finetune.lora import new_rows, targets
from jam.models.families import FAMILIES
from jam.models.load import Bundle, load_bundle
from jam.tokens.render import render
from merge.recipe import MergeRecipe, WidthSection
from merge.run import run_merge
from tests.tiny import tiny_document, tiny_pair
from tests.tiny_cross import tiny_cross

CROSS = ("separate", "apart", "shared", "unequal")
MERGED = ("uniform", "width", "width_own")
NAMES = [*FAMILIES, *MERGED, *CROSS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("ecosystem")
    found = {family: tiny_pair(root / family, family=family, num_hidden_layers=2)[1] for family in FAMILIES}
    text, image = tiny_pair(root)
    for name in MERGED:
        method, section = name.partition("_")[0], WidthSection(head="own" if "own" in name else "sum")
        chosen = {"width": section} if method == "width" else {}
        recipe = MergeRecipe(method=method, text=text, image=image, out=root / name, dtype="float32", **chosen)
        found[name] = run_merge(recipe, quiet=True)
    for tables in ("separate", "shared"):
        found[tables] = tiny_cross(root / tables, text, image, gate=0.5, tables=tables)
    found["apart"] = tiny_cross(root / "apart", *tiny_pair(root / "two", tie_word_embeddings=False), gate=0.5)
    other = {"text_family": "llama", "image_hidden_size": 48, "image_num_hidden_layers": 2}
    found["unequal"] = tiny_cross(root / "unequal", *tiny_pair(root / "three", **other), gate=0.5)
    return found


def ids_of(bundle: Bundle, seed: int) -> torch.Tensor:
    tokens = render(tiny_document(seed), bundle.vocabulary, bundle.text)
    return torch.from_numpy(tokens.ids)[None].long()


def replies(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    model.eval()
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("name", NAMES)
def test_the_trainer_trains_saves_and_the_folder_generates(folders, name, tmp_path):
    bundle = load_bundle(folders[name])
    before = {key: tensor.clone() for key, tensor in bundle.model.state_dict().items()}
    data = [{"input_ids": ids, "labels": ids} for ids in (ids_of(bundle, 0)[0] for _ in range(4))]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[], use_cpu=True,
        disable_tqdm=True, save_steps=3, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(bundle.model, arguments, train_dataset=data)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    moved = [key for key, tensor in bundle.model.state_dict().items() if not torch.equal(tensor, before[key])]
    assert len(moved) > len(before) // 2
    saved = tmp_path / "checkpoint-3"
    again = type(bundle.model).from_pretrained(saved)
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in bundle.model.state_dict().items())
    prompt = ids_of(bundle, 1)[:, :9]
    assert torch.equal(replies(again, prompt), replies(bundle.model, prompt))
    for part in ("jam.json", "tokenizer.json"):  # what a jam folder has beside transformers' own files
        shutil.copy(folders[name] / part, saved / part)
    shutil.copytree(folders[name] / "image_tokenizer", saved / "image_tokenizer")
    whole = load_bundle(saved)
    assert torch.equal(replies(whole.model, prompt), replies(bundle.model, prompt))


def learn(model: PeftModel, ids: torch.Tensor) -> torch.Tensor:
    """Two steps; returns the scores after them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(input_ids=ids).logits.detach()


KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
ROWS = ("indices", "modules", "none")
GRID = [(method, rows) for method in KINDS for rows in ROWS]
# every class meets every method and every kind of rows, the two-tower class all of both
PAIRS = list(zip(KINDS, ROWS, strict=True))
ADAPTERS = [(name, *pair) for name in NAMES for pair in (GRID if name in CROSS else PAIRS)]


@pytest.mark.parametrize(("name", "method", "rows"), ADAPTERS)
def test_an_adapter_starts_as_the_base_and_reloads_equal(folders, name, method, rows, tmp_path):
    bundle = load_bundle(folders[name])
    ids, tables = ids_of(bundle, 0), new_rows(bundle.model, bundle.vocabulary)
    before = bundle.model(input_ids=ids).logits.detach()
    more = {"none": {}, "indices": {"trainable_token_indices": tables}, "modules": {"modules_to_save": list(tables)}}
    chosen = KINDS[method] | more[rows]
    config = LoraConfig(r=2, target_modules=targets(bundle.model, None), task_type="CAUSAL_LM", **chosen)
    model = get_peft_model(bundle.model, config)
    assert torch.equal(model(input_ids=ids).logits, before)
    trained = learn(model, ids)
    assert trained.isfinite().all() and (trained - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_bundle(folders[name]).model, tmp_path)
    assert torch.equal(again(input_ids=ids).logits, trained)
