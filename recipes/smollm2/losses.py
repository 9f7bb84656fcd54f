"""Held-out losses of models side by side: bits per byte of text, nats per image code (test split of the mini data).

python recipes/smollm2/losses.py mini smollm2 $(jam fetch smollm2)
"""

import argparse
from pathlib import Path

import torch

from finetune.data.held_out import held_out_captions, held_out_texts
from jam.assets import IMAGE_PARENT
from jam.evaluate.loss import evaluate_captions, evaluate_text
from jam.models.load import load_bundle
from jam.shipped import model_folder
from jam.tokens.image import ImageTokenizer

BYTES, CAPTIONS = 40_000, 96


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+", help="names of shipped models, or folders")
    options = parser.parse_args()
    texts = held_out_texts("test", BYTES)
    captions = held_out_captions("test", CAPTIONS, ImageTokenizer.load(IMAGE_PARENT / "image_tokenizer"))
    print("| model | text, bits per byte | images, nats per code |\n|---|---|---|")
    for model in options.models:
        bundle = load_bundle(model_folder(model), dtype=torch.bfloat16)
        image = evaluate_captions(bundle, captions)
        text = evaluate_text(bundle, texts, context=1024)
        print(f"| {model.name} | {text:.3f} | {'-' if image is None else f'{image:.3f}'} |", flush=True)


if __name__ == "__main__":
    main()
