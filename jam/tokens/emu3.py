"""Emu3's image tokenizer: transformers' ``Emu3VQVAE`` at one square size.

The network is transformers' own class and takes any size; jam has one number of codes per image, so that a folder's
config.json says ``resolution``, the side in pixels. Without the key it is 512, the smallest side of Emu3's own image
processor. Grids of other shapes are not read yet. Pixels are in [-1, 1], as Emu3's processor makes them (mean and
deviation 0.5).

Shapes: B batch, S side in pixels, G = S / downsampling.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Emu3VQVAE, Emu3VQVAEConfig

from jam.checkpoint import open_checkpoint
from jam.errors import CheckpointError
from jam.tokens.vq import load_network

RESOLUTION = 512


@dataclass(frozen=True)
class Emu3Sizes:
    """What the rest of jam asks of an image tokenizer."""

    resolution: int
    grid: int
    n_embed: int
    decoder: bool = True

    @property
    def codes_per_image(self) -> int:
        return self.grid**2


class Emu3Network:
    """Images to codes and back; pixels are float in [-1, 1], codes int64 in [0, n_embed)."""

    def __init__(self, network: Emu3VQVAE, resolution: int):
        self.network = network
        factor = network.spatial_scale_factor
        self.config = Emu3Sizes(resolution, resolution // factor, network.config.codebook_size)

    def to(self, device: torch.device) -> "Emu3Network":
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes in raster order: [B, 3, S, S] -> [B, G*G]."""
        sizes = torch.tensor([pixels.shape[2:]] * len(pixels))
        return torch.stack(self.network.encode(pixels, sizes).image_tokens).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pixels clipped to [-1, 1]: [B, G*G] -> [B, 3, S, S]."""
        grid = self.config.grid
        return self.network.decode(codes.view(-1, grid, grid)).clamp(-1, 1)

    @classmethod
    def load(cls, folder: Path) -> "Emu3Network":
        """Raises CheckpointError for a missing or damaged file, or weights that do not fit the configuration."""
        checkpoint = open_checkpoint(Path(folder))
        files = sorted({info.file for info in checkpoint.tensors.values()})
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        return cls.build(checkpoint.config, tensors, str(folder))

    @classmethod
    def build(cls, config: dict, tensors: dict[str, Tensor], where: str) -> "Emu3Network":
        """The network of a configuration and tensors, frozen, in float32; ``where`` names their source in errors.

        Raises:
            CheckpointError: no configuration of this class, a side that is no multiple of the downsampling, tensors
                that are missing, unexpected, of another shape, or not finite.
        """
        config = dict(config)
        resolution = config.pop("resolution", RESOLUTION)
        refuses = (StrictDataclassError, AttributeError, LookupError, TypeError, ValueError)
        network = load_network(lambda: Emu3VQVAE(Emu3VQVAEConfig(**config)), tensors, where, refuses)
        factor = network.spatial_scale_factor
        if type(resolution) is not int or resolution < factor or resolution % factor:
            raise CheckpointError(
                f"{where}: resolution is {resolution!r}; a multiple of {factor} pixels is required, mend config.json"
            )
        return cls(network, resolution)
