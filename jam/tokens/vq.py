"""The VQGAN image tokenizer: encoder, codebook, decoder.

The network is the one of Esser et al., *Taming Transformers* (arXiv 2012.09841), which
Gafni et al., CM3Leon, Chameleon and LVM inherit, and its parameters carry the names of that lineage
(``encoder.down.0.block.0.norm1.weight``), so that checkpoints map without a table. Training (codebook
updates, losses) is not here: a tokenizer at use is frozen.

Shapes: B batch, C channels, S image side in pixels, G grid side in codes (S / downsampling), K codebook size.
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jam.checkpoint import open_checkpoint
from jam.errors import CheckpointError
from jam.tokens.vq_config import CODEBOOK, VQConfig


class PositionNorm(nn.Module):
    """Layer norm over the channels of each position: unlike a group norm it carries nothing from place to place."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, 1e-6).movedim(-1, 1)


Norm = Callable[[int], nn.Module]


def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, norm: Norm, kernel: int = 3):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
        self.norm2 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel, padding=kernel // 2)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.same_channels = in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return (x if self.same_channels else self.nin_shortcut(x)) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions of a small grid."""

    def __init__(self, channels: int, norm: Norm):
        super().__init__()
        self.norm = norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # [B, G*G, C]
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # the lineage pads right and below only


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _level(blocks: list[nn.Module], attentions: list[nn.Module]) -> nn.Module:
    level = nn.Module()
    level.block = nn.ModuleList(blocks)
    level.attn = nn.ModuleList(attentions)
    return level


def _middle(channels: int, norm: Norm, attention: bool) -> nn.Module:
    middle = nn.Module()
    middle.block_1 = ResnetBlock(channels, channels, norm)
    middle.attn_1 = AttnBlock(channels, norm) if attention else nn.Identity()
    middle.block_2 = ResnetBlock(channels, channels, norm)
    return middle


def _run_middle(middle: nn.Module, h: Tensor) -> Tensor:
    return middle.block_2(middle.attn_1(middle.block_1(h)))


class Encoder(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels, side = config.ch, config.resolution // config.patch
        for index, multiplier in enumerate(config.ch_mult):
            blocks, attentions = [], []
            for _ in range(config.num_res_blocks):
                blocks.append(ResnetBlock(channels, config.ch * multiplier, group_norm))
                channels = config.ch * multiplier
                if side in config.attn_resolutions:
                    attentions.append(AttnBlock(channels, group_norm))
            level = _level(blocks, attentions)
            if index + 1 < len(config.ch_mult):
                level.downsample = Downsample(channels)
                side //= 2
            self.down.append(level)
        self.mid = _middle(channels, group_norm, config.mid_attention)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        for index, level in enumerate(self.down):
            for number, block in enumerate(level.block):
                h = block(h)
                if len(level.attn):
                    h = level.attn[number](h)
            if index + 1 < len(self.down):
                h = level.downsample(h)
        return self.conv_out(F.silu(self.norm_out(_run_middle(self.mid, h))))


class Decoder(nn.Module):
    def __init__(self, config: VQConfig):
        super().__init__()
        channels, side = config.ch * config.ch_mult[-1], config.grid
        norm = PositionNorm if config.local else group_norm
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = _middle(channels, norm, config.mid_attention)
        levels = []
        for index in reversed(range(len(config.ch_mult))):
            blocks, attentions = [], []
            for _ in range(config.num_res_blocks + 1):
                blocks.append(ResnetBlock(channels, config.ch * config.ch_mult[index], norm))
                channels = config.ch * config.ch_mult[index]
                if side in config.attn_resolutions:
                    attentions.append(AttnBlock(channels, norm))
            level = _level(blocks, attentions)
            if index > 0:
                level.upsample = Upsample(channels)
                side *= 2
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)  # the lineage numbers levels from the finest
        self.norm_out = norm(channels)
        self.conv_out = nn.Conv2d(channels, 3 * config.patch**2, 3, padding=1)
        self.patch = config.patch

    def forward(self, z: Tensor) -> Tensor:
        h = _run_middle(self.mid, self.conv_in(z))
        for index in reversed(range(len(self.up))):
            level = self.up[index]
            for number, block in enumerate(level.block):
                h = block(h)
                if len(level.attn):
                    h = level.attn[number](h)
            if index > 0:
                h = level.upsample(h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)


class LocalEncoder(nn.Module):
    """An encoder whose codes tell of their own patch and a rim of ``(1 + 2 * num_res_blocks) * patch`` pixels
    around it, and of nothing else.

    The lineage's encoder sees the whole image at every position (attention, group norms, 3 x 3 convolutions on the
    coarsest grid) and learns to store in the codes of blank patches what does not fit elsewhere. That is the best
    use of 64 codes and the worst language: white corners took 422 codes (docs/log.md), which no model that reads a
    caption can foresee. Here convolutions overlap on the finest level only and norms are per position.
    """

    def __init__(self, config: VQConfig):
        super().__init__()
        self.patch = config.patch
        self.conv_in = nn.Conv2d(3 * config.patch**2, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        channels = config.ch
        for index, multiplier in enumerate(config.ch_mult):
            wide, kernel = config.ch * multiplier, 1 if index else 3
            level = nn.Module()
            level.block = nn.ModuleList(
                ResnetBlock(wide if number else channels, wide, PositionNorm, kernel)
                for number in range(config.num_res_blocks)
            )
            channels = wide
            if index + 1 < len(config.ch_mult):
                level.downsample = nn.Conv2d(channels, channels, 2, stride=2)
            self.down.append(level)
        self.mid = nn.ModuleList(ResnetBlock(channels, channels, PositionNorm, 1) for _ in range(2))
        self.norm_out = PositionNorm(channels)
        self.conv_out = nn.Conv2d(channels, config.z_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))
        for index, level in enumerate(self.down):
            for block in level.block:
                h = block(h)
            if index + 1 < len(self.down):
                h = level.downsample(h)
        for block in self.mid:
            h = block(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Quantizer(nn.Module):
    """The codebook: ``embedding.weight`` is [K, embed_dim]."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.n_embed, config.embed_dim)

    def nearest(self, z: Tensor) -> Tensor:
        """Index of the nearest code, Euclidean, for each row: float32 [N, embed_dim] -> int64 [N]."""
        book = self.embedding.weight.float()
        return (book.square().sum(1) - 2 * z.float() @ book.T).argmin(1)


class VQModel(nn.Module):
    """Images to codes and back; pixels are float in [-1, 1], codes int64 in [0, K)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder = (LocalEncoder if config.local else Encoder)(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)
        self.decoder = Decoder(config) if config.decoder else None

    def latents(self, pixels: Tensor) -> Tensor:
        """Unquantised latents: [B, 3, S, S] -> [B, embed_dim, G, G]."""
        return self.quant_conv(self.encoder((pixels + 1) / 2 if self.config.unit_pixels else pixels))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes in raster order: [B, 3, S, S] -> [B, G*G], or of any other multiple of a code's size."""
        z = self.latents(pixels)
        rows = z.permute(0, 2, 3, 1).reshape(-1, self.config.embed_dim)
        return self.quantize.nearest(rows).view(pixels.shape[0], -1)

    @torch.no_grad()
    def decode(self, codes: Tensor, columns: int | None = None) -> Tensor:
        """Pixels clipped to [-1, 1]: rows of ``columns`` codes, by default G, [B, R*C] -> [B, 3, R*S/G, C*S/G].
        Raises CheckpointError without a decoder."""
        columns = columns or self.config.grid
        rows = codes.shape[1] // columns
        z = self.quantize.embedding(codes).view(-1, rows, columns, self.config.embed_dim).permute(0, 3, 1, 2)
        return self.decode_latents(z).clamp(-1, 1)

    def grid_of(self, width: int, height: int) -> None:
        """Rows and columns for a picture of that size: none, it was trained with squares alone."""

    def decode_latents(self, z: Tensor) -> Tensor:
        if self.decoder is None:
            raise CheckpointError(
                "the image tokenizer has an encoder only and can read images, not make them; its decoder is required, "
                "make a whole one of its owner's vqgan.ckpt with `jam convert vqgan.ckpt --out FOLDER`"
            )
        pixels = self.decoder(self.post_quant_conv(z))
        return 2 * pixels - 1 if self.config.unit_pixels else pixels

    def save(self, folder: Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` (bfloat16, codebook in float32).

        The codebook keeps float32: rounding it would move nearest-neighbour borders, and with them the codes.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: tensor.detach().to(torch.float32 if name == CODEBOOK else torch.bfloat16).contiguous()
            for name, tensor in self.state_dict().items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps({"model_type": "vqgan", **asdict(self.config)}, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "VQModel":
        """Reads a folder written by :meth:`save` or ``jam convert``; the network runs in float32.

        Raises:
            CheckpointError: the folder lacks a file, one is damaged, or its tensors do not fit its config.
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: no {name}; an image tokenizer folder needs it, point to a whole one")
        raw = dict(open_checkpoint(folder).config)
        if raw.pop("model_type", None) != "vqgan":
            raise CheckpointError(
                f"{folder}/config.json: model_type is not 'vqgan'; point to an image tokenizer folder"
            )
        config = VQConfig.from_json(raw, f"{folder}/config.json")
        return cls.build(config, load_file(folder / "model.safetensors"), str(folder))

    @classmethod
    def build(cls, config: VQConfig, tensors: dict[str, Tensor], where: str) -> "VQModel":
        """The network of these sizes and tensors, frozen, in float32; ``where`` names their source in errors.

        Raises:
            CheckpointError: sizes of no network, tensors that do not fit them, NaN or infinity.
        """
        return load_network(lambda: cls(config), tensors, where, (TypeError, ValueError, ArithmeticError))


Network = TypeVar("Network", bound=nn.Module)


def load_network(
    make: Callable[[], Network], tensors: dict[str, Tensor], where: str, refuses: tuple[type[Exception], ...]
) -> Network:
    """An image network with these tensors, all of them and no others, frozen, in float32.

    Args:
        refuses: how ``make`` says that the sizes are of no network.

    Raises:
        CheckpointError: sizes of no network, or tensors that are missing, unexpected, of another shape or not finite.
    """
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    try:
        network = make()
        missing, unexpected = network.load_state_dict(floats, strict=False)
    except (*refuses, RuntimeError) as error:  # RuntimeError: tensors of another network's shapes
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{where}: config and weights are not one image tokenizer ({reason}); restore the folder"
        ) from None
    if missing or unexpected:
        raise CheckpointError(
            f"{where}: {len(missing)} tensors missing, {len(unexpected)} unexpected "
            f"(first: {(missing + unexpected)[0]}); config and weights must come from one tokenizer"
        )
    if bad := next((name for name, tensor in floats.items() if not torch.isfinite(tensor).all()), None):
        raise CheckpointError(f"{where}: tensor {bad} has NaN or infinite numbers; restore the image tokenizer")
    return network.eval().requires_grad_(False)
