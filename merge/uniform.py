"""Uniform merge: every tensor is the weighted mean of two parents of the same shape (JAM-Uniform, arXiv 2309.15564).

A vocabulary row is averaged when both parents know the id, and copied when one does. The result is a checkpoint of the
parents' own class. Computes in float32; does not align the parents (permutations, scales) before averaging.
"""

import re
from dataclasses import dataclass

import numpy as np

from jam.models.family import HEAD
from jam.models.traits import trait
from merge.plan import Copy, Job, Parent, Plan, Rule, Source, single_table_config
from merge.recipe import MergeRecipe, UniformSection
from merge.rows import MEAN, Table, describe
from merge.union import NONE, Pair, Rows, joint_jam_file


def mean(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """``weight * first + (1 - weight) * second`` in float32; equal entries stay bit-equal under any weight (at one half
    down to 2^-148, twice float32's smallest number).

    >>> mean(np.float32([1.0, 3.0]), np.float32([3.0, 3.0]), 0.25).tolist()
    [2.5, 3.0]
    """
    if weight in (0.0, 1.0):
        return first if weight else second
    result = np.float32(weight) * first
    result += np.float32(1.0 - weight) * second
    if weight != 0.5:  # two halves make a whole; other shares round
        np.copyto(result, first, where=first == second)
    return result


@dataclass(frozen=True)
class Average:
    """The weighted mean of the same tensor of both parents."""

    text: Parent
    image: Parent
    tensor: str
    weight: float

    @property
    def fate(self) -> str:
        return f"{self.weight:g} x text + {1 - self.weight:g} x image {self.tensor}"

    @property
    def sources(self) -> tuple[Source, ...]:
        return tuple((side.side, self.tensor) for side in (self.text, self.image))

    def rows(self, block: slice) -> np.ndarray:
        sides = (side.checkpoint.read(self.tensor, block) for side in (self.text, self.image))
        return mean(*sides, self.weight)


BOTH, TEXT_ALONE, IMAGE_ALONE = 0, 1, 2
_FATES = {BOTH: "averaged", TEXT_ALONE: "text row", IMAGE_ALONE: "image row"}


@dataclass(frozen=True)
class AverageRows:
    """A table whose rows are averaged, or copied from one parent, as ``taken`` int [V] says."""

    text: Table
    image: Table
    taken: np.ndarray
    weight: float

    @property
    def fate(self) -> str:
        return f"rows averaged or copied from text {self.text.tensor} and image {self.image.tensor}"

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.text.origin, self.image.origin)

    def rows(self, block: slice) -> np.ndarray:
        # a row that a parent lacks reads as its mean row and is then not used
        text, image = self.text.read(block), self.image.read(block)
        taken = self.taken[block][:, None]
        both = mean(text, image, self.weight)
        return np.where(taken == IMAGE_ALONE, image, np.where(taken == TEXT_ALONE, text, both))


def takers(pair: Pair) -> np.ndarray:
    """uint8 [V]: whether both parents or one of them know an id; a reserved id that neither knows is averaged if both
    have it."""
    text, image = pair.union.text, pair.union.image
    result = np.full(len(text.known), BOTH, np.uint8)
    result[~image.known & (text.known | (image.source == NONE))] = TEXT_ALONE
    result[~text.known & (image.known | (text.source == NONE))] = IMAGE_ALONE
    return result


def whole_table(side: Parent, tensor: str, rows: Rows) -> Table:
    """A parent's table in the joint order; ids that it lacks read as its mean row."""
    return Table(side, tensor, np.where(rows.source == NONE, MEAN, rows.source), rows)


def single_network_obstacles(pair: Pair) -> list[str]:
    """What keeps two parents from becoming one network of their own class, whatever its width."""
    text, image = pair.sides
    if text.family.model_type != image.family.model_type:
        return [f"the parents are {text.family.model_type} and {image.family.model_type}; one family is required"]
    found = []
    for key in text.family.alike:
        ours, theirs = (trait(side.config, key) for side in pair.sides)
        if ours != theirs:
            found.append(f"{key} is {ours!r} in the text parent and {theirs!r} in the image parent")
    for name in ("layers", "head_dim"):
        ours, theirs = (getattr(side.sizes, name) for side in pair.sides)
        if ours != theirs:
            found.append(f"{name} is {ours} in the text parent and {theirs} in the image parent")
    if reason := pair.obstacle():
        found.append(reason)
    return found


def obstacles(pair: Pair, recipe: MergeRecipe) -> list[str]:
    """Why a uniform merge of these parents is impossible; empty when it is possible."""
    text, image = pair.sides
    found = single_network_obstacles(pair)
    if text.family.model_type == image.family.model_type:
        for name, axes in text.axes.items():
            if axes[0] == "vocab" or name not in image.axes or text.shape(name) == image.shape(name):
                continue
            ours, theirs = list(text.shape(name)), list(image.shape(name))
            found.insert(0, f"tensor {name} is {ours} in the text parent and {theirs} in the image parent")
            break
        if text.sizes.model != image.sizes.model:
            found.append(
                f"the width is {text.sizes.model} in the text parent and {image.sizes.model} in the image parent"
            )
        if text.sizes.heads != image.sizes.heads or text.sizes.kv_heads != image.sizes.kv_heads:
            found.append("the parents have unequal numbers of attention heads")
    return found


_LAYER = re.compile(r"\.layers\.(\d+)\.")


def share(section: UniformSection, name: str, layers: int, first: bool) -> float:
    """The text parent's share in one tensor. Outside of the layers the table takes a gradient's first value, what
    stands after the layers its last.

    >>> [share(UniformSection(weight=[0.0, 1.0]), f"model.layers.{n}.x", 3, False) for n in range(3)]
    [0.0, 0.5, 1.0]
    """
    weight = next((rule.weight for rule in section.rules if re.search(rule.match, name)), section.weight)
    if not isinstance(weight, list):
        return weight
    layer = _LAYER.search(name)
    at = int(layer[1]) / max(1, layers - 1) if layer else 0.0 if first else 1.0
    return float(np.interp(at * (len(weight) - 1), range(len(weight)), weight))


def plan(pair: Pair, recipe: MergeRecipe) -> Plan:
    """The jobs of a uniform merge; the parents must have no ``obstacles``."""
    text, image, union, section = pair.text, pair.image, pair.union, recipe.uniform
    tied = text.sizes.tied and image.sizes.tied
    config = single_table_config(image, union.vocabulary, recipe.dtype, tie_word_embeddings=tied)
    config["max_position_embeddings"] = min(text.sizes.positions, image.sizes.positions)
    sizes, taken = image.family.sizes(config), takers(pair)
    jobs = []
    for name, axes in image.family.tensors(config).items():
        rule: Rule
        weight = share(section, name, sizes.layers, first="embed" in name)
        if axes[0] == "vocab":
            tensors = [side.head if name == HEAD else side.family.embed for side in (text, image)]
            tables = (whole_table(text, tensors[0], union.text), whole_table(image, tensors[1], union.image))
            rule = AverageRows(*tables, taken, weight)
        elif weight in (0.0, 1.0):
            rule = Copy(text if weight else image, name)
        else:
            rule = Average(text, image, name, weight)
        jobs.append(Job(name, image.family.shape(sizes, axes), rule))
    notes = []
    if text.sizes.tied != image.sizes.tied:
        notes.append(
            "one parent ties its head to its table and the other does not: the result is untied, heads averaged"
        )
    if section.weight in (0.0, 1.0) and not section.rules:
        whose = "text" if section.weight else "image"
        notes.append(f"weight {section.weight:g} takes every shared tensor from the {whose} parent alone")
    preserves = (
        "every tensor is the weighted mean of the parents, a row that one parent owns alone is that parent's; "
        "nothing of either parent's function is promised before training"
    )
    table = describe([_FATES[which] for which in taken.tolist()])
    return Plan(
        "uniform",
        tuple(jobs),
        config,
        joint_jam_file(pair, "uniform"),
        preserves,
        {"input and head": table},
        tuple(notes),
        {"weight": section.weight, "rules": [rule.model_dump() for rule in section.rules]},
    )
