"""Cross merge: both towers whole, joined by cross-attention in both directions (JAM-Cross, arXiv 2309.15564).

Every ``every`` layers of the shallower tower, the towers exchange states through one block per direction; layers are
paired in proportion, or by hand as ``pairs`` lists them, so depths and widths may differ. Each block ends in one scalar
gate (ours, after Flamingo) that starts at zero: until it is trained, each tower is its parent. All other new weights
are normal, keyed by (seed, tensor name).

``tables: separate`` (default): a table and a head per tower. ``tables: shared``: the paper's one table and one head
over both towers' final states; the table has the text tower's width, and the image tower reads it through a linear
map fitted by least squares on the rows that both parents own. Sharing gives up the promise about the image parent.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from jam.errors import MergeError
from jam.models.family import HEAD
from merge.noise import NOISE
from merge.plan import Copy, Job, Parent, Plan, Source, single_table_config, token_ids
from merge.recipe import MergeRecipe
from merge.rows import MEAN, Table, describe, tower_labels, tower_map
from merge.union import Pair, Union, joint_jam_file

ARCHITECTURE = "JamCrossForCausalLM"


def exchanges(text_layers: int, image_layers: int, every: int) -> list[list[int]]:
    """Pairs [i, j]: an exchange after text layer i and image layer j, 1-based counts of layers done.

    >>> exchanges(8, 8, 2)
    [[2, 2], [4, 4], [6, 6], [8, 8]]
    >>> exchanges(4, 6, 2)
    [[2, 3], [4, 6]]
    """
    shallow, deep = sorted((text_layers, image_layers))
    pairs = []
    for done in range(every, shallow + 1, every):
        paired = (2 * done * deep + shallow) // (2 * shallow)  # round half up, in whole numbers
        pairs.append([done, paired] if text_layers == shallow else [paired, done])
    return pairs


@dataclass(frozen=True)
class Rows:
    """A tower's table with the joint number of rows."""

    table: Table

    @property
    def fate(self) -> str:
        return f"rows of {self.table.parent.side} {self.table.tensor}, foreign ids from its mean or eos row"

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.table.origin,)

    def rows(self, block: slice) -> np.ndarray:
        return self.table.read(block)


@dataclass(frozen=True)
class Constant:
    """A new tensor of one value."""

    shape: tuple[int, ...]
    value: float

    @property
    def fate(self) -> str:
        return f"new: {self.value:g} everywhere"

    @property
    def sources(self) -> tuple[Source, ...]:
        return ()

    def rows(self, block: slice) -> np.ndarray:
        return np.full((block.stop - block.start, *self.shape[1:]), self.value, np.float32)


@dataclass
class Shared:
    """The shared table and the image tower's map into its own width, fitted once when first asked for.

    With E_t and E_i the rows that both parents own, W [d_image, d_text] minimises |E_t W' - E_i|. Text rows of the
    table are the text parent's; rows that only the image parent owns are solved so that W takes them to its row. Both
    are computed whole, not block by block: a matrix product's last bits depend on its size.
    """

    text: Table
    image: Table
    use_image: np.ndarray  # bool [V]: only the image parent owns the id
    _fitted: tuple[np.ndarray, np.ndarray] | None = field(default=None, init=False)
    residual: float = field(default=float("nan"), init=False)

    def fit(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [d_image, d_text], the map, and float32 [V, d_text], zero where the text parent's row is used.

        Raises MergeError for a table of zeros, of which no map follows."""
        if self._fitted is None:
            everything = slice(0, len(self.use_image))
            common = (self.text.source >= 0) & (self.image.source != MEAN) & ~self.use_image
            ours, theirs = (table.read(everything).astype(np.float64) for table in (self.text, self.image))
            for side, rows in ((self.text, ours[common]), (self.image, theirs[common])):
                if not rows.any():
                    raise MergeError(
                        f"{side.parent.path}: all rows of {side.tensor} that both parents own are zero; cross.tables="
                        "shared fits a map on them, use a trained parent or tables=separate"
                    )
            weights = np.linalg.lstsq(ours[common], theirs[common], rcond=None)[0].T
            lost = np.linalg.norm(ours[common] @ weights.T - theirs[common]) / np.linalg.norm(theirs[common])
            self.residual = float(f"{lost:.4g}")
            solved = np.zeros(ours.shape, np.float32)
            solved[self.use_image] = theirs[self.use_image] @ np.linalg.pinv(weights).T
            self._fitted = weights.astype(np.float32), solved
        return self._fitted

    def figures(self) -> dict[str, float]:
        """How much of the image rows the map loses; fits where a resumed merge has not."""
        self.fit()
        return {"image_in_relative_residual": self.residual}

    def table_rows(self, block: slice) -> np.ndarray:
        return np.where(self.use_image[block][:, None], self.fit()[1][block], self.text.read(block))


@dataclass(frozen=True)
class SharedTable:
    shared: Shared

    @property
    def fate(self) -> str:
        return "text rows, and image rows carried to the text width by the inverse of the fitted map"

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.shared.text.origin, self.shared.image.origin)

    def rows(self, block: slice) -> np.ndarray:
        return self.shared.table_rows(block)


@dataclass(frozen=True)
class SharedMap:
    shared: Shared

    @property
    def fate(self) -> str:
        return "new: least-squares map from text rows to image rows"

    @property
    def sources(self) -> tuple[Source, ...]:
        return (self.shared.text.origin, self.shared.image.origin)

    def rows(self, block: slice) -> np.ndarray:
        return self.shared.fit()[0][block]


@dataclass(frozen=True)
class Identity:
    """[I, 0]: the first columns pass through."""

    shape: tuple[int, int]

    @property
    def fate(self) -> str:
        return "new: identity on the text tower's state, zero on the image tower's"

    @property
    def sources(self) -> tuple[Source, ...]:
        return ()

    def rows(self, block: slice) -> np.ndarray:
        return np.eye(*self.shape, dtype=np.float32)[block]


def obstacles(pair: Pair, recipe: MergeRecipe) -> list[str]:
    """Why a cross merge of these parents is impossible; empty when it is possible."""
    text, image = pair.sides
    found = []
    shallow = min(text.sizes.layers, image.sizes.layers)
    if recipe.cross.pairs is not None:
        last = recipe.cross.pairs[-1]  # the greatest on both sides
        for side, layer in zip(pair.sides, last, strict=True):
            if layer > side.sizes.layers:
                found.append(
                    f"cross.pairs has {list(last)} but the {side.side} parent has {side.sizes.layers} layers; give "
                    "layers that it has"
                )
    elif recipe.cross.every > shallow:
        found.append(
            f"cross.every is {recipe.cross.every} but the shallower tower has {shallow} layers; lower cross.every"
        )
    for side in pair.sides:
        if side.sizes.model % side.sizes.heads:
            found.append(
                f"the {side.side} parent's width {side.sizes.model} is no multiple of its {side.sizes.heads} heads, "
                "which its cross-attention shares; use another parent"
            )
    if recipe.cross.tables == "shared" and not image.has_text:
        found.append(
            "tables=shared fits the towers on tokens that both parents know, and the image parent has no text; use "
            "tables=separate"
        )
    if reason := pair.obstacle():
        found.append(reason)
    return found


def _tower_jobs(parent: Parent, union: Union, tables: str) -> Iterator[Job]:
    for name, axes in parent.axes.items():
        shape, rule = parent.shape(name), Copy(parent, name)
        if axes[0] == "vocab":
            if tables == "shared":
                continue
            use = "tied" if parent.sizes.tied else "head" if name == HEAD else "input"
            shape = (union.vocabulary.size, shape[1])
            rule = Rows(Table(parent, name, tower_map(union, parent, use), union.rows(parent.side)))
        yield Job(f"{parent.side}.{name}", shape, rule)


def _block_jobs(at: int, own: Parent, other: Parent, recipe: MergeRecipe) -> Iterator[Job]:
    """One direction of one exchange: ``own`` attends to ``other``."""
    width, foreign, inner = own.sizes.model, other.sizes.model, recipe.cross.ffn_ratio * own.sizes.model
    prefix = f"cross.{at}.{own.side}."
    for name, size in (("norm_self", width), ("norm_other", foreign), ("norm_ffn", width)):
        yield Job(f"{prefix}{name}.weight", (size,), Constant((size,), 1.0))
    for name, shape in (
        ("q_proj", (width, width)),
        ("k_proj", (width, foreign)),
        ("v_proj", (width, foreign)),
        ("out_proj", (width, width)),
        ("fc1", (inner, width)),
        ("fc2", (width, inner)),
    ):
        full = f"{prefix}{name}.weight"
        yield Job(full, shape, NOISE[recipe.cross.init](shape, recipe.cross.init_std, recipe.seed, full))
    yield Job(f"{prefix}gate", (1,), Constant((1,), 0.0))


def _shared_jobs(pair: Pair) -> tuple[Shared, list[Job]]:
    (text, image), union, vocabulary = pair.sides, pair.union, pair.union.vocabulary
    tables = [
        Table(side, side.family.embed, tower_map(union, side, "input"), union.rows(side.side)) for side in pair.sides
    ]
    shared = Shared(*tables, union.image.known & ~union.text.known)
    wide, narrow = text.sizes.model, image.sizes.model
    both = (wide, wide + narrow)
    return shared, [
        Job("shared.embed.weight", (vocabulary.size, wide), SharedTable(shared)),
        Job("shared.image_in.weight", (narrow, wide), SharedMap(shared)),
        Job("shared.project.weight", both, Identity(both)),
    ]


def _exchanges(pair: Pair, recipe: MergeRecipe) -> list[list[int]]:
    if recipe.cross.pairs is not None:
        return [list(layers) for layers in recipe.cross.pairs]
    return exchanges(pair.text.sizes.layers, pair.image.sizes.layers, recipe.cross.every)


def _config(pair: Pair, recipe: MergeRecipe) -> dict:
    (text, image), vocabulary = pair.sides, pair.union.vocabulary
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "jam_cross",
        "text_config": single_table_config(text, vocabulary, recipe.dtype),
        "image_config": single_table_config(image, vocabulary, recipe.dtype),
        "exchanges": _exchanges(pair, recipe),
        "tables": recipe.cross.tables,
        "ffn_ratio": recipe.cross.ffn_ratio,
        "vocabulary": vocabulary.to_json(),
        "vocab_size": vocabulary.size,
        "dtype": recipe.dtype,
        "tie_word_embeddings": False,
        **token_ids(vocabulary),
    }


def _row_report(pair: Pair, shared: Shared | None) -> dict[str, dict]:
    if shared is not None:
        sources = zip(shared.use_image.tolist(), shared.text.source.tolist(), strict=True)
        labels = [
            "image row, mapped" if ours else "mean of text rows" if row == MEAN else "text row" for ours, row in sources
        ]
        return {"shared": describe(labels)}
    report = {}
    for side in pair.sides:
        uses = ("tied",) if side.sizes.tied else ("input", "head")
        for use in uses:
            name = f"{side.side} tower, {'input and head' if use == 'tied' else use}"
            report[name] = describe(tower_labels(pair.union, tower_map(pair.union, side, use), side.side))
    return report


def plan(pair: Pair, recipe: MergeRecipe) -> Plan:
    """The jobs of a cross merge; the parents must have no ``obstacles``."""
    text, image = pair.sides
    config, jobs, shared = _config(pair, recipe), [], None
    if recipe.cross.tables == "shared":
        shared, jobs = _shared_jobs(pair)
    for side in pair.sides:
        jobs += _tower_jobs(side, pair.union, recipe.cross.tables)
    for at in range(len(config["exchanges"])):
        for own, other in ((text, image), (image, text)):
            jobs += _block_jobs(at, own, other, recipe)
    if shared is None:
        preserves = (
            "with all gates at zero, as written: on text the distribution over the text parent's own ids is that "
            "parent's; on image and control ids, and on captions in the image parent's tokenization, it is the image "
            "parent's"
        )
        notes = ["text after an image, and the closing control out of text, are new to both parents: measure them"]
    else:
        preserves = (
            "the text parent on its own ids, with all gates at zero; the image parent's distribution is not kept"
        )
        notes = ["tables=shared: one head reads both towers and starts with the text tower alone"]
    return Plan(
        "cross",
        tuple(jobs),
        config,
        joint_jam_file(pair, "cross"),
        preserves,
        _row_report(pair, shared),
        tuple(notes),
        {"exchanges": config["exchanges"], "tables": recipe.cross.tables, "ffn_ratio": recipe.cross.ffn_ratio},
        (lambda: {}) if shared is None else shared.figures,
    )
