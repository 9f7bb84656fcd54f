"""What a model fills into holes: words of styled captions beside their image, and images beside their caption.

python recipes/mini/infill.py [MODEL] --sheet sheet.png

Prints how many holes hold, read greedily, exactly the word (style, label) or the whole caption that was there; and in
how many of them what was there is the likeliest of four (the styles; labels and captions of three other rows; chance
is a quarter). The sheet has, from above: the real image, one drawn after its caption, one for a hole after it, one for
a hole before it.
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from finetune.data import mini_data
from jam.decode.job import encode_images
from jam.decode.options import default_options
from jam.decode.stream import replies
from jam.document import Document, ImagePart, MaskPart, Part, TextPart
from jam.models.heads import next_heads
from jam.models.load import Bundle, load_bundle
from jam.shipped import model_folder
from jam.tokens.render import render

STYLES = ("flat", "fluent", "noto", "twemoji")
HOLE, IMAGE_HOLE = MaskPart("text"), MaskPart("image")


def holes(row: dict, image: Image.Image) -> dict[str, tuple[Document, str]]:
    """A prompt of each kind, and what its hole held."""
    style, label, shown = row["style"], row["label"], ImagePart(image)
    return {
        "caption": (Document((HOLE, shown)), mini_data.caption_for(row)),
        "style": (Document((TextPart("a"), HOLE, TextPart(f" drawing of {label}"), shown)), f" {style}"),
        "label": (Document((TextPart(f"a {style} drawing of"), HOLE, shown)), f" {label}"),
    }


@torch.inference_mode()
def likeliest(bundle: Bundle, prompt: Document, choices: list[str]) -> int:
    """Which of some texts fills the hole with the greatest probability, its end included."""
    start = render(prompt, bundle.vocabulary, bundle.text, complete=False).ids.tolist()
    scores = []
    for text in choices:
        span = [*bundle.text.encode(text), bundle.vocabulary.controls["eos"]]
        ids = torch.tensor([[*start, *span]])
        logs = bundle.logits(ids, next_heads(ids, bundle.vocabulary))[0][0, len(start) - 1 : -1].float().log_softmax(-1)
        scores.append(float(logs.gather(1, torch.tensor(span)[:, None]).sum()))
    return max(range(len(choices)), key=scores.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="name of a shipped model, or a folder; default: mini")
    parser.add_argument("--split", default="combination", help="of the shipped images: train, combination, label")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--sheet", type=Path, help="PNG to write")
    options = parser.parse_args()
    bundle = load_bundle(model_folder(options.model))
    bundle.pack()
    archive = mini_data.ImageArchive()
    rows = [row for row in mini_data.image_rows() if row["split"] == options.split]
    rows = random.Random(0).sample(rows, options.count)
    images = [archive.open(row["file"]) for row in rows]
    asked = [holes(row, image) for row, image in zip(rows, images, strict=True)]
    for kind in asked[0]:
        prompts = [encode_images(bundle, own[kind][0]) for own in asked]
        found = replies(bundle, prompts, default_options(bundle, text_temperature=0.0, max_tokens=40))
        texts = ["".join(part.text for part in reply.document.parts) for reply in found]
        right = sum(text.strip() == own[kind][1].strip() for text, own in zip(texts, asked, strict=True))
        truths, chosen = [own[kind][1] for own in asked], 0
        for at, prompt in enumerate(prompts):
            others = [f" {style}" for style in STYLES] if kind == "style" else [truths[at - back] for back in (1, 2, 3)]
            choices = [truths[at], *(text for text in others if text != truths[at])]
            chosen += likeliest(bundle, prompt, choices) == 0
        print(f"{kind}: {right} of {len(rows)} exact, {chosen} the likeliest of four", flush=True)
        for text, own in zip(texts, asked, strict=True):
            print(f"    {own[kind][1].strip()!r}: {text!r}")
    if options.sheet is None:
        return
    settings = replace(default_options(bundle), mode="image", max_images=1)
    captions: list[Part] = [TextPart(mini_data.caption_for(row)) for row in rows]
    forms = (
        [(one,) for one in captions],
        [(one, IMAGE_HOLE) for one in captions],
        [(IMAGE_HOLE, one) for one in captions],
    )
    drawn = [replies(bundle, [Document(parts) for parts in form], settings) for form in forms]
    side = images[0].width
    sheet = Image.new("RGB", (side * len(rows), side * 4), "white")
    for y, line in enumerate([images, *([reply.images[0] for reply in form] for form in drawn)]):
        for x, image in enumerate(line):
            sheet.paste(image.resize((side, side)), (x * side, y * side))
    sheet.save(options.sheet)


if __name__ == "__main__":
    main()
