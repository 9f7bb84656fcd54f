"""A transformers folder with ``pytorch_model*.bin`` to the same folder with safetensors.

Names stay. A head that is the embedding table itself is left out where the configuration ties the two, as transformers
does; other tensors that share memory are written each. Masks and positions that old transformers kept among the
weights, and which are no floats, are left out and counted.
"""

import re
import shutil
from pathlib import Path

from jam.checkpoint import check_place, read_json
from jam.convert.outputs import Output, copied
from jam.convert.pickles import Pickles
from jam.errors import CheckpointError
from jam.floats import STORED
from jam.header import shown
from jam.models.families import FAMILIES
from jam.models.family import HEAD

INDEX = "pytorch_model.bin.index.json"
_NO_WEIGHT = re.compile(r"(^|\.)(position_ids|attn\.bias|attn\.masked_bias|attention\.bias|attention\.masked_bias)$")
_NOT_COPIED = re.compile(r"\.(bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|onnx|ot)$|\.bin\.index\.json$|^\.")


def find_bins(source: Path) -> tuple[Path, ...]:
    """The weight files of a transformers folder in order; none where there are none.

    Raises:
        CheckpointError: an index that names files outside the folder or that are missing, or links out of it.
    """
    if (source / "pytorch_model.bin").is_file():
        check_place(source, source / "pytorch_model.bin")
        return (source / "pytorch_model.bin",)
    if not (source / INDEX).is_file():
        return ()
    check_place(source, source / INDEX)
    mapping = read_json(source / INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise CheckpointError(f"{source / INDEX}: no weight_map of tensor to file; restore the index")
    names = sorted(set(mapping.values()))
    if wrong := [name for name in names if Path(name).name != name or not (source / name).is_file()]:
        raise CheckpointError(
            f"{source}: {INDEX} names {shown(wrong[0])}, which is not there; fetch the whole checkpoint"
        )
    for name in names:
        check_place(source, source / name)
    return tuple(source / name for name in names)


def bin_outputs(source: Path, pickles: Pickles) -> tuple[list[Output], int]:
    """Every tensor once, and how many were left out.

    Raises:
        CheckpointError: no config.json, a tensor in two files, or one of a type that is no plain float.
    """
    config = read_json(source / "config.json")
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    tied = config.get("tie_word_embeddings", family.defaults.get("tie_word_embeddings") if family else False)
    found, left_out = {}, 0
    for file, path in enumerate(pickles.paths):
        for name, tensor in pickles.state(file).items():
            if 0 in tensor.shape and tensor.dtype in STORED:
                raise CheckpointError(
                    f"{path}: tensor {name} is {list(tensor.shape)}, without a number in it; whole weights are "
                    "required, restore the checkpoint"
                )
            if name in found:
                raise CheckpointError(
                    f"{path}: tensor {name} is in {pickles.paths[found[name].file].name} too; each tensor must be "
                    "stored once, remove the stale file"
                )
            if tensor.dtype not in STORED and _NO_WEIGHT.search(name):
                left_out += 1
                continue
            found[name] = tensor
    tables = {(t.file, t.same) for name, t in found.items() if name != HEAD}
    if tied and HEAD in found and (found[HEAD].file, found[HEAD].same) in tables:
        del found[HEAD]
        left_out += 1
    for name, tensor in found.items():
        if tensor.dtype not in STORED:
            raise CheckpointError(
                f"{pickles.paths[tensor.file]}: tensor {name} is {tensor.dtype}; {', '.join(STORED)} are read, convert "
                "a checkpoint of float weights"
            )
    return [copied(pickles, name, tensor) for name, tensor in sorted(found.items())], left_out


def side_files(source: Path) -> list[Path]:
    """What goes along, relative to ``source``: every file but pickles, other formats' weights, hidden files, and the
    safetensors that the new ones replace. Raises CheckpointError for a link out of the folder."""
    replaced = {path.relative_to(source) for path in source.glob("*.safetensors*")}
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()} - replaced
    kept = [path for path in sorted(files) if not any(_NOT_COPIED.search(part) for part in path.parts)]
    for path in kept:
        check_place(source, source / path)
    return kept


def copy_files(source: Path, files: list[Path], folder: Path) -> None:
    for path in files:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / path, folder / path)
