"""What ``jam calibrate`` measured, read by the width merge: factors for both halves of every norm that they share.

The file is JSON: ``parents`` (identities of configuration and headers), ``data`` (what was read), ``norms`` (for every
norm and side the factor, an offset where the norm has a bias, and the error left). Measuring runs both parents and
lives in ``jam.calibrate``; here nothing but numbers is read.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jam.checkpoint import read_json
from jam.errors import MergeError
from merge.plan import Parent
from merge.union import Pair

FORMAT = 1
LEAST, MOST = 1e-4, 1e4  # factors of real parents are near 1


@dataclass(frozen=True)
class Half:
    """``factor * y + offset`` stands for the parent's own norm, y being its half of the joint one."""

    factor: float
    offset: float


@dataclass(frozen=True)
class Calibration:
    """A checked file. ``norms`` has a half for each side by the module's name; ``data`` says what was measured on."""

    path: Path
    sha256: str
    data: str
    norms: Mapping[str, Mapping[str, Half]]

    def factors(self, norm: str) -> tuple[float, float]:
        return self.norms[norm]["text"].factor, self.norms[norm]["image"].factor


def norm_names(parent: Parent) -> dict[str, tuple[str, ...]]:
    """The norms that a file must have, and for those without weights the tensors that read them."""
    return parent.family.norms(parent.config)


def describe_parent(parent: Parent) -> dict[str, str]:
    """What tells a parent from others of its kind, without its weights."""
    return {
        "folder": parent.path.name,
        "family": parent.family.model_type,
        "identity": parent.checkpoint.identity(),
    }


def _number(value: object) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"a number is a {type(value).__name__}")
    return float(value)


def read_calibration(path: Path, pair: Pair) -> Calibration:
    """A file that was measured on these parents.

    Raises:
        CheckpointError: no JSON object.
        MergeError: no such file, another format, other parents, or norms that are missing or no numbers.
    """
    again = "measure anew with jam calibrate"
    if not path.is_file():
        raise MergeError(f"{path}: no such file; a file of jam calibrate is required, {again}")
    raw = read_json(path)
    parents, data = raw.get("parents"), raw.get("data")
    whole = isinstance(parents, dict) and all(isinstance(parents.get(side.side), dict) for side in pair.sides)
    whole = whole and isinstance(data, dict) and isinstance(raw.get("norms"), dict)
    if type(raw.get("format")) is not int or raw["format"] != FORMAT or not whole:
        raise MergeError(f"{path}: no calibration of format {FORMAT}; {again}")
    for side in pair.sides:
        found = parents[side.side]
        if found.get("identity") != describe_parent(side)["identity"]:
            raise MergeError(
                f"{path}: measured with {found.get('folder')!r} as the {side.side} parent, whose configuration or "
                f"tensors are not those of {side.path}; {again}"
            )
    norms: dict[str, dict[str, Half]] = {}
    for name in norm_names(pair.image):
        try:
            halves = {side.side: raw["norms"][name][side.side] for side in pair.sides}
            norms[name] = {side: Half(_number(one["factor"]), _number(one["offset"])) for side, one in halves.items()}
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise MergeError(f"{path}: norm {name} has no factors and offsets ({error!r}); {again}") from None
        if not all(LEAST <= half.factor <= MOST and abs(half.offset) <= MOST for half in norms[name].values()):
            raise MergeError(
                f"{path}: norm {name} has a factor or an offset out of range; factors of {LEAST:g} to {MOST:g} and "
                f"offsets up to {MOST:g} are required, {again}"
            )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Calibration(path, digest, str(data.get("description", "")), norms)
