"""An extended text model: the text parent alone, with rows for the image parent's codes and controls.

What Liquid and Anole begin with: one plain network whose table and head know more ids. Of the image parent only the
vocabulary and the image tokenizer are taken (and its rows, where ``rows`` asks for them); the result is a checkpoint of
the text parent's own class. A new row is the mean of the old ones, that mean with their spread around it, the image
parent's, or zero; the closing control of an image takes the head row of the end of text, as in a cross merge.

All is keyed by (seed, tensor, id) and summed in one order, so that the bytes are the same on every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jam.models.family import HEAD
from merge.noise import Quantiles
from merge.plan import Copy, Job, Plan, Source, single_table_config
from merge.recipe import MergeRecipe
from merge.rows import MEAN, Table, describe, tower_map
from merge.union import NONE, Pair, joint_jam_file

_WORDS = {"mean": "mean of text rows", "normal": "normal around the mean of text rows", "zero": "zero"}


@dataclass(frozen=True)
class Extended:
    """A table or head of the text parent with new rows where ``table.source`` is ``MEAN``.

    ``init`` is "mean", "normal" (mean and standard deviation of each column over the rows that the parent trained),
    "zero" or "parent": the rows of ``other``, the image parent's table of the same width; the mean where it has none.
    """

    table: Table
    init: str
    seed: int
    name: str
    other: Table | None = None

    @property
    def fate(self) -> str:
        return f"rows of text {self.table.tensor}, new ids: {'image rows' if self.other else _WORDS[self.init]}"

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.table.origin,) if self.other is None else (self.table.origin, self.other.origin)

    def rows(self, block: slice) -> np.ndarray:
        found = self.table.read(block)
        new = self.table.source[block] == MEAN
        if self.init == "mean" or not new.any():
            return found
        if self.init == "zero":
            found[new] = 0.0
        elif self.init == "parent":
            theirs = new & (self.other.source[block] != MEAN)
            found[theirs] = self.other.read(block)[theirs]
        else:
            noise = Quantiles((len(self.table.source), found.shape[1]), 1.0, self.seed, self.name)
            found[new] += noise.rows(block)[new] * self.table.spread
        return found

    def labels(self) -> list[str]:
        """Where every row comes from, for the report."""
        source, rows = self.table.source, self.table.rows
        theirs = None if self.other is None else self.other.source != MEAN
        labels = []
        for index, row in enumerate(source.tolist()):
            if row != MEAN:
                labels.append("text row" if rows.source[index] == row else "new: text eos row")
            elif theirs is not None:
                labels.append("image row" if theirs[index] else "new: mean of text rows")
            else:
                labels.append(f"new: {_WORDS[self.init]}")
        return labels


def obstacles(pair: Pair, recipe: MergeRecipe) -> list[str]:
    """Why the text parent cannot be extended; empty when it can."""
    text, image = pair.sides
    found = []
    if reason := pair.obstacle():
        found.append(reason)
    for use in ("table", "head"):
        if getattr(recipe.extend, use) == "parent" and text.sizes.model != image.sizes.model:
            found.append(
                f"extend.{use} is parent, and the width is {text.sizes.model} in the text parent and "
                f"{image.sizes.model} in the image parent; rows of one width are required, choose normal"
            )
    if text.sizes.tied and recipe.extend.head is not None:
        found.append("extend.head is given, and the text parent's head is its table; remove extend.head")
    return found


def _table_of(pair: Pair, name: str, init: str) -> Table | None:
    """The image parent's rows for a table or head of the text parent, if they are asked for."""
    if init != "parent":
        return None
    image, rows = pair.image, pair.union.image
    tensor = image.head if name == HEAD else image.family.embed
    return Table(image, tensor, np.where(rows.source == NONE, MEAN, rows.source), rows)


def _map(pair: Pair, use: str) -> np.ndarray:
    """int64 [V], as ``tower_map``, but for reserved ids of the text parent that stay reserved: they keep their rows."""
    found, theirs = tower_map(pair.union, pair.text, use), pair.union.text.source
    reserved = (found == MEAN) & (theirs >= 0)
    reserved[list(pair.union.vocabulary.controls.values())] = False
    return np.where(reserved, theirs, found)


def _jobs(pair: Pair, recipe: MergeRecipe) -> Iterator[Job]:
    text, size = pair.text, pair.union.vocabulary.size
    for name, axes in text.axes.items():
        shape, rule = text.shape(name), Copy(text, name)
        if axes[0] == "vocab":
            is_head = name == HEAD
            init = (recipe.extend.head if is_head else None) or recipe.extend.table
            use = "tied" if text.sizes.tied else "head" if is_head else "input"
            table = Table(text, name, _map(pair, use), pair.union.text)
            shape, rule = (size, shape[1]), Extended(table, init, recipe.seed, name, _table_of(pair, name, init))
        yield Job(name, shape, rule)


def plan(pair: Pair, recipe: MergeRecipe) -> Plan:
    """The jobs of an extension; the parents must have no ``obstacles``."""
    text, union = pair.text, pair.union
    jobs = tuple(_jobs(pair, recipe))
    report = {job.name: describe(job.rule.labels()) for job in jobs if isinstance(job.rule, Extended)}
    preserves = (
        "on text the distribution over the text parent's own ids is that parent's; nothing of the image parent, whose "
        "codes are new ids without training"
    )
    notes = ("one head scores text and codes: train it before images are asked for",)
    config = single_table_config(text, union.vocabulary, recipe.dtype)
    return Plan(
        "extend",
        jobs,
        config,
        joint_jam_file(pair, "extend"),
        preserves,
        report,
        notes,
        {"table": recipe.extend.table, "head": recipe.extend.head},
    )
