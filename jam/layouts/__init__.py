"""Checkpoint folders as their owners ship them, seen as a decoder of a known family with a vocabulary.

``open_model`` takes a folder with ``jam.json`` as it is. Without one it asks every layout of ``LAYOUTS`` whether the
folder is its owner's, by names in config.json and tokenizer.json; one that nobody knows is a plain language model.
Another layout is one more file and one more entry. Imports neither torch nor transformers, reads headers alone.
"""

from pathlib import Path
from typing import Protocol

from jam.checkpoint import Checkpoint, open_checkpoint
from jam.layouts import chameleon, emu3
from jam.layouts.liquid import LIQUID
from jam.layouts.lvm import LVM
from jam.layouts.simplear import SIMPLEAR
from jam.layouts.view import ModelFolder, Owner
from jam.tokens.adopt import adopt_vocabulary
from jam.tokens.vocabulary import JamFile

__all__ = ["LAYOUTS", "Layout", "ModelFolder", "layout_of", "open_model"]


class Layout(Protocol):
    """How one owner lays out a folder."""

    def fits(self, owner: Owner) -> bool:
        """Whether the folder is this owner's, on evidence."""

    def view(self, owner: Owner) -> ModelFolder:
        """The folder as jam reads it. Raises CheckpointError for one that is not whole."""


LAYOUTS: tuple[Layout, ...] = (chameleon, emu3, LIQUID, SIMPLEAR, LVM)


def open_model(folder: Path) -> ModelFolder:
    """A checkpoint folder, whoever made it.

    Raises:
        CheckpointError: a damaged or incomplete folder, or an owner's folder whose parts do not agree.
    """
    checkpoint = open_checkpoint(folder)
    if (checkpoint.path / "jam.json").is_file() or checkpoint.config.get("model_type") == "jam_cross":
        return ModelFolder(checkpoint, JamFile.read(checkpoint.path))
    layout = layout_of(checkpoint)
    if layout is not None:
        return layout.view(Owner(checkpoint))
    return ModelFolder(checkpoint, JamFile(adopt_vocabulary(checkpoint.path, checkpoint.config)))


def layout_of(checkpoint: Checkpoint) -> Layout | None:
    """Whose folder it is, without ``jam.json``. Raises CheckpointError for a damaged tokenizer.json."""
    owner = Owner(checkpoint)
    return next((layout for layout in LAYOUTS if layout.fits(owner)), None)
