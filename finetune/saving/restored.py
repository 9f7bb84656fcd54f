"""Whether what a checkpoint holds fits the run that goes on from it.

Hashes say that files are as they were written, not that they belong here: torch would lay a row over a whole matrix,
and a state of another step would train other data.
"""

import json
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from finetune.scale.engines import Whole
from jam.errors import RunError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
}
ADAM = {"step", "exp_avg", "exp_avg_sq"}  # what torch keeps of a parameter
MUON = {"momentum_buffer"}


def state_problem(folder: Path, step: int) -> str | None:
    """Why state.json cannot be that of the checkpoint of ``step``, or None."""
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        return f"its state.json does not read ({error})"
    if not isinstance(state, dict):
        return "its state.json is no object"
    if type(state.get("step")) is not int or state["step"] != step:
        return f"its state.json is of step {state.get('step')!r:.40}"
    tokens, read, inputs = state.get("tokens"), state.get("read", []), state.get("inputs", {})
    sound = {
        "tokens": type(tokens) is int and tokens >= 0,
        "settings": isinstance(state.get("settings"), dict),
        "read": isinstance(read, list) and all(isinstance(n, int | float) and math.isfinite(n) for n in read),
        "inputs": isinstance(inputs, dict) and all(isinstance(value, str) for value in inputs.values()),
        "pending": isinstance(state.get("pending", []), list),
    }
    wrong = [name for name, good in sound.items() if not good]
    return f"{wrong[0]} of its state.json is not what a run writes" if wrong else None


@contextmanager
def tensors_of(path: Path) -> Iterator[safe_open]:
    """A file of tensors. Raises RunError where it is none."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise RunError(f"{path}: no file of tensors ({error}); remove the folder to go on from an older one") from None


def check_fits(file: safe_open, own: Mapping[str, Whole], frozen: Collection[str] = ()) -> None:
    """Raises RunError where a tensor of the file has another shape than the run's, or another type.

    Args:
        frozen: names of tensors that may lie in bfloat16 on either side, as ``hold_frozen_in_bf16`` leaves them.
    """
    for name, tensor in own.items():
        either = name in frozen and tensor.dtype.is_floating_point
        _check(file, name, list(tensor.shape), ("F32", "BF16") if either else (DTYPES[tensor.dtype],))


def check_moments(file: safe_open, keys: Mapping[str, list[str]], own: Mapping[str, Whole], by_muon: set[str]) -> None:
    """Raises RunError where a parameter's moments are those of another optimizer or have another shape or type.

    Args:
        keys: what the file has of each parameter.
    """
    for name, found in keys.items():
        wanted = MUON if name in by_muon else ADAM
        if set(found) != wanted:
            raise RunError(
                f"the checkpoint's optimizer keeps {', '.join(sorted(found))} of {name}, this run's "
                f"{', '.join(sorted(wanted))}; resume with the recipe that made it, or start a new output_dir"
            )
        for key in found:
            _check(file, f"{name}.{key}", [] if key == "step" else list(own[name].shape), ("F32",))


def _check(file: safe_open, name: str, shape: list[int], kinds: tuple[str, ...]) -> None:
    tensor = file.get_slice(name)
    found, kind = tensor.get_shape(), tensor.get_dtype()
    if found != shape or kind not in kinds:
        raise RunError(
            f"the checkpoint's {name} is {kind} {found}, {' or '.join(kinds)} {shape} is required; it was made with "
            "another model, start a new output_dir"
        )
