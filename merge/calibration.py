"""What ``jam calibrate`` measured, read by the width merge: factors for both halves of every norm that they share.

The file is JSON: ``parents`` (identities of configuration and headers), ``data`` (what was read), ``norms`` (for every
norm and side the factor, an offset where the norm has a bias, and the error left). Measuring runs both parents and
lives in ``jam.calibrate``; here nothing but numbers is read.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jam.checkpoint import read_json
from jam.errors import MergeError
from merge.plan import Parent
from merge.union import Pair

FORMAT = 1


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


def read_calibration(path: Path, pair: Pair) -> Calibration:
    """A file that was measured on these parents.

    Raises:
        CheckpointError: no such file, or no JSON object.
        MergeError: another format, other parents, or norms that are missing or no numbers.
    """
    raw = read_json(path)
    again = "measure anew with jam calibrate"
    if raw.get("format") != FORMAT or not isinstance(raw.get("norms"), dict):
        raise MergeError(f"{path}: no calibration of format {FORMAT}; {again}")
    for side in pair.sides:
        found = raw.get("parents", {}).get(side.side, {})
        if found.get("identity") != describe_parent(side)["identity"]:
            raise MergeError(
                f"{path}: measured with {found.get('folder')!r} as the {side.side} parent, whose configuration or "
                f"tensors are not those of {side.path}; {again}"
            )
    norms: dict[str, dict[str, Half]] = {}
    for name in norm_names(pair.image):
        try:
            halves = {side.side: raw["norms"][name][side.side] for side in pair.sides}
            norms[name] = {side: Half(float(one["factor"]), float(one["offset"])) for side, one in halves.items()}
        except (KeyError, TypeError, ValueError) as error:
            raise MergeError(f"{path}: norm {name} has no factors and offsets ({error!r}); {again}") from None
        if not all(0 < half.factor < math.inf and math.isfinite(half.offset) for half in norms[name].values()):
            raise MergeError(f"{path}: norm {name} has a factor that is not above 0 or not finite; {again}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return Calibration(path, digest, str(raw.get("data", {}).get("description", "")), norms)
