"""Uniform merge: every tensor is the weighted mean of two parents of the same shape (JAM-Uniform, arXiv 2309.15564).

A vocabulary row is averaged when both parents know the id, and copied when one does. The result is a checkpoint of the
parents' own class. Computes in float32; does not align the parents (permutations, scales) before averaging.

For parents trained from one ancestor, ``rule`` names another way than the mean (``merge.rules``). It applies to the
rows that all of them own; what one or two own stays as above.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jam.errors import MergeError
from jam.models.family import HEAD
from jam.models.traits import trait
from merge.plan import Copy, Job, Parent, Plan, Rule, Source, read_parent, single_table_config
from merge.recipe import MergeRecipe, UniformSection
from merge.rows import MEAN, Table, describe
from merge.rules import Reader, Slerp, TaskVectors, Whole, mean
from merge.union import NONE, Pair, Rows, joint_jam_file, one_tokenizer


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


@dataclass(frozen=True)
class RuleRows:
    """A table: rows ``shared`` bool [V] by a rule, the others as ``rest`` has them."""

    rule: Slerp | TaskVectors
    rest: AverageRows
    shared: np.ndarray

    @property
    def fate(self) -> str:
        return f"shared rows by {self.rule.fate}; others: {self.rest.fate}"

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.rule.sources

    def rows(self, block: slice) -> np.ndarray:
        shared = self.shared[block]
        if shared.all():
            return self.rule.rows(block)
        return np.where(shared[:, None], self.rule.rows(block), self.rest.rows(block))


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
        ours, theirs = (trait(side.config, key, f"{side.path}/config.json") for side in pair.sides)
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


def read_base(pair: Pair, folder: Path) -> Parent:
    """The parents' ancestor.

    Raises:
        CheckpointError: a damaged folder, as for a parent.
        MergeError: another family or other shapes than the parents', or ids that are not the joint ones.
    """
    base, image = read_parent(folder, "base"), pair.image
    if base.family.model_type != image.family.model_type:
        raise MergeError(
            f"uniform.base {folder}: a {base.family.model_type} model, the parents are {image.family.model_type}; "
            "their common ancestor is required, give its folder"
        )
    for name, axes in (image.axes | base.axes).items():
        if axes[0] == "vocab":
            continue
        found, wanted = (list(side.shape(name)) if name in side.axes else "missing" for side in (base, image))
        if found != wanted:
            raise MergeError(
                f"uniform.base {folder}: tensor {name} is {found}, in the parents {wanted}; their common ancestor is "
                "required, give its folder"
            )
    owner = image if pair.union.same else pair.text
    if base.sizes.model != image.sizes.model or not one_tokenizer(base, owner):
        raise MergeError(
            f"uniform.base {folder}: its width, ids or tokenizer are not those of the {owner.side} parent, which the "
            "result keeps; the common ancestor with the same ids is required, give its folder"
        )
    return base


@dataclass(frozen=True)
class Combination:
    """How this merge combines what both parents have: the recipe's rule, and the ancestor if the rule reads one."""

    pair: Pair
    section: UniformSection
    seed: int
    base: Parent | None

    def rule(self, name: str, shape: tuple[int, ...], weight: float) -> Rule:
        """The rule of a tensor without vocabulary rows."""
        sides = (self.pair.text, self.pair.image)
        if weight in (0.0, 1.0) and self.section.rule in ("linear", "slerp"):
            return Copy(sides[0] if weight else sides[1], name)
        if self.section.rule == "linear":
            return Average(*sides, name, weight)
        readers = [Whole(side, name) for side in (*sides, self.base) if side is not None]
        return self._combined(name, shape, weight, readers, None)

    def table(self, name: str, shape: tuple[int, ...], weight: float, taken: np.ndarray) -> Rule:
        """The rule of a table or head."""
        union = self.pair.union
        tables = [
            whole_table(side, side.head if name == HEAD else side.family.embed, rows)
            for side, rows in zip(self.pair.sides, (union.text, union.image), strict=True)
        ]
        rest = AverageRows(*tables, taken, weight)
        if self.section.rule == "linear":
            return rest
        if self.base is not None:
            tensor = self.base.head if name == HEAD else self.base.family.embed
            tables.append(whole_table(self.base, tensor, Rows.same(self.base.vocabulary, shape[0])))
        shared = self.shared()
        return RuleRows(self._combined(name, shape, weight, tables, shared), rest, shared)

    def shared(self) -> np.ndarray:
        """bool [V]: the ids that all own."""
        union = self.pair.union
        found = union.text.known & union.image.known
        return found if self.base is None else found & Rows.same(self.base.vocabulary, len(found)).known

    def _combined(
        self, name: str, shape: tuple[int, ...], weight: float, readers: list[Reader], shared: np.ndarray | None
    ) -> Slerp | TaskVectors:
        section = self.section
        if section.rule == "slerp":
            return Slerp(*readers, shape, weight, shared)
        density = 1.0 if section.density is None else section.density
        return TaskVectors(section.rule, *readers, name, shape, weight, section.scale, density, self.seed, shared)


def plan(pair: Pair, recipe: MergeRecipe) -> Plan:
    """The jobs of a uniform merge; the parents must have no ``obstacles``.

    Raises:
        CheckpointError, MergeError: the ancestor that the recipe names is damaged or none of these parents'.
    """
    text, image, union, section = pair.text, pair.image, pair.union, recipe.uniform
    tied = text.sizes.tied and image.sizes.tied
    config = single_table_config(image, union.vocabulary, recipe.dtype, tie_word_embeddings=tied)
    config["max_position_embeddings"] = min(text.sizes.positions, image.sizes.positions)
    sizes, taken = image.family.sizes(config), takers(pair)
    base = None if section.base is None else read_base(pair, section.base)
    combination, jobs = Combination(pair, section, recipe.seed, base), []
    for name, axes in image.family.tensors(config).items():
        weight, shape = share(section, name, sizes.layers, first="embed" in name), image.family.shape(sizes, axes)
        if axes[0] == "vocab":
            rule = combination.table(name, shape, weight, taken)
        else:
            rule = combination.rule(name, shape, weight)
        jobs.append(Job(name, shape, rule))
    notes = []
    if text.sizes.tied != image.sizes.tied:
        notes.append(
            "one parent ties its head to its table and the other does not: the result is untied, heads averaged"
        )
    if section.weight in (0.0, 1.0) and not section.rules:
        whose = "text" if section.weight else "image"
        notes.append(f"weight {section.weight:g} takes every shared tensor from the {whose} parent alone")
    by_rule = "the weighted mean of the parents"
    labels = [_FATES[which] for which in taken.tolist()]
    figures = {"weight": section.weight, "rules": [rule.model_dump() for rule in section.rules]}
    if section.rule != "linear":
        by_rule = f"made of the parents by {section.rule}"
        notes.append(
            f"{section.rule} supposes parents that were trained from one ancestor; whether they were is not seen"
        )
        labels = [section.rule if at else label for at, label in zip(combination.shared(), labels, strict=True)]
        figures |= {"rule": section.rule, "scale": section.scale, "density": section.density}
    if base is not None:
        figures["base"] = {"folder": base.path.name, "identity": base.checkpoint.identity()}
    preserves = (
        f"every tensor is {by_rule}, a row that one parent owns alone is that parent's; "
        "nothing of either parent's function is promised before training"
    )
    return Plan(
        "uniform",
        tuple(jobs),
        config,
        joint_jam_file(pair, "uniform"),
        preserves,
        {"input and head": describe(labels)},
        tuple(notes),
        figures,
    )
