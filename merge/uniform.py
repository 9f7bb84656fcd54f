"""Uniform merge: every tensor is the weighted mean of two parents of the same shape (JAM-Uniform, arXiv 2309.15564).

A vocabulary row is averaged when both parents own the id, and copied when one does. The result is a checkpoint of the
parents' own class. Computes in float32; does not align the parents (permutations, scales) before averaging.
"""

from dataclasses import dataclass

import numpy as np

from jam.models.families import HEAD, rope
from merge.plan import Copy, Job, Parent, Plan, Rule, joint_jam_file, single_table_config
from merge.recipe import MergeRecipe
from merge.rows import MEAN, Table, describe, disagreement, owned


def mean(first: np.ndarray, second: np.ndarray, weight: float) -> np.ndarray:
    """``weight * first + (1 - weight) * second`` in float32; equal entries stay bit-equal under any weight.

    >>> mean(np.float32([1.0, 3.0]), np.float32([3.0, 3.0]), 0.25).tolist()
    [2.5, 3.0]
    """
    if weight in (0.0, 1.0):
        return first if weight else second
    result = np.float32(weight) * first + np.float32(1.0 - weight) * second
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

    def rows(self, block: slice) -> np.ndarray:
        sides = (side.checkpoint.read(self.tensor, block) for side in (self.text, self.image))
        return mean(*sides, self.weight)


@dataclass(frozen=True)
class AverageRows:
    """A table whose rows are averaged, or copied from the image parent where ``image_alone`` bool [V] says so."""

    text: Table
    image: Table
    image_alone: np.ndarray
    weight: float

    @property
    def fate(self) -> str:
        return f"rows averaged or copied from text {self.text.tensor} and image {self.image.tensor}"

    def rows(self, block: slice) -> np.ndarray:
        # a row that the text parent lacks reads as its mean row and is then not used
        text, image = self.text.read(block), self.image.read(block)
        return np.where(self.image_alone[block][:, None], image, mean(text, image, self.weight))


def image_alone(text: Parent, image: Parent) -> np.ndarray:
    """bool [V]: ids that the image parent alone knows or has. The joint vocabulary is the image parent's, so none is
    the text parent's alone; a reserved id that neither owns is averaged if both have it."""
    size = image.vocabulary.size
    present = np.arange(size) < text.vocabulary.size
    return ~owned(text.vocabulary, size) & (owned(image.vocabulary, size) | ~present)


def single_network_obstacles(text: Parent, image: Parent) -> list[str]:
    """What keeps two parents from becoming one network of their own class, whatever its width."""
    if text.family.model_type != image.family.model_type:
        return [f"the parents are {text.family.model_type} and {image.family.model_type}; one family is required"]
    found = []
    for key in text.family.alike:
        pair = [rope(s.config) if key == "rope" else s.family.value(s.config, key) for s in (text, image)]
        if pair[0] != pair[1]:
            found.append(f"{key} is {pair[0]!r} in the text parent and {pair[1]!r} in the image parent")
    for name in ("layers", "head_dim"):
        pair = [getattr(side.sizes, name) for side in (text, image)]
        if pair[0] != pair[1]:
            found.append(f"{name} is {pair[0]} in the text parent and {pair[1]} in the image parent")
    if reason := disagreement(text, image):
        found.append(reason)
    return found


def obstacles(text: Parent, image: Parent, recipe: MergeRecipe) -> list[str]:
    """Why a uniform merge of these parents is impossible; empty when it is possible."""
    found = single_network_obstacles(text, image)
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


def plan(text: Parent, image: Parent, recipe: MergeRecipe) -> Plan:
    """The jobs of a uniform merge; the parents must have no ``obstacles``."""
    weight = recipe.uniform.weight
    tied = text.sizes.tied and image.sizes.tied
    config = single_table_config(image, image.vocabulary, recipe.dtype, tie_word_embeddings=tied)
    config["max_position_embeddings"] = min(text.sizes.positions, image.sizes.positions)
    sizes, alone = image.family.sizes(config), image_alone(text, image)
    jobs = []
    for name, axes in image.family.tensors(config).items():
        rule: Rule
        if axes[0] == "vocab":
            tensors = [side.head if name == HEAD else side.family.embed for side in (text, image)]
            ids = np.arange(image.vocabulary.size)
            rows = np.where(ids < text.vocabulary.size, ids, MEAN)
            rule = AverageRows(Table(text, tensors[0], rows), Table(image, tensors[1], ids), alone, weight)
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
    if not (0.0 < weight < 1.0):
        notes.append(
            f"weight {weight:g} takes every shared tensor from the {'text' if weight else 'image'} parent alone"
        )
    preserves = (
        "every tensor is the weighted mean of the parents, a row that one parent owns alone is that parent's; "
        "nothing of either parent's function is promised before training"
    )
    table = describe(["image row" if only else "averaged" for only in alone.tolist()])
    return Plan(
        "uniform",
        tuple(jobs),
        config,
        joint_jam_file(image, "uniform", text),
        preserves,
        {"input and head": table},
        tuple(notes),
        {"weight": weight},
    )
