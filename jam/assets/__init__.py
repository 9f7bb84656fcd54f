"""Where the shipped mini data and weights lie. Paths only: reading them is their users' business."""

import os
from pathlib import Path

SHIPPED = Path(__file__).parent
MINI = SHIPPED / "mini"
DATA = MINI / "data"
TEXT_PARENT = MINI / "text"
IMAGE_PARENT = MINI / "image"
CHAT = MINI / "chat"  # merge recipe + trained difference of the default chat model


def cache_dir() -> Path:
    """Where derived files are kept between runs: ``$JAM_CACHE``, else ``~/.cache/jam``; created when missing."""
    folder = Path(os.environ.get("JAM_CACHE") or Path.home() / ".cache" / "jam")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
