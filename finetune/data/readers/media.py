"""Images that data names or holds: opened under one folder, or from the bytes of a row."""

import base64
import binascii
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from finetune.data.readers.lines import parse_line
from jam.errors import DataError
from jam.tokens.image import open_image

ELSEWHERE = ("http://", "https://", "ftp://", "s3://", "gs://")


def open_media(root: Path, file: str) -> Image.Image:
    """An image that a data line names: relative to the data file, and inside its folder even through links.

    Raises:
        DataError: a path that leads out of the folder; an image that is missing or cannot be read.
    """
    path = root / file
    try:
        if "\0" in file or Path(file).is_absolute() or not path.resolve().is_relative_to(root.resolve()):
            raise DataError(
                f"image {file!r} lies outside {root}; a path inside the data file's folder is required, move it"
            )
        return open_image(path)
    except (OSError, RuntimeError) as error:  # a path too long, no leave to read; links in a circle
        reason = error.strerror if isinstance(error, OSError) else "a circle of links"
        raise DataError(f"image {file!r:.200}: {reason}; a file that can be read is required, check the path") from None


def read_map(path: Path) -> dict[str, str]:
    """Local paths of images by their URL, from JSON lines of ``{"url", "path"}``.

    Raises:
        DataError: a missing file, or the first line that is not that.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such image map; give a .jsonl file of url and path")
    found = {}
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, 1):
            try:
                row = parse_line(raw, number)
                if row is None:
                    continue
                if not isinstance(row.get("url"), str) or not isinstance(row.get("path"), str):
                    raise DataError('expected {"url": text, "path": text}')
            except DataError as error:
                raise DataError(f"{path}:{number}: {error}") from None
            found[row["url"]] = row["path"]
    return found


@dataclass(frozen=True)
class Media:
    """Where images come from.

    Attributes:
        root: the folder that paths are relative to and may not leave.
        local: paths by URL; nothing is ever downloaded.
        keep: what is kept of an image that was opened, all of it by default.
    """

    root: Path
    local: Mapping[str, str] = field(default_factory=dict)
    keep: Callable[[Image.Image], Image.Image] = lambda image: image

    def open(self, value: object) -> Image.Image:
        """An image out of a row: a path, a URL of the map, a ``data:`` URL, bytes, or ``{"bytes", "path"}``.

        Raises:
            DataError: what is there is none of these, or an image that cannot be read.
        """
        return self.keep(self._open(value))

    def _open(self, value: object) -> Image.Image:
        match value:
            case bytes():
                return open_image(value)
            case {"bytes": bytes(data)}:
                return open_image(data)
            case {"path": str(file)} | {"url": str(file)}:
                return self._open(file)
            case str(text) if text.startswith("data:"):
                return open_image(_data_url(text))
            case str(text) if text in self.local:
                return open_media(self.root, self.local[text])
            case str(text) if text.lower().startswith(ELSEWHERE):
                raise DataError(
                    f"image {text!r:.200} is not here; jam downloads nothing, fetch it and name its path (--image-map)"
                )
            case str(text):
                return open_media(self.root, text)
        raise DataError(
            f"an image is a {type(value).__name__}; a path, bytes or a data URL is required, mend or remove it"
        )


def _data_url(text: str) -> bytes:
    head, _, data = text.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError("not base64")
        return base64.b64decode(data, validate=True)
    except (ValueError, binascii.Error) as error:
        raise DataError(f"image {json.dumps(text[:40])}: a data URL that is damaged ({error}); mend it") from None
