"""Ten questions, drawn by seed and not by hand, and what a model answers: a page with its pictures.

The questions are the first turns of held-out mini conversations (wordings or subjects that no training saw) and, every
third, a plain question about an article's title, which asks for no picture.

    python recipes/smollm2/examples.py smollm2 --out docs/smollm2
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from finetune.data import mini_data
from jam.assets import DATA
from jam.decode.job import encode_images
from jam.decode.options import default_options
from jam.decode.stream import Reply, replies
from jam.document import Document, Part, TextPart, from_messages
from jam.models.load import Bundle, load_bundle
from jam.shipped import model_folder

SIDE = 128  # pixels of a picture on the page


def questions(count: int, seed: int) -> list[tuple[Part, ...]]:
    """User turns, drawn without replacement."""
    generator, archive = np.random.default_rng(seed), mini_data.ImageArchive()
    rows = [row for split in ("wording", "subject") for row in mini_data.conversations(split)]
    titles = [r["title"] for r in mini_data.read_jsonl(DATA / "wikipedia.jsonl.xz") if r["split"] == "test"]
    order, plain = generator.permutation(len(rows)), generator.permutation(len(titles))
    found = []
    for number in range(count):
        if number % 3 == 2:
            found.append((TextPart(f"What is {titles[plain[number]]}?", "user", 0.0),))
        else:
            found.append(from_messages(rows[order[number]]["messages"][:1], archive.open).parts)
    return found


def answers(bundle: Bundle, turns: list[tuple[Part, ...]], seed: int) -> list[Reply]:
    options = default_options(bundle, seed=seed)
    documents = [encode_images(bundle, Document(turn)) for turn in turns]
    return [reply for document in documents for reply in replies(bundle, [document], options)]


def page(turns: list[tuple[Part, ...]], given: list[Reply], out: Path, title: str) -> str:
    """Markdown; the pictures go to ``out`` as PNG."""
    lines, pictures = [title, ""], 0

    def picture(image: Image) -> str:
        nonlocal pictures
        name = f"{pictures}.png"
        image.resize((SIDE, SIDE), 0).save(out / name)
        pictures += 1
        return f"![{name}]({out.name}/{name})"

    for turn, reply in zip(turns, given, strict=True):
        asked = [part.text if isinstance(part, TextPart) else picture(part.image) for part in turn]
        images = iter(reply.images)
        said = [
            part.text.strip() if isinstance(part, TextPart) else picture(next(images)) for part in reply.document.parts
        ]
        lines += ["> " + " ".join(asked), "", "\n\n".join(said), "", "---", ""]
    return "\n".join(lines[:-2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures; the page stands beside it")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    bundle = load_bundle(model_folder(options.model), dtype=torch.bfloat16)
    turns = questions(options.count, options.seed)
    given = answers(bundle, turns, options.seed)
    title = f"# {options.count} questions drawn with seed {options.seed}, and the answers of {options.model.name}"
    options.out.with_suffix(".md").write_text(page(turns, given, options.out, title) + "\n")


if __name__ == "__main__":
    main()
