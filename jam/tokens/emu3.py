"""Emu3's image tokenizer: transformers' ``Emu3VQVAE``, which takes images of any size.

A folder's config.json says ``resolution``, the side in pixels of the square that is made where no other size is asked
for (without the key 512), and ``min_pixels`` and ``max_pixels``, between which Emu3's own image processor brings what
it reads (without the keys 512 and 1024 squared, its defaults). Pixels are in [-1, 1], as that processor makes them
(mean and deviation 0.5).

Shapes: B batch, S side in pixels, G = S / downsampling.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from torch import Tensor
from transformers import Emu3VQVAE, Emu3VQVAEConfig
from transformers.models.emu3.image_processing_emu3 import smart_resize

from jam.checkpoint import open_checkpoint
from jam.errors import CheckpointError, DataError
from jam.tokens.vq import load_network

RESOLUTION, AREA = 512, (512 * 512, 1024 * 1024)


@dataclass(frozen=True)
class Emu3Sizes:
    """What the rest of jam asks of an image tokenizer."""

    resolution: int
    grid: int
    n_embed: int
    area: tuple[int, int] = AREA
    decoder: bool = True

    @property
    def codes_per_image(self) -> int:
        return self.grid**2


class Emu3Network:
    """Images to codes and back; pixels are float in [-1, 1], codes int64 in [0, n_embed)."""

    def __init__(self, network: Emu3VQVAE, resolution: int, area: tuple[int, int] = AREA):
        self.network = network
        factor = network.spatial_scale_factor
        self.config = Emu3Sizes(resolution, resolution // factor, network.config.codebook_size, area)

    def state_dict(self) -> dict[str, Tensor]:
        return self.network.state_dict()

    def grid_of(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of codes that Emu3's image processor makes of a picture. Raises DataError for a strip."""
        try:
            size = smart_resize(height, width, self.network.spatial_scale_factor, *self.config.area)
        except ValueError as error:
            raise DataError(f"an image of {width} x {height} px: {error}; crop it") from None
        rows, columns = (side // self.network.spatial_scale_factor for side in size)
        return rows, columns

    def to(self, device: torch.device) -> "Emu3Network":
        self.network.to(device)
        return self

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Codes in raster order: [B, 3, S, S] -> [B, G*G], or of any other multiple of a code's size."""
        sizes = torch.tensor([pixels.shape[2:]] * len(pixels))
        return torch.stack(self.network.encode(pixels, sizes).image_tokens).flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor, columns: int | None = None) -> Tensor:
        """Pixels clipped to [-1, 1]: rows of ``columns`` codes, by default G, [B, R*C] -> [B, 3, R*S/G, C*S/G]."""
        return self.network.decode(codes.view(len(codes), -1, columns or self.config.grid)).clamp(-1, 1)

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
            CheckpointError: no configuration of this class, a side that is no multiple of the downsampling, bounds that
                are none, tensors that are missing, unexpected, of another shape, or not finite.
        """
        config = dict(config)
        resolution = config.pop("resolution", RESOLUTION)
        area = config.pop("min_pixels", AREA[0]), config.pop("max_pixels", AREA[1])
        refuses = (StrictDataclassError, AttributeError, LookupError, TypeError, ValueError)
        network = load_network(lambda: Emu3VQVAE(Emu3VQVAEConfig(**config)), tensors, where, refuses)
        factor = network.spatial_scale_factor
        if type(resolution) is not int or resolution < factor or resolution % factor:
            raise CheckpointError(
                f"{where}: resolution is {resolution!r}; a multiple of {factor} pixels is required, mend config.json"
            )
        if any(type(side) is not int for side in area) or not factor**2 <= area[0] <= area[1]:
            raise CheckpointError(
                f"{where}: min_pixels and max_pixels are {area[0]!r:.40} and {area[1]!r:.40}; whole numbers in order, "
                f"from {factor**2} on, are required, mend config.json"
            )
        return cls(network, resolution, area)
