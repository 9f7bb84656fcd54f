"""A VQGAN checkpoint (Meta's Chameleon, taming-transformers, open-muse) to an image tokenizer folder.

Tensors keep their names and their own type, mostly float32: rounding an encoder moves codes. What a training run keeps
beside them (discriminator, perceptual loss) is left out and counted.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from jam.checkpoint import read_json, write_json
from jam.convert.outputs import Bar, Output, copied, made
from jam.convert.pickles import PickledTensor, Pickles
from jam.errors import CheckpointError, RecipeError
from jam.recipe_tree import read_tree
from jam.shards import ShardWriter
from jam.tokens.vq import VQModel
from jam.tokens.vq_config import CODEBOOK, VQConfig, muse_config, own_name, taming_config

MAX_YAML = 1 << 20  # bytes; settings have some thousand, and the parser takes seconds for a megabyte


@dataclass(frozen=True)
class VQGan:
    """An image tokenizer about to be written; ``left_out`` tensors belong to its training."""

    config: VQConfig
    outputs: tuple[Output, ...]
    left_out: int

    @property
    def note(self) -> str:
        """What a user should know of it, in one phrase."""
        sizes = f"{self.config.codes_per_image} codes of {self.config.n_embed}, {self.config.resolution} px"
        encoder = "" if self.config.decoder else ", encoder only: it cannot make images"
        losses = f", {self.left_out} tensors of training losses left out" if self.left_out else ""
        return sizes + encoder + losses


def is_vqgan(state: dict[str, PickledTensor]) -> bool:
    return "encoder.conv_in.weight" in state and any(name.startswith("quantize.") for name in state)


def read_settings(path: Path) -> dict:
    """A mapping from a YAML file or a ``.json``. Raises CheckpointError when it is missing, holds none, or has aliases,
    which can stand for more than any memory holds."""
    if path.suffix == ".json":
        return read_json(path)
    try:
        if (size := path.stat().st_size) > MAX_YAML:
            raise CheckpointError(
                f"{path}: {size} bytes; settings of {MAX_YAML} at most are required, give another file with --config"
            )
        tree = read_tree(path)
        if tree.mistakes:
            raise tree.report()
    except (OSError, RecursionError, RecipeError) as error:
        reason = str(error).splitlines()[0].removeprefix(f"{path}:") if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: cannot be read as YAML ({reason.strip()}); give another file with --config"
        ) from None
    return tree.values


def read_vqgan(pickles: Pickles, file: int, settings: Path, order: np.ndarray | None = None) -> VQGan:
    """What to write for the VQGAN in pickle number ``file``.

    Args:
        settings: taming's yaml or open-muse's config.json.
        order: int [n_embed]; row k of the written codebook is row ``order[k]`` of the checkpoint's.

    Raises:
        CheckpointError: settings of another network; tensors that are foreign, missing or of another shape; an order
            of another length than the codebook.
    """
    where, raw = str(pickles.paths[file]), read_settings(settings)
    config = muse_config(raw, str(settings)) if "channel_mult" in raw else taming_config(raw, str(settings))
    state = pickles.state(file)
    kept = {name: tensor for name, tensor in state.items() if own_name(name, where) is not None}
    config = replace(config, decoder=any(name.startswith("decoder.") for name in kept))
    if config.num_res_blocks * len(config.ch_mult) > len(kept):  # a network that large takes an hour to lay out
        raise CheckpointError(
            f"{where}: {len(kept)} tensors, {settings.name} asks for {config.num_res_blocks} blocks at each of "
            f"{len(config.ch_mult)} sizes; both must be of one tokenizer, give its own yaml with --config"
        )
    if difference := _difference(kept, _shapes(config, settings)):
        raise CheckpointError(
            f"{where}: {difference} in {settings.name}; both must be of one tokenizer, give its own yaml with --config"
        )
    if order is not None and sorted(order.tolist()) != list(range(config.n_embed)):
        raise CheckpointError(
            f"{where}: a codebook of {config.n_embed} codes, the text tokenizer names {len(order)} image tokens; each "
            "code must have one, use the files of one model"
        )
    outputs = [copied(pickles, name, tensor) for name, tensor in sorted(kept.items())]
    if order is not None:
        book = kept[CODEBOOK]
        outputs = [output for output in outputs if output.spec.name != CODEBOOK]
        outputs.append(made(CODEBOOK, book.dtype, book.shape, lambda: pickles.raw(book)[order]))
    return VQGan(config, tuple(outputs), len(state) - len(kept))


def _difference(tensors: dict[str, PickledTensor], shapes: dict[str, tuple[int, ...]]) -> str | None:
    for name in sorted(tensors.keys() | shapes.keys()):
        if name not in tensors:
            return f"tensor {name} is missing, and {list(shapes[name])}"
        if name not in shapes:
            return f"tensor {name} is {list(tensors[name].shape)}, and not there"
        if tensors[name].shape != shapes[name]:
            return f"tensor {name} is {list(tensors[name].shape)}, and {list(shapes[name])}"
    return None


def _shapes(config: VQConfig, settings: Path) -> dict[str, tuple[int, ...]]:
    try:
        with torch.device("meta"):
            return {name: tuple(tensor.shape) for name, tensor in VQModel(config).state_dict().items()}
    except (ValueError, ArithmeticError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{settings}: sizes of no network ({reason}); give the yaml that belongs to the checkpoint"
        ) from None


def write_vqgan(found: VQGan, out: Path, bar: Bar) -> None:
    """The folder ``out``, which appears when whole. Raises JamError when it is taken or the disk is full."""
    with ShardWriter(out, [output.spec for output in found.outputs], shard_bytes=1 << 62) as writer:
        bar.write(writer, found.outputs)
        write_json(writer.folder / "config.json", {"model_type": "vqgan", **asdict(found.config)})
        writer.finish()
