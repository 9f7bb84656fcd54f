r"""Put trained mini weights where the package ships them, with the log of their training beside them.

    python recipes/mini/ship.py parent --run runs/mini-text --name text
    python recipes/mini/ship.py parent --run runs/mini-image runs/mini-image-2 --name image --vq runs/vq runs/vq-sharp
    python recipes/mini/ship.py chat --merged runs/mini-cross --run runs/mini-chat runs/mini-chat-2
    python recipes/mini/ship.py chat --name smollm2 --merged runs/smollm2-cross \
        --run runs/smollm2-tower-tuned runs/smollm2-tuned --sampling text_temperature=0.4

Of several runs, one after another, the last has the weights. A parent is a whole folder. A chat model is the merge's
recipe and the trained difference to it: the parents that it repeats are shipped already, or fetched.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from jam.assets import CHAT, MINI, SHIPPED
from jam.decode.options import SamplingOptions
from jam.difference import write_difference
from jam.recipe import dump_recipe, load_recipe
from merge.recipe import MergeRecipe

KEPT = (
    "config.json",
    "generation_config.json",
    "jam.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def ship_parent(runs: list[Path], out: Path, vqs: list[Path]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(runs[-1] / "final" / name, out / name)
    join_logs(runs, out / "log.jsonl")
    learnt = runs[-1] / "final/image_tokenizer"
    if not learnt.is_dir():
        return
    shutil.copytree(vqs[-1] / "vq" if vqs else learnt, out / "image_tokenizer", dirs_exist_ok=True)
    join_logs(vqs, out / "image_tokenizer/log.jsonl")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out / "image_tokenizer", learnt))
    names = [name for name in theirs if name.startswith(("encoder.", "quant"))]
    if changed := [name for name in names if not torch.equal(ours[name], theirs[name])]:
        raise SystemExit(f"{vqs[-1]}: {changed[0]} is not what the parent learnt; only the decoder may differ")


def join_logs(runs: list[Path], out: Path) -> None:
    """One log of runs that went on from each other: steps and tokens count on."""
    lines, before = [], {}
    for run in runs:
        rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        lines += [row | {key: row[key] + before[key] for key in before if key in row} for row in rows]
        before = {key: lines[-1][key] for key in ("step", "tokens") if key in lines[-1]}
    if lines:
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))


def ship_chat(name: str, merged: Path, runs: list[Path], sampling: dict[str, float]) -> None:
    out = CHAT if name == "mini" else SHIPPED / name
    out.mkdir(parents=True, exist_ok=True)
    record = write_difference(merged, runs[-1] / "final", out / "difference.safetensors", precision="int8")
    recipe = load_recipe(merged / "merge.yaml", MergeRecipe)  # the parents are the shipped ones, wherever they lie
    plain = recipe.model_copy(update={"text": None, "image": None, "out": Path("chat")})
    (out / "merge.yaml").write_text(dump_recipe(plain))
    join_logs(runs, out / "log.jsonl")
    (out / "jam.json").unlink(missing_ok=True)
    if sampling:  # else the merge's jam.json serves
        settings = json.loads((merged / "jam.json").read_text())
        settings["sampling"] = settings.get("sampling", {}) | sampling
        SamplingOptions(**settings["sampling"])
        (out / "jam.json").write_text(json.dumps(settings, indent=2) + "\n")
    print(record)


def setting(argument: str) -> tuple[str, float]:
    key, _, value = argument.partition("=")
    return key, json.loads(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    parent = verbs.add_parser("parent")
    parent.add_argument("--run", type=Path, required=True, nargs="+", help="its runs, in order")
    parent.add_argument("--name", choices=("text", "image"), required=True)
    parent.add_argument("--vq", type=Path, nargs="+", default=[], help="runs of the image tokenizer, in order")
    chat = verbs.add_parser("chat")
    chat.add_argument("--merged", type=Path, required=True)
    chat.add_argument("--run", type=Path, required=True, nargs="+", help="its runs, in order")
    chat.add_argument("--name", default="mini", help="under which `jam chat NAME` finds it")
    chat.add_argument("--sampling", type=setting, nargs="+", default=[], help="KEY=NUMBER, defaults that it gets")
    args = parser.parse_args()
    if args.verb == "parent":
        ship_parent(args.run, MINI / args.name, args.vq)
    else:
        ship_chat(args.name, args.merged, args.run, dict(args.sampling))


if __name__ == "__main__":
    main()
