"""A recipe file as a user runs it, on a tiny network and tiny files."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from finetune.recipe import FinetuneRecipe
from jam.cli import main
from jam.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "recipes"
SHORT = ["train.tokens=null", "train.steps=3", "data.seq_len=64", "train.micro_batch_size=2"]
SHORT += ["train.global_batch_size=4", "optim.warmup=0"]


def tiny_files(tmp_path: Path) -> dict[str, Path]:
    """A jsonl file for each kind of source that reads one; images beside them."""
    pictures = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    rows: dict[str, list[dict]] = {"text": [], "captions": [], "conversations": []}
    for number, pixels in enumerate(pictures):
        file = f"{number}.png"
        Image.fromarray(pixels).save(tmp_path / file)
        picture = [{"type": "image", "path": file}]
        turns = [{"role": "user", "content": "Draw a cat."}, {"role": "assistant", "content": picture}]
        rows["text"].append({"text": f"line {number} of the red cat"})
        rows["captions"].append({"image": file, "caption": f"the red cat {number}"})
        rows["conversations"].append({"messages": turns})
    for kind, lines in rows.items():
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return {kind: tmp_path / f"{kind}.jsonl" for kind in rows}


def train(name: str, model: Path, tmp_path: Path, *overrides: str) -> Path:
    """Three steps of a recipe as it stands, but for model, length and files; returns ``final``."""
    file, out, files = RECIPES / f"{name}.yaml", tmp_path / name.replace("/", "-"), tiny_files(tmp_path)
    changes = [f"model={model}", f"output_dir={out}", *SHORT]
    for key, source in load_recipe(file, FinetuneRecipe).data.mix.items():
        if source.kind == "scenes":  # of the shipped data alone
            changes += [f"data.mix.{key}.limit=4", "data.seq_len=200"]
        else:
            changes.append(f"data.mix.{key}.path={files[source.kind]}")
    assert main(["finetune", str(file), *changes, *overrides]) == 0
    return out / "final"
