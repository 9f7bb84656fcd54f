"""Put trained mini weights where the package ships them, with the log of their training beside them.

    python recipes/mini/ship.py parent --run runs/mini-text --name text
    python recipes/mini/ship.py parent --run runs/mini-image runs/mini-image-2 --name image --vq runs/vq
    python recipes/mini/ship.py chat --merged runs/mini-cross --run runs/mini-chat

A parent is a whole folder; of several runs, one after another, the last has the weights. The chat model is the merge's
recipe and the trained difference to it: the parents that it repeats are shipped already.
"""

import argparse
import shutil
from pathlib import Path

from jam.assets import CHAT, MINI
from jam.difference import write_difference

KEPT = (
    "config.json",
    "generation_config.json",
    "jam.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def ship_parent(runs: list[Path], out: Path, vq: Path | None) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copyfile(runs[-1] / "final" / name, out / name)
    (out / "log.jsonl").write_text("".join((run / "log.jsonl").read_text() for run in runs))
    if vq:
        shutil.copytree(vq / "vq", out / "image_tokenizer", dirs_exist_ok=True)
        shutil.copyfile(vq / "log.jsonl", out / "image_tokenizer/log.jsonl")


def ship_chat(merged: Path, run: Path) -> None:
    CHAT.mkdir(parents=True, exist_ok=True)
    record = write_difference(merged, run / "final", CHAT / "difference.safetensors", precision="int8")
    (CHAT / "merge.yaml").write_text("kind: merge\nmethod: cross\nout: chat\n")
    shutil.copyfile(run / "log.jsonl", CHAT / "log.jsonl")
    print(record)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    parent = verbs.add_parser("parent")
    parent.add_argument("--run", type=Path, required=True, nargs="+", help="its runs, in order")
    parent.add_argument("--name", choices=("text", "image"), required=True)
    parent.add_argument("--vq", type=Path, help="the run of the image tokenizer")
    chat = verbs.add_parser("chat")
    chat.add_argument("--merged", type=Path, required=True)
    chat.add_argument("--run", type=Path, required=True)
    args = parser.parse_args()
    if args.verb == "parent":
        ship_parent(args.run, MINI / args.name, args.vq)
    else:
        ship_chat(args.merged, args.run)


if __name__ == "__main__":
    main()
