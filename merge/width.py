"""Width merge: both parents side by side in one network of their summed width (JAM-Width, arXiv 2309.15564).

Features, heads and feed-forward units are concatenated, text first. A matrix becomes four blocks: the diagonal ones are
the parents, the off-diagonal ones, through which one parent's units read the other's features, are

    copy     [[A, A], [B, B]]     each output half reads both halves with its own parent's matrix
    average  [[A, M], [M, B]]     M = (A + B) / 2
    zero     [[A, 0], [0, B]]     the halves meet only in the norms and in the head

The result is a checkpoint of the parents' own class. Head rows are concatenated too, so its logits are the sum of the
parents'; with ``head: own`` the text half alone scores text and the image half alone scores image codes, the rest of
their rows being zero. What no block layout can keep: one norm over the doubled width mixes the statistics of both
halves. With ``calibration`` each half of a norm's weights is multiplied by a factor that was measured to undo this on
average; where the norms have no weights (CM3Leon), the columns that read them are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jam.errors import MergeError
from jam.models.family import HEAD, Axes
from jam.tokens.vocabulary import IMAGE, TEXT
from merge.calibration import Calibration, Half, norm_names, read_calibration
from merge.plan import Job, Parent, Placing, Plan, Read, Rule, Source, single_table_config
from merge.recipe import MergeRecipe
from merge.rows import ZERO, Table, describe, half_map
from merge.rules import mean
from merge.uniform import Average, single_network_obstacles
from merge.union import Pair, joint_jam_file

Segment = tuple[Parent, int, int]  # rows start to stop of one parent's tensor


def segments(text: Parent, image: Parent, axis: str) -> tuple[Segment, ...]:
    """The result's rows along an axis, in order: text then image, part by part where projections are fused."""
    found: list[Segment] = []
    starts = {text.side: 0, image.side: 0}
    parts = (side.family.segments(side.sizes, axis) for side in (text, image))
    for lengths in zip(*parts, strict=True):
        for side, length in zip((text, image), lengths, strict=True):
            found.append((side, starts[side.side], starts[side.side] + length))
            starts[side.side] += length
    return tuple(found)


def cut(pieces: tuple[Segment, ...], block: slice) -> Iterator[tuple[Parent, slice]]:
    """The parents' rows that make up a block of the result's rows."""
    at = 0
    for side, start, stop in pieces:
        first, last = max(block.start, at), min(block.stop, at + stop - start)
        if first < last:
            yield side, slice(start + first - at, start + last - at)
        at += stop - start


def end_to_end(pieces: list[np.ndarray]) -> np.ndarray:
    """Rows under each other; a block seldom has more than one piece, which is not copied once more."""
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass(frozen=True)
class Blocks(Placing):
    """A matrix of four blocks: the parents on the diagonal, ``off_diagonal`` beside them; columns that read the text
    half and the image half times ``columns``."""

    text: Parent
    image: Parent
    tensor: str
    off_diagonal: str
    pieces: tuple[Segment, ...]
    columns: tuple[float, float] = (1.0, 1.0)

    @property
    def fate(self) -> str:
        blocks = f"text and image {self.tensor} on the diagonal, {self.off_diagonal} beside them"
        return blocks + _times(self.columns, "columns ")

    @property
    def origins(self) -> tuple[tuple[Parent, str], ...]:
        return (self.text, self.tensor), (self.image, self.tensor)

    @property
    def only_places(self) -> bool:
        return self.off_diagonal != "average" and self.columns == (1.0, 1.0)

    def place(self, block: slice, read: Read) -> np.ndarray:
        return end_to_end([self._half(own, rows, read) for own, rows in cut(self.pieces, block)])

    def _half(self, own: Parent, rows: slice, read: Read) -> np.ndarray:
        other = self.image if own is self.text else self.text
        diagonal = read(own.checkpoint, self.tensor, rows)
        if self.off_diagonal == "zero":
            beside = np.zeros((len(diagonal), other.shape(self.tensor)[1]), diagonal.dtype)
        elif self.off_diagonal == "copy":
            beside = diagonal
        else:
            beside = mean(diagonal, read(other.checkpoint, self.tensor, rows), 0.5)
        pair = (diagonal, beside) if own is self.text else (beside, diagonal)
        if self.columns != (1.0, 1.0):
            pair = tuple(half * np.float32(factor) for half, factor in zip(pair, self.columns, strict=True))
        return np.concatenate(pair, axis=1)


def _times(factors: tuple[float, float], what: str = "") -> str:
    return "" if factors == (1.0, 1.0) else f", {what}times {factors[0]:.6g} and {factors[1]:.6g}"


@dataclass(frozen=True)
class Ends(Placing):
    """A vector, or a matrix with a vector per head: the text parent's rows, then the image parent's."""

    tensor: str
    pieces: tuple[Segment, ...]

    @property
    def fate(self) -> str:
        return f"text and image {self.tensor} end to end"

    @property
    def origins(self) -> tuple[tuple[Parent, str], ...]:
        return tuple({side.side: (side, self.tensor) for side, *_ in self.pieces}.values())

    def place(self, block: slice, read: Read) -> np.ndarray:
        return end_to_end([read(side.checkpoint, self.tensor, rows) for side, rows in cut(self.pieces, block)])


@dataclass(frozen=True)
class CalibratedNorm:
    """A norm's weight or bias end to end, corrected: a half's ``factor * y + offset`` goes through its weight and bias.

    ``around_one``: the norm multiplies by one plus its weight.
    """

    ends: Ends
    halves: Mapping[str, Half]
    around_one: bool

    @property
    def fate(self) -> str:
        if self.ends.tensor.endswith(".bias"):
            offsets = " and ".join(f"{half.offset:.6g}" for half in self.halves.values())
            return f"{self.ends.fate}, plus {offsets} times the weight"
        return self.ends.fate + _times((self.halves["text"].factor, self.halves["image"].factor))

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.ends.sources

    def rows(self, block: slice) -> np.ndarray:
        return end_to_end([self._half(side, rows) for side, rows in cut(self.ends.pieces, block)])

    def _half(self, side: Parent, rows: slice) -> np.ndarray:
        stored, half = side.checkpoint.read(self.ends.tensor, rows), self.halves[side.side]
        if self.ends.tensor.endswith(".bias"):
            weight = side.checkpoint.read(self.ends.tensor.removesuffix("bias") + "weight", rows)
            return stored + np.float32(half.offset) * weight
        one = np.float32(self.around_one)
        return np.float32(half.factor) * (one + stored) - one


@dataclass(frozen=True)
class SideBySide:
    """A table: each row is the text parent's row followed by the image parent's, times ``scales``."""

    text: Table
    image: Table
    scales: tuple[float, float] = (1.0, 1.0)
    apart: bool = False

    @property
    def fate(self) -> str:
        which = "own rows" if self.apart else "rows"
        beside = "beside zeros" if self.apart else "side by side"
        return f"{which} of text {self.text.tensor} and image {self.image.tensor} {beside}{_times(self.scales)}"

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.text.origin, self.image.origin)

    def rows(self, block: slice) -> np.ndarray:
        halves = zip((self.text, self.image), self.scales, strict=True)
        return np.concatenate([table.read(block) * np.float32(scale) for table, scale in halves], axis=1)


@dataclass(frozen=True)
class Positions(Placing):
    """Learned positions: rows of both parents side by side."""

    text: Parent
    image: Parent
    tensor: str

    @property
    def fate(self) -> str:
        return f"rows of text and image {self.tensor} side by side"

    @property
    def origins(self) -> tuple[tuple[Parent, str], ...]:
        return (self.text, self.tensor), (self.image, self.tensor)

    def place(self, block: slice, read: Read) -> np.ndarray:
        return np.concatenate([read(side.checkpoint, self.tensor, block) for side in (self.text, self.image)], axis=1)


def obstacles(pair: Pair, recipe: MergeRecipe) -> list[str]:
    """Why a width merge of these parents is impossible; empty when it is possible."""
    text, image = pair.sides
    found = single_network_obstacles(pair)
    if text.family.model_type != image.family.model_type:
        return found
    ratios = [side.sizes.heads // side.sizes.kv_heads for side in (text, image)]
    if ratios[0] != ratios[1]:
        found.append(f"query heads per key/value head are {ratios[0]} and {ratios[1]}; they must be equal")
    for name, axes in text.axes.items():
        if name not in image.axes:
            continue
        ours, theirs = text.shape(name), image.shape(name)
        if axes[0] == "positions" and ours[0] != theirs[0]:
            found.append(f"learned positions are {ours[0]} and {theirs[0]}; equal numbers are required")
        elif _joins_features(axes) and ours != theirs:
            if recipe.width.off_diagonal != "zero":
                found.append(
                    f"tensor {name} is {list(ours)} in the text parent and {list(theirs)} in the image parent; "
                    f"off_diagonal={recipe.width.off_diagonal} needs equal shapes, width.off_diagonal=zero does not"
                )
            break
    if recipe.width.qk_norm == "equal":
        found += _unequal_head_norms(text, image)
    return found


def _joins_features(axes: Axes) -> bool:
    """A matrix that reads features, hence one of four blocks."""
    return len(axes) == 2 and axes[0] not in ("vocab", "positions", "head_count", "kv_head_count")


def _shared_by_heads(name: str, axes: Axes) -> bool:
    """A norm of queries or keys with one vector for all heads, or one statistic over all of them."""
    return "norm" in name and axes in (("head_dim",), ("heads",), ("kv_heads",))


def _unequal_head_norms(text: Parent, image: Parent) -> list[str]:
    for name, axes in text.axes.items():
        if _shared_by_heads(name, axes):
            ours, theirs = (side.checkpoint.read(name) for side in (text, image))
            if not np.array_equal(ours, theirs):
                return [
                    f"tensor {name} serves all heads at once and differs between the parents; equal norms of queries "
                    "and keys are required, or width.qk_norm=average (changes both parents)"
                ]
    return []


def _embedding_scales(text: Parent, image: Parent) -> tuple[float, float]:
    """What keeps each half's first states its parent's where the family multiplies rows by the root of the width."""
    if not text.family.scaled_embeddings:
        return 1.0, 1.0
    both = text.sizes.model + image.sizes.model
    return (text.sizes.model / both) ** 0.5, (image.sizes.model / both) ** 0.5


def _folded(pair: Pair, calibration: Calibration | None) -> dict[str, tuple[float, float]]:
    """Tensors whose columns take the factors of a norm that has no weights of its own."""
    if calibration is None:
        return {}
    found = {}
    for norm, readers in norm_names(pair.image).items():
        if f"{norm}.weight" in pair.image.axes:
            continue
        if not readers:
            raise MergeError(
                f"width.calibration: norm {norm} has no weights and what reads it is not known; merge without "
                "calibration"
            )
        found |= dict.fromkeys(readers, calibration.factors(norm))
    return found


def _config(pair: Pair, recipe: MergeRecipe, own_head: bool) -> dict:
    """``own_head``: the head differs from the table by more than its place."""
    text, image = pair.sides
    ours, theirs = text.sizes, image.sizes
    # a head that is a scaled table cannot undo the scale that both halves enter with
    tied = ours.tied and theirs.tied and not text.family.scaled_embeddings and not own_head
    config = single_table_config(image, pair.union.vocabulary, recipe.dtype, tie_word_embeddings=tied)
    for name in ("heads", "model", "ffn"):
        config[image.family.keys[name]] = getattr(ours, name) + getattr(theirs, name)
    config["max_position_embeddings"] = min(ours.positions, theirs.positions)
    if image.family.reads_head_dim and image.family.sizes(config | {"head_dim": None}).head_dim != ours.head_dim:
        config["head_dim"] = ours.head_dim  # the text parent may state what the image parent leaves to be derived
    for key, value in {
        "num_key_value_heads": ours.kv_heads + theirs.kv_heads,
        "word_embed_proj_dim": ours.model + theirs.model,
    }.items():
        if config.get(key) is not None:
            config[key] = value
    return config


def _halves(maps: Sequence[np.ndarray]) -> list[str]:
    """Which half of every row is not zero."""
    half = {(True, True): "both halves", (True, False): "half: text", (False, True): "half: image"}
    kept = [(rows != ZERO).tolist() for rows in maps]
    return [half[both] for both in zip(*kept, strict=True)]


def plan(pair: Pair, recipe: MergeRecipe) -> Plan:
    """The jobs of a width merge; the parents must have no ``obstacles``."""
    text, image, union, mode = pair.text, pair.image, pair.union, recipe.width.off_diagonal
    calibration = None if recipe.width.calibration is None else read_calibration(recipe.width.calibration, pair)
    folded = _folded(pair, calibration)
    apart = recipe.width.head == "own"
    config = _config(pair, recipe, own_head=apart or HEAD in folded)
    sizes = image.family.sizes(config)
    maps = [half_map(union, side) for side in pair.sides]
    kinds = union.vocabulary.kinds()
    foreign = (IMAGE, TEXT)  # what the text half and the image half leave to the other, where that one knows the id
    heads = [
        np.where(apart & (kinds == kind) & (other != ZERO), ZERO, rows)
        for kind, rows, other in zip(foreign, maps, reversed(maps), strict=True)
    ]
    jobs = []
    for name, axes in image.family.tensors(config).items():
        rule: Rule
        if axes[0] == "vocab":
            tensors = [side.head if name == HEAD else side.family.embed for side in (text, image)]
            scales = folded.get(name, (1.0, 1.0)) if name == HEAD else _embedding_scales(text, image)
            tables = [
                Table(side, tensor, rows, union.rows(side.side))
                for side, tensor, rows in zip(pair.sides, tensors, heads if name == HEAD else maps, strict=True)
            ]
            rule = SideBySide(*tables, scales, apart and name == HEAD)
        elif axes[0] == "positions":
            rule = Positions(text, image, name)
        elif axes == ("head_dim",):
            rule = Average(text, image, name, 0.5)
        elif _joins_features(axes):
            columns = folded.get(name, (1.0, 1.0))
            rule = Blocks(text, image, name, mode, segments(text, image, axes[0]), columns)
        else:
            rule = Ends(name, segments(text, image, axes[0]))
            norm = name.rpartition(".")[0]
            if calibration is not None and norm in calibration.norms:
                rule = CalibratedNorm(rule, calibration.norms[norm], image.family.norms_around_one)
        jobs.append(Job(name, image.family.shape(sizes, axes), rule))
    mixed = f"one norm over {sizes.model} features mixes the statistics of both halves, so that not even zero "
    mixed += "off-diagonal blocks keep a parent's function exactly"
    if calibration is not None:
        mixed += f"; corrected on average by {calibration.path.name}, measured on {calibration.data}"
    scale = {} if apart else {"head_scale": 1.0}
    scores = "head_scale 1: logits are the sum of both parents' logits (scaled by the mixed norm), hence sharper than "
    scores += "either's where they agree; training settles it"
    if apart:
        scores = "each half alone scores text and image codes, its own; the mixed norm scales both"
    notes = [mixed, scores]
    if text.sizes.tied != image.sizes.tied:
        notes.append("one parent ties its head to its table and the other does not: the result is untied")
    elif apart and text.sizes.tied:
        notes.append("the head's rows differ from the table's: it is no longer tied to it")
    elif HEAD in folded and text.sizes.tied:
        notes.append(
            "the head takes the factors of the last norm, which has no weights: it is no longer tied to the table"
        )
    elif text.sizes.tied and not sizes.tied:
        notes.append("rows enter times the root of the width: the table is rescaled, and the head no longer tied to it")
    if any(_shared_by_heads(name, axes) for name, axes in text.axes.items()):
        notes.append(
            "norms of queries and keys are shared by all heads: "
            + ("equal in both parents" if recipe.width.qk_norm == "equal" else "qk_norm=average, doubtful")
        )
    kept, measured = "bit for bit", {}
    if calibration is not None:
        kept = (
            "bit for bit but for columns times a measured factor"
            if folded
            else kept + ", norms times a measured factor"
        )
        measured = {"calibration": {"sha256": calibration.sha256, "data": calibration.data}}
    tables = {"input": describe(_halves(maps)), "head": describe(_halves(heads))}
    return Plan(
        "width",
        tuple(jobs),
        config,
        joint_jam_file(pair, "width"),
        f"the diagonal blocks are the parents, {kept}; off-diagonal blocks: {mode}",
        tables if apart else {"input and head": tables["input"]},
        tuple(notes),
        {"off_diagonal": mode, "head": recipe.width.head, "head_dim": sizes.head_dim} | scale | measured,
    )
