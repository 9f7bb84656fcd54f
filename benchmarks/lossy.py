"""What cheaper numbers cost a model: bfloat16, its packed form, and int8 weights, against float32.

The mean of KL(float32 || lossy) over every text token and every image code of held-out mini data (test split), each
given the true tokens before it, under the restricted softmax; beside it the two held-out losses. int8 is torchao's
weight-only form of all matrices but the heads, over bfloat16, and is left out where torchao is not installed.

Then the time of one forward of one token in two rows, as a guided reply of one image makes them, without a cache: of
the model, and of a Llama shape of 8 layers, d 1024, with random weights. Sides alternate, medians are shown.

    python -m benchmarks.lossy                  # the shipped model; a few minutes of one core
    python -m benchmarks.lossy --quick          # few documents (under a minute)
    python -m benchmarks.lossy --model FOLDER
"""

import argparse
import math
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from benchmarks.decode import bundle_of, medians, network
from finetune.data.held_out import held_out_captions, held_out_texts
from jam.assets import IMAGE_PARENT
from jam.evaluate.loss import Item, caption_item, scored_logits, text_item
from jam.memory import keep_freed_memory
from jam.models.load import Bundle, load_bundle, quiet_transformers
from jam.shipped import model_folder
from jam.tokens.image import ImageTokenizer

FLOAT, HALF, PACKED, INT8 = "float32", "bfloat16", "bfloat16, packed", "int8 weights (torchao)"
BATCH = 512  # tokens of a forward; two float64 tables of so many rows are held


class NotRun(Exception):
    """A side that this machine lacks."""


def to_int8(model: nn.Module) -> None:
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise NotRun(f"torchao not importable ({error})") from error
    # the decoder reads a head by slices of rows, which these tensors do not give
    quantize_(model, Int8WeightOnlyConfig(), lambda part, name: isinstance(part, nn.Linear) and "lm_head" not in name)


def made(name: str, half: Bundle) -> Bundle:
    """A side, from a bundle in bfloat16 that is its own to change. Raises NotRun."""
    if name == PACKED and not half.pack():
        raise NotRun("this CPU packs no bfloat16")
    if name == INT8:
        to_int8(half.model)
    return half


def compare(exact: Bundle, lossy: Bundle, items: Sequence[Item]) -> tuple[float, float]:
    """Mean KL(exact || lossy) of a scored token, and the lossy side's nats in all."""
    divergence, nats, count = 0.0, 0.0, 0
    both = (scored_logits(side, items, BATCH) for side in (exact, lossy))
    for (right_NV, ids_N, _), (other_NV, _, _) in zip(*both, strict=True):
        right_NV, other_NV = (part.double().log_softmax(-1) for part in (right_NV, other_NV))
        divergence += (right_NV.exp() * (right_NV - other_NV)).sum().item()
        nats -= other_NV.gather(1, ids_N[:, None]).sum().item()
        count += len(ids_N)
    return divergence / count, nats


def row(title: str, exact: Bundle, lossy: Bundle, texts: Sequence[Item], codes: Sequence[Item]) -> str:
    said, nats = compare(exact, lossy, texts)
    cells = [f"{said:.2e}", f"{nats / math.log(2) / sum(item.size for item in texts):.4f}"]
    if codes:
        drawn, nats = compare(exact, lossy, codes)
        cells = [cells[0], f"{drawn:.2e}", cells[1], f"{nats / sum(item.size for item in codes):.4f}"]
    else:
        cells = [cells[0], "-", cells[1], "-"]
    return f"| {title} | {' | '.join(cells)} |"


@torch.inference_mode()
def forward(bundle: Bundle) -> None:
    """One token in two rows, without the head where it stands apart."""
    ids = torch.full((2, 1), bundle.vocabulary.spans[0].start)
    getattr(bundle.model, "model", bundle.model)(ids, position_ids=torch.zeros_like(ids), use_cache=False)


def times(sides: dict[str, Bundle], rounds: int) -> str:
    """The cells of a row: ms a forward, and that of bfloat16 over it."""
    loops = 5
    for bundle in sides.values():
        forward(bundle)  # warm up
    work = {name: lambda own=own: [forward(own) for _ in range(loops)] for name, own in sides.items()}
    took = medians(work, rounds, torch.device("cpu"))
    cells = [f"{1000 * took[name] / loops:.1f} ({took[HALF] / took[name]:.2f})" for name in sides]
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a model folder; the shipped default model without one")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    size, captions, rounds = (3_000, 9, 5) if options.quick else (40_000, 96, 15)
    folder = model_folder(options.model)
    exact = load_bundle(folder)
    texts = [text_item(exact, text, min(1024, exact.max_positions)) for text in held_out_texts("test", size)]
    codes: list[Item] = []
    if exact.vocabulary.image_span is not None:
        tokenizer = exact.image or ImageTokenizer.load(IMAGE_PARENT / "image_tokenizer")
        codes = [
            caption_item(exact, one, exact.max_positions) for one in held_out_captions("test", captions, tokenizer)
        ]
    count = sum(int(item.scored.sum()) for item in texts)
    print(f"{folder.name}: {count} text tokens, {sum(item.size for item in codes)} codes, {options.threads} threads\n")
    print("| | KL, nats a text token | KL, nats a code | text, bits per byte | images, nats per code |")
    print("|---|---|---|---|---|")
    print(row(FLOAT, exact, exact, texts, codes), flush=True)
    sides, missing = {FLOAT: exact}, []
    for name in (HALF, PACKED, INT8):
        try:
            sides[name] = made(name, load_bundle(folder, torch.bfloat16))
        except NotRun as error:
            missing.append(f"{name}: not run: {error}")
            continue
        print(row(name, exact, sides[name], texts, codes), flush=True)
    print(f"\n| ms a forward, two rows (bfloat16 over it) | {' | '.join(sides)} |\n|{'---|' * (len(sides) + 1)}")
    print(f"| {folder.name} | {times(sides, rounds)} |", flush=True)
    with quiet_transformers():
        shape = network(8, 1024, "cpu")
    wide = {name: made(name, bundle_of(deepcopy(shape), 64)) for name in sides}
    wide[FLOAT].model.float()
    print(f"| Llama shape, 8 layers, d 1024 | {times(wide, rounds)} |")
    for line in missing:
        print(f"\n{line}")


if __name__ == "__main__":
    main()
