"""Safe opening of images, and images to codes and back.

An image file is foreign input: its header is read first, and size, frames and format are checked before any pixel is
decoded (``MAX_PIXELS`` bounds memory: 32 Mpx decode to about 100 MB).
"""

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image as Pil
from PIL import ImageOps, UnidentifiedImageError

from jam.checkpoint import read_json
from jam.errors import CheckpointError, DataError
from jam.tokens.frame import Grid, default_grid, nearest_grid
from jam.tokens.vocabulary import Vocabulary
from jam.tokens.vq import VQModel

MAX_PIXELS = 32_000_000
MAX_SIDE = 16_384
MAX_BYTES = 20_000_000
FORMATS = ("PNG", "JPEG", "WEBP")
BATCH_PIXELS = 1 << 20  # encoded at once: a VQGAN's first layers take about half a kilobyte a pixel each


def open_image(source: Path | bytes, name: str | None = None) -> Pil.Image:
    """An RGB image, EXIF orientation applied, transparency put on white.

    Args:
        source: a file, or the bytes of one.
        name: what to call it in errors; the path by default.

    Raises:
        DataError: not a readable PNG, JPEG or WebP; too many pixels or bytes; animated; truncated.
    """
    name = name or (str(source) if isinstance(source, Path) else "image")
    if isinstance(source, Path):
        if not source.is_file():
            raise DataError(f"{name}: no such image file; check the path")
        if source.stat().st_size > MAX_BYTES:
            raise DataError(f"{name}: {source.stat().st_size} bytes, at most {MAX_BYTES} are read; shrink the image")
        source = source.read_bytes()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Pil.DecompressionBombWarning)  # our own, lower limits follow
            image = Pil.open(io.BytesIO(source), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
            raise DataError(
                f"{name}: {width} x {height} px; at most {MAX_PIXELS // 1_000_000} Mpx and {MAX_SIDE} px a side "
                "are decoded; shrink the image"
            )
        frames = getattr(image, "n_frames", 1)  # Pillow defines it for multi-frame formats only
        if frames != 1:
            raise DataError(f"{name}: {frames} frames; one is required, save a single frame")
        image.load()
        return opaque(image)
    except DataError:
        raise
    except (UnidentifiedImageError, Pil.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        reason = str(error).replace("\n", " ").split("<_io")[0].strip()
        raise DataError(f"{name}: not a readable PNG, JPEG or WebP ({reason}); convert or replace the file") from None


def opaque(image: Pil.Image) -> Pil.Image:
    """The image in RGB, EXIF orientation applied, transparency put on white."""
    image = _eight_bits(ImageOps.exif_transpose(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Pil.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")


def _eight_bits(image: Pil.Image) -> Pil.Image:
    """Grey of 16 bits by its high byte, as colours of 16 bits are read; Pillow's own conversion cuts it at 255."""
    if not image.mode.startswith("I;16"):
        return image
    values = np.asarray(image)
    grey = Pil.fromarray((values >> 8).astype(np.uint8))
    clear = image.info.get("transparency")
    return grey if clear is None else Pil.merge("LA", (grey, Pil.fromarray(np.uint8(255) * (values != clear))))


class ImageSizes(Protocol):
    """What an image tokenizer's network says of itself; ``n_embed`` is the codebook's size, ``decoder`` whether it can
    make images of codes."""

    @property
    def resolution(self) -> int: ...
    @property
    def codes_per_image(self) -> int: ...
    @property
    def n_embed(self) -> int: ...
    @property
    def decoder(self) -> bool: ...


class ImageNetwork(Protocol):
    """Images to codes and back: pixels float [B, 3, H, W] in [-1, 1], codes int64 [B, R*C] in raster order; where
    nothing is said of ``columns`` the square of ``codes_per_image``."""

    @property
    def config(self) -> ImageSizes: ...
    def encode(self, pixels: torch.Tensor) -> torch.Tensor: ...
    def decode(self, codes: torch.Tensor, columns: int | None = None) -> torch.Tensor: ...
    def grid_of(self, width: int, height: int) -> Grid | None: ...
    def state_dict(self) -> dict[str, torch.Tensor]: ...
    def to(self, device: torch.device) -> object: ...


def load_network(folder: Path) -> ImageNetwork:
    """The network of an image tokenizer folder, by the ``model_type`` of its config.json.

    Raises:
        CheckpointError: an unknown type, a missing or damaged file, or weights that do not fit the configuration.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json; an image tokenizer folder needs it, point to a whole one")
    model_type = read_json(path).get("model_type")
    if model_type == "vqgan":
        return VQModel.load(folder)
    if model_type == "emu3_vqgan":
        from jam.tokens.emu3 import Emu3Network  # imports transformers, which takes a second

        return Emu3Network.load(folder)
    raise CheckpointError(
        f"{path}: model_type is {model_type!r}, not 'vqgan' or 'emu3_vqgan'; point to an image tokenizer folder"
    )


class ImageTokenizer:
    """A frozen VQ network with its pixel conventions: centre crop to a square, bicubic to ``resolution``; for models
    whose images have sizes of their own (``grid``: rows and columns of codes) to one of these."""

    def __init__(self, network: ImageNetwork):
        self.network, self.device = network, torch.device("cpu")

    def to(self, device: torch.device) -> "ImageTokenizer":
        self.network.to(device)
        self.device = device
        return self

    @classmethod
    def load(cls, folder: Path) -> "ImageTokenizer":
        """Raises CheckpointError as :func:`load_network`."""
        return cls(load_network(folder))

    @property
    def codes_per_image(self) -> int:
        return self.network.config.codes_per_image

    @property
    def codebook_size(self) -> int:
        return self.network.config.n_embed

    @property
    def makes_images(self) -> bool:
        """False for an encoder alone, which only reads them."""
        return self.network.config.decoder

    @property
    def resolution(self) -> int:
        return self.network.config.resolution

    @property
    def factor(self) -> int:
        """Pixels a side that one code stands for."""
        return self.resolution // math.isqrt(self.codes_per_image)

    def fit(self, image: Pil.Image) -> Pil.Image:
        """The image at S x S pixels, as the network sees it; one of that size is returned as it is."""
        size = (self.resolution, self.resolution)
        return image if image.size == size else ImageOps.fit(image, size, Pil.BICUBIC)

    def pixels(self, images: list[Pil.Image]) -> torch.Tensor:
        """RGB images of any size to float [B, 3, S, S] in [-1, 1]."""
        return _unit([self.fit(image) for image in images])

    def read(self, image: Pil.Image, vocabulary: Vocabulary) -> tuple[tuple[int, ...], Grid]:
        """The codes of one image, in raster order, at the size that suits it best, for a model whose images have sizes.

        Where size tokens say what sizes there are, the nearest, cropped; else that of the network's own processor,
        which stretches by less than a code; else the square.

        Raises:
            DataError: a picture that the processor does not take.
        """
        if vocabulary.sizes:
            grid, place = nearest_grid(*image.size, vocabulary), ImageOps.fit
        else:
            own = self.network.grid_of(*image.size) if "begin_codes" in vocabulary.controls else None
            grid, place = (default_grid(vocabulary), ImageOps.fit) if own is None else (own, Pil.Image.resize)
        resized = place(image, (grid[1] * self.factor, grid[0] * self.factor), Pil.BICUBIC)
        return tuple(self.network.encode(_unit([resized]).to(self.device))[0].tolist()), grid

    def encode(self, images: list[Pil.Image], batch_size: int | None = None) -> np.ndarray:
        """int64 [len(images), codes_per_image].

        Args:
            batch_size: images at once; by default 64 small ones, and fewer of more than ``BATCH_PIXELS`` together.
        """
        batch_size = batch_size or max(1, min(64, BATCH_PIXELS // self.resolution**2))
        chunks = [images[at : at + batch_size] for at in range(0, len(images), batch_size)]
        codes = [self.network.encode(self.pixels(chunk).to(self.device)).cpu().numpy() for chunk in chunks]
        return np.concatenate(codes) if codes else np.zeros((0, self.codes_per_image), np.int64)

    def decode(self, codes: np.ndarray, grid: Grid | None = None) -> list[Pil.Image]:
        """int [B, codes_per_image], or [B, rows * columns] of ``grid``, to B RGB images.

        Raises:
            DataError: wrong length or codes outside the codebook.
            CheckpointError: the network has no decoder.
        """
        codes = np.asarray(codes, dtype=np.int64)
        wanted = self.codes_per_image if grid is None else math.prod(grid)
        if codes.ndim != 2 or codes.shape[1] != wanted:
            raise DataError(f"codes of shape {codes.shape}; [batch, {wanted}] are required for an image")
        return self._pixels(codes, None if grid is None else grid[1])

    def preview(self, codes: Sequence[int], grid: Grid | None = None) -> Pil.Image:
        """The image that has begun with these codes: its whole rows in colour, the rest grey, at S x S pixels, or the
        size of ``grid``.

        Only the rows that are there go through the decoder, which sees them as a lower image; their last pixels change
        when the next row comes. Raises DataError and CheckpointError as ``decode``.
        """
        side = math.isqrt(self.codes_per_image)
        whole, columns = (side, side) if grid is None else grid
        rows = len(codes) // columns
        canvas = Pil.new("RGB", (columns * self.factor, whole * self.factor), (128, 128, 128))
        if rows:
            (top,) = self._pixels(np.asarray([codes[: rows * columns]], dtype=np.int64), columns)
            canvas.paste(top, (0, 0))
        return canvas

    @torch.inference_mode()
    def _pixels(self, codes: np.ndarray, columns: int | None = None) -> list[Pil.Image]:
        if codes.size and not (codes.min() >= 0 and codes.max() < self.codebook_size):
            raise DataError(f"codes in [{codes.min()}, {codes.max()}]; the codebook has {self.codebook_size} entries")
        pixels = self.network.decode(torch.from_numpy(codes).to(self.device), columns).cpu()
        array = ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
        return [Pil.fromarray(item) for item in array]


def _unit(images: list[Pil.Image]) -> torch.Tensor:
    """Images of one size to float [B, 3, H, W] in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1
