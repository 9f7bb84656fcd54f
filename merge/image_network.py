"""The image tokenizer of a merge's result: whose network it is, and in which order its codebook stands.

Three sources: the ``image_tokenizer`` folder of the image parent, the image network among the weights of an owner's
folder (``jam.layouts``), or the folder that the recipe names, which takes the place of either. Image id ``start + k``
must stand for row k of the codebook; where an owner numbers codes otherwise, its rows are put in the order of the ids.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jam.checkpoint import INDEX, WEIGHTS, Checkpoint, open_checkpoint
from jam.errors import CheckpointError, MergeError
from jam.floats import from_float32
from jam.layouts import ModelFolder, emu3
from jam.shards import copy_tensors
from jam.tokens.vocabulary import Vocabulary
from jam.tokens.vq_config import CODEBOOK, VQConfig

FOLDER = "image_tokenizer"


@dataclass(frozen=True)
class ImageNetwork:
    """The image tokenizer that a merge writes.

    Attributes:
        source: its tensors under the names inside an image tokenizer folder, and that folder's config.json.
        order: the codebook's rows in the order of the image ids; None where they stand so.
        folder: what else belongs to it is copied from there; None for passengers.
        origin: one phrase for the report.
    """

    source: Checkpoint
    order: np.ndarray | None
    folder: Path | None
    origin: str

    @property
    def codes(self) -> int | None:
        """Size of the codebook; transformers' Emu3 has another name for it than the lineage."""
        return self.source.config.get("n_embed", self.source.config.get("codebook_size"))

    @property
    def files(self) -> list[Path]:
        """Files that are copied as they are, relative to the folder."""
        if self.folder is None:
            return []
        rewritten = () if self.order is None else ("config.json", WEIGHTS, INDEX)
        found = (file.relative_to(self.folder) for file in sorted(self.folder.rglob("*")) if file.is_file())
        return [file for file in found if str(file) not in rewritten]

    @property
    def bytes(self) -> int:
        """Room that the folder takes."""
        stored = sum(info.end - info.begin for info in self.source.tensors.values())
        return stored + sum((self.folder / file).stat().st_size for file in self.files)

    def write(self, folder: Path) -> None:
        """Into a new folder. Raises CheckpointError for NaN and infinity in what is written anew."""
        for file in self.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.folder / file, folder / file)
        if self.folder is None or self.order is not None:
            copy_tensors(self.source, folder, {} if self.order is None else {CODEBOOK: self.order})

    def fate(self, name: str) -> str:
        """What became of one of its tensors."""
        ordered = ", rows in the order of the image ids" if name == CODEBOOK and self.order is not None else ""
        return f"to {FOLDER}/{name}{ordered}"


def own_network(model: ModelFolder) -> ImageNetwork | None:
    """The image network of an image parent: its passengers, or the folder that its ``jam.json`` names.

    Raises:
        CheckpointError: the folder is not whole, its configuration and codebook disagree, or it is of other sizes than
            the parent's images.
    """
    path = model.checkpoint.path
    if model.passengers is not None:
        return ImageNetwork(model.passengers, model.code_order, None, "the image parent's own weights")
    if model.jam.image_tokenizer is None:
        return None
    folder = path / model.jam.image_tokenizer
    if absent := [name for name in ("config.json", WEIGHTS) if not (folder / name).is_file()]:
        raise CheckpointError(f"{path}: no {folder.name}/{absent[0]}; restore the image tokenizer")
    network = ImageNetwork(open_checkpoint(folder), None, folder, "the image parent's folder")
    if network.codes != model.jam.vocabulary.codebook_size:
        raise CheckpointError(
            f"{folder}: a codebook of {network.codes} codes, jam.json has {model.jam.vocabulary.codebook_size} image "
            "ids; they must agree, restore the image tokenizer"
        )
    if reason := _mismatch(network, model.jam.vocabulary):
        raise CheckpointError(f"{folder}: {reason}, restore the image tokenizer")
    return network


def given_network(folder: Path, model: ModelFolder) -> ImageNetwork:
    """The image tokenizer that a recipe names, for an image parent.

    Raises:
        CheckpointError: no whole folder.
        MergeError: it is of other sizes than the parent's images, or of another codebook than the parent's own network.
    """
    if absent := [name for name in ("config.json", WEIGHTS) if not (Path(folder) / name).is_file()]:
        raise MergeError(f"{folder}: no {absent[0]}; a folder with an image tokenizer is required, name one")
    source, vocabulary = open_checkpoint(folder), model.jam.vocabulary
    network = ImageNetwork(source, None, Path(folder), f"{Path(folder).name}, as the recipe says")
    if vocabulary.image_span is None:
        raise MergeError(f"{folder}: the image parent has no image ids; leave image_tokenizer out, or use another")
    if CODEBOOK not in source.tensors:
        raise MergeError(f"{folder}: no tensor {CODEBOOK}; a folder with an image tokenizer is required, name one")
    if network.codes != vocabulary.codebook_size or source.tensors[CODEBOOK].shape[:1] != (vocabulary.codebook_size,):
        raise MergeError(
            f"{folder}: a codebook of {network.codes} codes, the image parent has {vocabulary.codebook_size} image "
            "ids; they must agree, name the model's own image tokenizer"
        )
    if reason := _mismatch(network, vocabulary):
        raise MergeError(f"{folder}: {reason}, name the model's own image tokenizer")
    own, order = own_network(model), model.code_order
    if own is not None:
        order = _order_of(network, own, model.code_order)
    return ImageNetwork(source, order, network.folder, network.origin)


def _mismatch(network: ImageNetwork, vocabulary: Vocabulary) -> str | None:
    """What in a network's configuration, codebook and images does not agree, or None."""
    config, table = network.source.config, network.source.tensors.get(CODEBOOK)
    if table is None:
        return f"no tensor {CODEBOOK}; a codebook is required"
    vqgan = config.get("model_type") == "vqgan"  # another class's own loader knows its sizes
    sizes = vars(VQConfig()) | config  # absent keys have the class's defaults
    width = [sizes["embed_dim"]] if vqgan else list(table.shape[1:])
    if list(table.shape) != [vocabulary.codebook_size, *width]:
        return (
            f"tensor {CODEBOOK} is {list(table.shape)}, its config.json and the image ids ask for "
            f"{[vocabulary.codebook_size, *width]}; they must agree"
        )
    if not vqgan:
        codes = emu3.square_codes(config)
        if codes is None or codes == vocabulary.codes_per_image:
            return None
        return (
            f"{codes} codes an image, {config.get('resolution', 512)} px squares, the image parent has "
            f"{vocabulary.codes_per_image}; set resolution in its config.json"
        )
    for key in ("resolution", "patch"):
        if type(sizes[key]) is not int or sizes[key] < 1:
            return f"config.json has {key} {sizes[key]!r}; a positive whole number is required"
    levels = sizes["ch_mult"]
    if not isinstance(levels, list | tuple) or not levels or any(type(one) is not int or one < 1 for one in levels):
        return f"config.json has ch_mult {levels!r}; a list of positive whole numbers is required"
    codes = (sizes["resolution"] // sizes["patch"] // 2 ** (len(levels) - 1)) ** 2
    if codes != vocabulary.codes_per_image:
        return f"{codes} codes an image, the image parent has {vocabulary.codes_per_image}; they must agree"
    return None


def _order_of(given: ImageNetwork, own: ImageNetwork, order: np.ndarray | None) -> np.ndarray | None:
    """Where a given codebook has the rows of the parent's own one, in the order of the image ids.

    Args:
        order: that of the owner's codebook, as the first guess.

    Raises MergeError when it has other rows: a network whose codes mean something else.
    """
    theirs, wanted = given.source.read(CODEBOOK), own.source.read(CODEBOOK)
    wanted = wanted if own.order is None else wanted[own.order]
    if theirs.shape == wanted.shape:
        for guess in (order, None):
            # one of the two may have been rounded to bfloat16, eight bits
            rows = theirs if guess is None else theirs[guess]
            if np.allclose(rows, wanted, rtol=2**-7, atol=2**-7 * np.abs(wanted).mean()):
                return guess
        at = {row.tobytes(): number for number, row in enumerate(from_float32(theirs, "BF16"))}
        found = np.array([at.get(row.tobytes(), -1) for row in from_float32(wanted, "BF16")], np.int64)
        if len(set(found.tolist()) - {-1}) == len(wanted):
            return found
    raise MergeError(
        f"{given.folder}: its codebook is not that of the image parent's own image tokenizer; its codes would mean "
        "other pictures, name the model's own"
    )
