"""Laws of scale: any engine and any number of ranks train what one process trains."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from finetune.recipe import FinetuneRecipe
from tests.laws.ranks import launch
from tests.laws.scale_cases import steps_of
from tests.laws.test_data_laws import recipe_for
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross


def captions(folder: Path) -> Path:
    """A file of captioned random images."""
    rows = []
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "caption": f"the red cat {number}"}) + "\n")
    (folder / "captions.jsonl").write_text("".join(rows))
    return folder / "captions.jsonl"


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> dict[str, Path]:
    """One recipe a model, and between them every setting that a shard could upset."""
    root = tmp_path_factory.mktemp("scale")
    text, image = tiny_pair(root)
    folders = {"single": image}
    folders |= {
        tables: tiny_cross(root / tables, text, image, gate=0.5, tables=tables) for tables in ("separate", "shared")
    }
    base = recipe_for(root).model_dump(mode="json")
    pictures = {"kind": "captions", "path": str(captions(root)), "weight": 0.5, "loss": {"text": 0.0, "image": 0.7}}
    base["data"]["mix"] = {"text": base["data"]["mix"]["a"], "captions": pictures}
    base["train"] |= {"ema": 0.9, "micro_batch_size": 1, "global_batch_size": 8}
    base["objective"] |= {"cm3": 0.5, "own_codes": 0.5}
    base["loss"] |= {"chunk": 7, "z": 1e-3}
    base["optim"] |= {"clip": 0.1, "warmup": 0}
    changes = {
        "single": {"optim": {"groups": [{"match": r"layers\.0\.", "lr_mul": 0.0}, {"match": "embed", "lr_mul": 3.0}]}},
        "separate": {"train": {"checkpointing": True, "micro_batch_size": 2}},
        "shared": {"optim": {"groups": [{"match": r"\.gate$", "lr_mul": 10.0}]}},
    }
    found = {}
    for name, folder in folders.items():
        raw = json.loads(json.dumps(base)) | {"model": str(folder), "output_dir": str(root / f"run-{name}")}
        for section, values in changes[name].items():
            raw[section] |= values
        found[name] = root / f"{name}.json"
        found[name].write_text(FinetuneRecipe.model_validate(raw).model_dump_json())
    return found


def without_own_codes(recipe: Path) -> Path:
    """``own_codes`` is drawn anew by every rank: what is read differs with their number."""
    raw = json.loads(recipe.read_text())
    raw["objective"]["own_codes"] = 0.0
    plain = recipe.with_name(f"plain-{recipe.name}")
    plain.write_text(json.dumps(raw))
    return plain


def bf16(recipe: Path) -> Path:
    raw = json.loads(without_own_codes(recipe).read_text())
    raw["train"]["precision"] = "bf16"
    rounded = recipe.with_name(f"bf16-{recipe.name}")
    rounded.write_text(json.dumps(raw))
    return rounded


@pytest.mark.parametrize("count", [2, 4])
def test_ranks_that_lack_a_modality_train_what_one_process_trains(recipes, count, tmp_path):
    """Loss, gradients, norm, weights and average in float64, for DDP, shards and their replicas."""
    cases = []
    names = ["single", "separate", "shared"] if count == 2 else ["single", "separate"]
    for name in names:
        plain = without_own_codes(recipes[name])
        steps_of(FinetuneRecipe.model_validate_json(plain.read_text()), tmp_path / f"one-{name}")
        for engine in ("ddp", "fsdp2") if count == 2 or name == "single" else ("hsdp",):
            cases.append([engine, str(plain), str(tmp_path / f"{engine}-{name}")])
    own = "separate" if count == 2 else "single"
    cases += [[engine, str(recipes[own]), str(tmp_path / f"own-{engine}")] for engine in ("ddp", "fsdp2")]
    cases += [[engine, str(bf16(recipes[own])), str(tmp_path / f"bf16-{engine}")] for engine in ("ddp", "fsdp2")]
    launch(count, tmp_path / "ranks", "tests.laws.scale_cases:steps", json.dumps(cases))
    for engine, _, file in cases[:-4]:
        found, expected = load_file(file), load_file(tmp_path / f"one-{Path(file).name.removeprefix(f'{engine}-')}")
        assert found.keys() == expected.keys()
        assert expected["figures"][:, 0].std() > 1e-4 and expected["figures"][:, 2].min() > 0.1  # clipped, and moving
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")
    rounded = [load_file(tmp_path / f"bf16-{engine}")["figures"][:, 0] for engine in ("ddp", "fsdp2")]
    torch.testing.assert_close(*rounded, rtol=3e-3, atol=0)
    ddp, sharded = (load_file(tmp_path / f"own-{engine}") for engine in ("ddp", "fsdp2"))
    for key, tensor in ddp.items():
        torch.testing.assert_close(sharded[key], tensor, rtol=1e-9, atol=1e-9)
