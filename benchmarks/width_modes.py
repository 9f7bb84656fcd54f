"""Step-0 losses of a width merge: what stands beside its diagonal blocks, norms as they are or calibrated, head.

The shipped parents, or two others, are measured (``jam calibrate``, shipped validation data), merged in each mode with
and without the calibration, with the head that sums both halves and with each half's own, and evaluated on held-out
data: nats per text token and nats per image code, each under the restricted softmax. The calibration has read other
documents of the validation split, or the same; those of the test split neither it nor training has seen.

    python -m benchmarks.width_modes            # about ten minutes of one core
    python -m benchmarks.width_modes --quick    # few documents (a minute)
"""

import argparse
import contextlib
import io
import itertools
import os
import tempfile
from pathlib import Path

from jam import assets

MODES = ("copy", "average", "zero")


def losses(folder: Path, codes_of: Path, texts: int, captions: int) -> list[str]:
    """Cells of one model: text and image on validation, then on test; a dash where it makes no images."""
    from finetune.data.held_out import held_out_captions, held_out_texts
    from jam.evaluate.loss import evaluate_captions, sum_nats, text_item
    from jam.models.load import load_bundle
    from jam.tokens.image import ImageTokenizer

    bundle, cells = load_bundle(folder), []
    tokenizer = ImageTokenizer.load(codes_of / "image_tokenizer")
    for split in ("validation", "test"):
        items = [text_item(bundle, text, bundle.max_positions) for text in held_out_texts(split, texts)]
        text = sum_nats(bundle, items) / sum(int(item.scored.sum()) for item in items)
        image = evaluate_captions(bundle, held_out_captions(split, captions, tokenizer))
        cells += [f"{text:.3f}", "-" if image is None else f"{image:.3f}"]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=assets.TEXT_PARENT)
    parser.add_argument("--image", type=Path, default=assets.IMAGE_PARENT)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    sizes = (4_000, 8) if options.quick else (40_000, 96)

    from jam.calibrate import run_calibrate
    from merge.recipe import MergeRecipe
    from merge.run import run_merge

    names = ("text, nats a token", "image, nats a code")
    print(
        f"| | {' | '.join(f'{name}: {split}' for split in ('validation', 'test') for name in names)} |\n|{'---|' * 5}"
    )
    with tempfile.TemporaryDirectory() as tmp:
        for side, folder in (("text", options.text), ("image", options.image)):
            print(f"| {side} parent | {' | '.join(losses(folder, options.image, *sizes))} |", flush=True)
        file, said = Path(tmp) / "calibration.json", io.StringIO()
        parents = {"text": options.text, "image": options.image}
        with contextlib.redirect_stderr(said):
            run_calibrate(
                *parents.values(), out=file, texts=None, captions=None, tokens=2_000 if options.quick else 20_000
            )
        for mode, calibration, head in itertools.product(MODES, (None, file), ("sum", "own")):
            name = f"`{mode}`{', calibrated' if calibration else ''}{', own head' if head == 'own' else ''}"
            width = {"off_diagonal": mode, "calibration": calibration, "head": head}
            out = Path(tmp) / f"{mode}-{calibration is not None}-{head}"
            with contextlib.redirect_stderr(io.StringIO()):
                run_merge(MergeRecipe(method="width", out=out, width=width, **parents))
            print(f"| {name} | {' | '.join(losses(out, options.image, *sizes))} |", flush=True)
    print(f"\n{said.getvalue()}")


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    main()
