"""Images as they come: shades of 16 bits, EXIF that is none."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jam.errors import DataError
from jam.tokens.image import open_image

SHADES = (0, 20_000, 40_000, 65_535)
GREY, COLOUR, GREY_ALPHA, COLOUR_ALPHA = (0, 1), (2, 3), (4, 1), (6, 3)  # PNG's colour type, channels of colour


def png16(kind: tuple[int, int], clear: int | None = None) -> bytes:
    """A row of ``SHADES``, written by hand: Pillow writes no colours of 16 bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    number, channels = kind
    values = [v for shade in SHADES for v in (*(shade,) * channels, *(65_535,) * (number >= 4))]
    row = zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))
    header = struct.pack(">IIBBBBB", len(SHADES), 1, 16, number, 0, 0, 0)
    transparency = b"" if clear is None else chunk(b"tRNS", struct.pack(">H", clear))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + transparency + chunk(b"IDAT", row) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", [GREY, COLOUR, GREY_ALPHA, COLOUR_ALPHA])
def test_shades_of_16_bits_stay_shades(kind):
    """Pillow converts grey of 16 bits by cutting it at 255, so that all but black is white."""
    row = np.asarray(open_image(png16(kind)))[0]
    assert row.tolist() == [[shade >> 8] * 3 for shade in SHADES]


def test_a_transparent_shade_of_16_bits_is_white():
    assert np.asarray(open_image(png16(GREY, clear=SHADES[1])))[0, :, 0].tolist() == [0, 255, 156, 255]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_exif_that_is_none_is_an_error_of_the_image(kind):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(file, kind, exif=b"Exif\0\0garbage")
    with pytest.raises(DataError, match=r"cat\.png: not a readable PNG, JPEG or WebP"):
        open_image(file.getvalue(), "cat.png")
