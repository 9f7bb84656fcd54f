"""The image tower of a cross merge as a model of its own, in the joint ids.

Alone it trains twenty times faster than under a frozen LLM, on the LLM's tokens and chat format; a second merge puts it
back beside the LLM. Only for two tables ("separate"): a shared one belongs to neither tower.

    python recipes/smollm2/image_tower.py --merged runs/smollm2-cross --out runs/smollm2-tower
"""

import argparse
import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

PREFIX = "image."
KEPT = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--merged", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = json.loads((options.merged / "config.json").read_text())
    if config.get("model_type") != "jam_cross" or config["tables"] != "separate":
        raise SystemExit(f"{options.merged}: a cross merge with a table for each tower is required")
    options.out.mkdir(parents=True)
    tensors = load_file(options.merged / "model.safetensors")
    tower = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    save_file(tower, options.out / "model.safetensors", {"format": "pt"})
    (options.out / "config.json").write_text(json.dumps(config["image_config"], indent=2) + "\n")
    settings = json.loads((options.merged / "jam.json").read_text())
    settings["fusion"] = None
    (options.out / "jam.json").write_text(json.dumps(settings, indent=2) + "\n")
    for name in KEPT:
        shutil.copyfile(options.merged / name, options.out / name)
    shutil.copytree(options.merged / settings["image_tokenizer"], options.out / settings["image_tokenizer"])


if __name__ == "__main__":
    main()
