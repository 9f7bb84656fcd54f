"""Train the mini image tokenizer on the train split of the shipped images.

Stages of one step, all drawn from a generator keyed by (seed, step): a run resumed on as many ranks is the same run.
1. a batch of train images: a share as they are, a share flipped / shifted / scaled, a share composed into two-object
   scenes (held-out images are never seen);
2. encode, quantise to the nearest code, straight-through to the decoder;
3. loss: mean over images of log MSE (the figure we are judged by is a mean of log MSE) + commitment;
4. codebook: exponential moving averages of assigned latents; a code that has starved is restarted on a random latent;
5. Muon for the kernels, each as a matrix of its output channels, AdamW for vectors.

The log beside the weights has one line per evaluation: held-out PSNR is the mean over images of 10 log10(1/MSE), RGB in
[0, 1]; ``white`` and ``upsampled`` are the same figure for a blank page and for the image reduced to 8 x 8 px.

    torchrun --nproc-per-node 2 recipes/mini/train_vq.py --out runs/vq
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.data import mini_data
from jam.tokens.vq import VQConfig, VQModel

DECAY, COMMIT, STARVED = 0.99, 0.25, 0.03


def load_images() -> tuple[Tensor, Tensor]:
    """The shipped images of the train split and all others, uint8 [N, 3, 64, 64] each."""
    rows, archive = list(mini_data.image_rows()), mini_data.ImageArchive()
    pixels = np.stack([np.asarray(archive.open(row["file"])) for row in rows])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    is_train = torch.tensor([row["split"] == "train" for row in rows])
    return images[is_train], images[~is_train]


def unit(pixels: Tensor) -> Tensor:
    return pixels.float() / 127.5 - 1


def affine(images: Tensor, generator: torch.Generator) -> Tensor:
    """Random flip, shift by up to 6 px and scale by 0.75 to 1.1, white outside; [B, 3, S, S] in [-1, 1]."""
    count = len(images)
    draw = torch.rand(count, 4, generator=generator)
    scale = 1 / (0.75 + 0.35 * draw[:, 0])
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = scale * torch.where(draw[:, 1] < 0.5, 1.0, -1.0)
    theta[:, 1, 1] = scale
    theta[:, :, 2] = (draw[:, 2:] - 0.5) * (12 / 32)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, align_corners=False) + 1


def scenes(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Two half-size objects side by side or one above the other on white."""
    canvas = torch.ones_like(first)
    small = [F.interpolate(x, scale_factor=0.5, mode="area") for x in (first, second)]
    beside = torch.rand(len(first), generator=generator) < 0.5
    canvas[beside, :, 16:48, :32], canvas[beside, :, 16:48, 32:] = small[0][beside], small[1][beside]
    above = ~beside
    canvas[above, :, :32, 16:48], canvas[above, :, 32:, 16:48] = small[0][above], small[1][above]
    return canvas


def batch(images: Tensor, size: int, seed: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    picks = unit(images[torch.randint(len(images), (size,), generator=generator)])
    plain, moved = size // 2, size // 2 + size // 4
    picks[plain:moved] = affine(picks[plain:moved], generator)
    partner = unit(images[torch.randint(len(images), (size - moved,), generator=generator)])
    picks[moved:] = scenes(picks[moved:], partner, generator)
    return picks


class Codebook:
    """Exponential-moving-average codebook (van den Oord et al., arXiv 1711.00937) with restarts."""

    def __init__(self, model: VQModel):
        self.weight = model.quantize.embedding.weight.requires_grad_(False)
        self.count = torch.ones(len(self.weight))
        self.total = self.weight.detach().clone()

    @torch.no_grad()
    def update(self, latents: Tensor, codes: Tensor, generator: torch.Generator) -> int:
        """Moves codes to their latents; returns how many were restarted."""
        onehot_count = torch.bincount(codes, minlength=len(self.weight)).float()
        summed = torch.zeros_like(self.total).index_add_(0, codes, latents)
        self.count.mul_(DECAY).add_(onehot_count, alpha=1 - DECAY)
        self.total.mul_(DECAY).add_(summed, alpha=1 - DECAY)
        starved = (self.count < STARVED).nonzero().flatten()
        if len(starved):
            chosen = latents[torch.randint(len(latents), (len(starved),), generator=generator)]
            self.count[starved] = 1.0
            self.total[starved] = chosen
        self.weight.copy_(self.total / self.count.clamp_min(1e-5).unsqueeze(1))
        return len(starved)


class Optimizer:
    """Muon (Jordan et al., 2024) on kernels as matrices [out, in * k * k], AdamW on the rest; rates as AdamW's."""

    def __init__(self, params: list[nn.Parameter], lr: float):
        kernels = [p for p in params if p.dim() == 4]
        self.views = [(p, nn.Parameter(p.data.view(len(p), -1))) for p in kernels]  # share their storage
        self.muon = torch.optim.Muon(
            [view for _, view in self.views], lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW([p for p in params if p.dim() != 4], lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
        self.params, self.lr = params, lr

    def step(self, factor: float) -> None:
        """One step at ``factor`` of the rate; gradients are averaged over ranks, clipped and cleared."""
        grads = torch.cat([p.grad.flatten() for p in self.params])
        all_reduce(grads)
        norm = float(grads.norm())
        if not math.isfinite(norm):
            raise SystemExit(
                f"the gradient's norm is {norm}; it must be finite; lower --lr and start again from state.pt"
            )
        grads.mul_(min(1.0, 1.0 / max(norm, 1e-6)))
        for p, part in zip(self.params, grads.split([p.numel() for p in self.params]), strict=True):
            p.grad = part.view_as(p)
        for p, view in self.views:
            view.grad = p.grad.view_as(view)
        for part in (self.muon, self.adamw):
            for group in part.param_groups:
                group["lr"] = self.lr * factor
            part.step()
        for p in (*self.params, *(view for _, view in self.views)):
            p.grad = None

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def all_reduce(values: Tensor) -> None:
    """Mean over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()


def gather(rows: Tensor) -> Tensor:
    """Rows of all ranks, in their order."""
    if not dist.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(model: VQModel, images: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstructions in [0, 1] and codes."""
    outputs, codes = [], []
    for chunk in images.split(64):
        codes.append(model.encode(unit(chunk)))
        outputs.append((model.decode(codes[-1]) + 1) / 2)
    return torch.cat(outputs), torch.cat(codes)


def psnr(output: Tensor, images: Tensor) -> float:
    """Mean over images of 10 log10(1 / MSE), RGB in [0, 1]."""
    mse = (output - images.float() / 255).square().flatten(1).mean(1).clamp_min(1e-10)
    return float((-10 * mse.log10()).mean())


def evaluate(model: VQModel, train: Tensor, held: Tensor, full: bool) -> dict:
    sample = held if full else held[:: max(1, len(held) // 300)]
    output, _ = reconstruct(model, sample)
    result = {"held_out_psnr": psnr(output, sample), "held_out_images": len(sample)}
    if full:
        small = F.interpolate(sample.float() / 255, size=(8, 8), mode="area")
        train_output, train_codes = reconstruct(model, train)
        result |= {
            "train_psnr": psnr(train_output, train),
            "white_psnr": psnr(torch.ones_like(output), sample),
            "upsampled_psnr": psnr(F.interpolate(small, size=sample.shape[2:], mode="bilinear"), sample),
            "codes_used_on_train": int(train_codes.unique().numel()),
        }
    return result


def write_line(out: Path, line: dict) -> None:
    with open(out / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
    print(json.dumps(line), flush=True)


def save_state(path: Path, **state) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def join_ranks(batch: int, multiple: int) -> tuple[int, int]:
    """World size and own rank under torchrun (1 and 0 without); a step's batch must divide by ``multiple`` a rank."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if batch % (multiple * world):
        raise SystemExit(f"--batch {batch}: a multiple of {multiple * world} is required for {world} ranks")
    if world > 1:
        dist.init_process_group("gloo")
    return world, rank


def load_state(path: Path, model: VQModel, optimizer: Optimizer) -> dict | None:
    """What ``save_state`` wrote, with model and optimizer loaded from it; None where there is none."""
    if not path.exists():
        return None
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"resuming at step {state['step']}")
    return state


def rate(step: int, steps: int, warmup: int) -> float:
    """Linear warmup, then a cosine from 1 to 0.01."""
    return min(1, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=32, help="images a step, over all ranks")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=250, help="steps between evaluations and checkpoints")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    world, rank = join_ranks(args.batch, multiple=1)

    train, held = load_images()
    torch.manual_seed(args.seed)
    model = VQModel(VQConfig(local=True))
    book = Codebook(model)
    optimizer = Optimizer([p for p in model.parameters() if p.requires_grad], args.lr)
    state_file, start, elapsed = args.out / "state.pt", 0, 0.0
    if state := load_state(state_file, model, optimizer):
        book.count, book.total = state["count"], state["total"]
        start, elapsed = state["step"], state["elapsed"]
    else:  # begin on real latents: a random codebook would starve at once
        with torch.no_grad():
            z = model.latents(batch(train, 64, args.seed, -1)).permute(0, 2, 3, 1).flatten(0, 2)
        book.total = z[torch.randperm(len(z))[: len(book.weight)]].clone()
        book.weight.data.copy_(book.total)

    began = time.time()
    losses, restarts = [], 0
    for step in range(start, args.steps):
        x = batch(train, args.batch, args.seed, step)[rank::world]
        with torch.autocast("cpu", torch.bfloat16):
            z = model.latents(x)
        z = z.float()
        flat = z.permute(0, 2, 3, 1).flatten(0, 2)
        codes = model.quantize.nearest(flat.detach())
        quantised = book.weight[codes].view(len(x), *z.shape[2:], -1).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            y = model.decode_latents(z + (quantised - z).detach())
        mse = ((y.float() - x) / 2).square().flatten(1).mean(1)
        loss = (mse + 5e-4).log().mean() + COMMIT * F.mse_loss(z, quantised)
        loss.backward()
        optimizer.step(rate(step, args.steps, warmup=100))
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step + 500_000_000)
        if step < 0.8 * args.steps or step % 10 == 0:  # let the book settle at the end
            restarts += book.update(gather(flat.detach()), gather(codes), generator)
        losses.append(float(loss.detach()))
        if (step + 1) % args.every == 0 or step + 1 == args.steps:
            all_reduce(loss := torch.tensor(losses).mean())
            if rank == 0:
                spent = elapsed + time.time() - began
                line = {"step": step + 1, "loss": float(loss), "restarts": restarts}
                line |= {"seconds": round(spent)} | evaluate(model, train, held, full=False)
                write_line(args.out, line)
                state = {"count": book.count, "total": book.total, "step": step + 1, "elapsed": spent}
                save_state(state_file, model=model.state_dict(), optimizer=optimizer.state_dict(), **state)
                model.save(args.out / "vq")
            losses, restarts = [], 0
    if rank == 0:  # what ships is the saved network (bfloat16 but for the codebook): that one is measured
        write_line(args.out, {"step": args.steps} | evaluate(VQModel.load(args.out / "vq"), train, held, full=True))


if __name__ == "__main__":
    main()
