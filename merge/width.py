"""Width merge: both parents side by side in one network of their summed width (JAM-Width, arXiv 2309.15564).

Features, heads and feed-forward units are concatenated, text first. A matrix becomes four blocks: the diagonal ones are
the parents, the off-diagonal ones, through which one parent's units read the other's features, are

    copy     [[A, A], [B, B]]     each output half reads both halves with its own parent's matrix
    average  [[A, M], [M, B]]     M = (A + B) / 2
    zero     [[A, 0], [0, B]]     the halves meet only in the norms and in the head

The result is a checkpoint of the parents' own class. Head rows are concatenated too, so its logits are the sum of the
parents'. What no block layout can keep: one norm over the doubled width mixes the statistics of both halves.
"""

from dataclasses import dataclass

import numpy as np

from jam.models.families import HEAD
from merge.plan import Job, Parent, Plan, Rule, joint_jam_file, single_table_config
from merge.recipe import MergeRecipe
from merge.rows import ZERO, Table, describe, half_map
from merge.uniform import mean, single_network_obstacles


@dataclass(frozen=True)
class Blocks:
    """A matrix of four blocks: the parents on the diagonal, ``off_diagonal`` beside them."""

    text: Parent
    image: Parent
    tensor: str
    off_diagonal: str

    @property
    def fate(self) -> str:
        return f"text and image {self.tensor} on the diagonal, {self.off_diagonal} beside them"

    def rows(self, block: slice) -> np.ndarray:
        split = self.text.shape(self.tensor)[0]
        upper = slice(min(block.start, split), min(block.stop, split))
        lower = slice(max(block.start, split) - split, max(block.stop, split) - split)
        parts = []
        for own, other, rows in ((self.text, self.image, upper), (self.image, self.text, lower)):
            if rows.start < rows.stop:
                parts.append(self._half(own, other, rows))
        return np.concatenate(parts)

    def _half(self, own: Parent, other: Parent, rows: slice) -> np.ndarray:
        diagonal = own.checkpoint.read(self.tensor, rows)
        if self.off_diagonal == "zero":
            beside = np.zeros((len(diagonal), other.shape(self.tensor)[1]), np.float32)
        elif self.off_diagonal == "copy":
            beside = diagonal
        else:
            beside = mean(diagonal, other.checkpoint.read(self.tensor, rows), 0.5)
        pair = (diagonal, beside) if own is self.text else (beside, diagonal)
        return np.concatenate(pair, axis=1)


@dataclass(frozen=True)
class Ends:
    """A vector: the text parent's, then the image parent's."""

    text: Parent
    image: Parent
    tensor: str

    @property
    def fate(self) -> str:
        return f"text and image {self.tensor} end to end"

    def rows(self, block: slice) -> np.ndarray:
        return np.concatenate([side.checkpoint.read(self.tensor) for side in (self.text, self.image)])[block]


@dataclass(frozen=True)
class SideBySide:
    """A table: each row is the text parent's row followed by the image parent's."""

    text: Table
    image: Table

    @property
    def fate(self) -> str:
        return f"rows of text {self.text.tensor} and image {self.image.tensor} side by side"

    def rows(self, block: slice) -> np.ndarray:
        return np.concatenate([self.text.read(block), self.image.read(block)], axis=1)


@dataclass(frozen=True)
class Positions:
    """Learned positions: rows of both parents side by side."""

    text: Parent
    image: Parent
    tensor: str

    @property
    def fate(self) -> str:
        return f"rows of text and image {self.tensor} side by side"

    def rows(self, block: slice) -> np.ndarray:
        return np.concatenate([side.checkpoint.read(self.tensor, block) for side in (self.text, self.image)], axis=1)


def obstacles(text: Parent, image: Parent, recipe: MergeRecipe) -> list[str]:
    """Why a width merge of these parents is impossible; empty when it is possible."""
    found = single_network_obstacles(text, image)
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
        elif len(axes) == 2 and axes[0] not in ("vocab", "positions") and ours != theirs:
            if recipe.width.off_diagonal != "zero":
                found.append(
                    f"tensor {name} is {list(ours)} in the text parent and {list(theirs)} in the image parent; "
                    f"off_diagonal={recipe.width.off_diagonal} needs equal shapes, width.off_diagonal=zero does not"
                )
            break
    return found


def _config(text: Parent, image: Parent, recipe: MergeRecipe) -> dict:
    ours, theirs = text.sizes, image.sizes
    tied = ours.tied and theirs.tied
    config = single_table_config(image, image.vocabulary, recipe.dtype, tie_word_embeddings=tied)
    for name in ("heads", "model", "ffn"):
        config[image.family.keys[name]] = getattr(ours, name) + getattr(theirs, name)
    config["max_position_embeddings"] = min(ours.positions, theirs.positions)
    for key, value in {
        "num_key_value_heads": ours.kv_heads + theirs.kv_heads,
        "word_embed_proj_dim": ours.model + theirs.model,
    }.items():
        if config.get(key) is not None:
            config[key] = value
    return config


def plan(text: Parent, image: Parent, recipe: MergeRecipe) -> Plan:
    """The jobs of a width merge; the parents must have no ``obstacles``."""
    mode, vocabulary = recipe.width.off_diagonal, image.vocabulary
    config = _config(text, image, recipe)
    sizes = image.family.sizes(config)
    maps = [half_map(vocabulary, text, image), half_map(vocabulary, image, text)]
    jobs = []
    for name, axes in image.family.tensors(config).items():
        rule: Rule
        if axes[0] == "vocab":
            tensors = [side.head if name == HEAD else side.family.embed for side in (text, image)]
            rule = SideBySide(Table(text, tensors[0], maps[0]), Table(image, tensors[1], maps[1]))
        elif axes[0] == "positions":
            rule = Positions(text, image, name)
        else:
            rule = Ends(text, image, name) if len(axes) == 1 else Blocks(text, image, name, mode)
        jobs.append(Job(name, image.family.shape(sizes, axes), rule))
    notes = [
        f"one norm over {sizes.model} features mixes the statistics of both halves, so that not even zero off-diagonal "
        "blocks keep a parent's function exactly",
        "head_scale 1: logits are the sum of both parents' logits (scaled by the mixed norm), hence sharper than "
        "either's where they agree; training settles it",
    ]
    if text.sizes.tied != image.sizes.tied:
        notes.append("one parent ties its head to its table and the other does not: the result is untied")
    half = {(True, True): "both halves", (True, False): "half: text", (False, True): "half: image"}
    labels = [half[a, b] for a, b in zip((maps[0] != ZERO).tolist(), (maps[1] != ZERO).tolist(), strict=True)]
    return Plan(
        "width",
        tuple(jobs),
        config,
        joint_jam_file(image, "width", text),
        f"the diagonal blocks are the parents, bit for bit; off-diagonal blocks: {mode}",
        {"input and head": describe(labels)},
        tuple(notes),
        {"off_diagonal": mode, "head_scale": 1.0, "head_dim": sizes.head_dim},
    )
