"""The merge recipe: which parents, which method, and that method's choices.

One section per method; a section of another method than the chosen one may only hold its defaults, since a setting
that is silently ignored is worse than an error. Reads no checkpoint: what the parents allow is the plan's matter.
"""

import itertools
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from jam.recipe import Pattern, Recipe, Section

Share = Annotated[float, Field(ge=0.0, le=1.0)]
MAX_SHARES = 1000  # of a gradient: more than any model has layers


def _one_or_several(value: object) -> object:
    """In plain words what pydantic says of both members of the union."""
    several = value if isinstance(value, list) else [value]
    if not several:
        raise ValueError("an empty list; one share or more are required")
    if len(several) > MAX_SHARES:
        raise ValueError(f"a list of {len(several)} shares; {MAX_SHARES} or fewer are required, shorten it")
    for share in several:
        if type(share) not in (int, float) or not 0 <= share <= 1:
            raise ValueError(f"{share!r:.60} is no share; a number from 0 to 1, or a list of them, is required")
    return value


Shares = Annotated[Share | list[Share], BeforeValidator(_one_or_several)]
LayersDone = Annotated[int, Field(ge=1)]


class WeightRule(Section):
    """A share of its own for the tensors whose name matches."""

    match: Pattern = Field(description="regular expression, searched in the tensor's name")
    weight: Shares = Field(description="as uniform.weight")


class UniformSection(Section):
    """Weighted mean of two parents of the same shape, or another rule for relatives."""

    weight: Shares = Field(
        0.5,
        description="share of the text parent in the mean, 0 to 1 (1 gives the text parent); a list is a gradient over "
        "the layers, its values at equal distances from the first to the last",
    )
    rules: list[WeightRule] = Field(
        [], description="tensors with a share of their own; of several that match, the first counts"
    )

    rule: Literal["linear", "slerp", "task_arithmetic", "ties", "dare"] = Field(
        "linear",
        description="linear is the mean; the others are for parents trained from one ancestor: slerp, or what the "
        "parents learnt since added to it, whole (task_arithmetic), its greatest part (ties) or a random part (dare)",
    )
    base: Path | None = Field(None, description="folder of the ancestor: task_arithmetic, ties and dare")
    density: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        None, description="share of what a parent learnt that is kept, above 0 to 1: ties (0.2 in the paper) and dare"
    )
    scale: float = Field(
        1.0, gt=0.0, description="factor of what the parents learnt, weighted: task_arithmetic, ties and dare"
    )

    @model_validator(mode="after")
    def _what_the_rule_reads(self) -> "UniformSection":
        reads = {"task_arithmetic": ("base",), "ties": ("base", "density"), "dare": ("base", "density")}
        for key in ("base", "density"):
            needed, given = key in reads.get(self.rule, ()), getattr(self, key) is not None
            if needed and not given:
                raise ValueError(
                    f"rule {self.rule} without {key}; required: {type(self).model_fields[key].description}"
                )
            if given and not needed:
                raise ValueError(f"{key} is given but rule is {self.rule}, which would ignore it; remove {key}")
        if self.scale != 1.0 and self.rule not in reads:
            raise ValueError(f"scale is given but rule is {self.rule}, which would ignore it; remove scale")
        return self


class WidthSection(Section):
    """Both parents side by side in one model of their summed width."""

    off_diagonal: Literal["copy", "average", "zero"] = Field(
        "copy", description="blocks that join one parent's features to the other's: copy, average or zero"
    )
    calibration: Path | None = Field(
        None,
        description="a file of jam calibrate for these parents: factors that undo on average what one norm over both "
        "halves does to each; null leaves the norms as they are",
    )
    head: Literal["sum", "own"] = Field(
        "sum",
        description="sum: every id is scored by both halves, as far as both know it; own: text by the text half alone, "
        "image codes by the image half alone, control ids by both (the head is a matrix of its own then)",
    )
    qk_norm: Literal["equal", "average"] = Field(
        "equal",
        description="norms of queries and keys that all heads share: equal refuses parents whose norms differ; average "
        "gives all heads the mean, which changes both parents",
    )


class CrossSection(Section):
    """Two towers that exchange states through gated cross-attention."""

    every: int = Field(2, ge=1, description="layers of the shallower tower between two exchanges, 1 or more")
    pairs: list[tuple[LayersDone, LayersDone]] | None = Field(
        None,
        description="exchanges by hand, in order: [text layer, image layer], counts of layers done from 1; null pairs "
        "them in proportion, as every says",
    )
    tables: Literal["separate", "shared"] = Field(
        "separate",
        description="separate: a token table and a head per tower, which keeps both parents' outputs at step 0; "
        "shared: one table and one head over the concatenated states, as in the paper",
    )
    ffn_ratio: int = Field(4, ge=1, description="width of a cross block's feed-forward layer over its tower's width")
    init_std: float = Field(0.02, gt=0.0, description="standard deviation of the new cross blocks' weights")
    init: Literal["quantiles", "sums"] = Field(
        "quantiles",
        description="how their normal numbers are drawn: quantiles of a table, or sums of twelve, which takes eight "
        "times as long and is what the shipped models were merged with",
    )

    @model_validator(mode="after")
    def _pairs_go_forward(self) -> "CrossSection":
        if self.pairs is None:
            return self
        if self.every != type(self).model_fields["every"].default:
            raise ValueError(
                f"pairs are given and every is {self.every}, which they would ignore; required: one of the two; remove "
                "every or pairs"
            )
        if not self.pairs:
            raise ValueError("pairs is an empty list; one pair or more are required, or null")
        for before, after in itertools.pairwise(self.pairs):
            if not (before[0] < after[0] and before[1] < after[1]):
                raise ValueError(
                    f"pair {list(after)} follows {list(before)}; layers must grow from pair to pair on both sides, "
                    "mend the list"
                )
        return self


NewRow = Literal["mean", "normal", "parent", "zero"]


class ExtendSection(Section):
    """The text parent alone, with rows for the image parent's codes."""

    table: NewRow = Field(
        "normal",
        description="new rows of the table, and of a head that is the table: mean of the old ones; normal around it "
        "with their deviation, column by column; parent: the image parent's, of one width; zero",
    )
    head: NewRow | None = Field(None, description="new rows of a head of its own; null is as the table")


class MergeRecipe(Recipe):
    """Fuse a text model and an image model into one checkpoint folder. Paths are relative to the working directory."""

    aliases: ClassVar[dict[str, str]] = {
        "merge_method": "method",
        "base_model": "text",
        "text_model": "text",
        "llm": "text",
        "image_model": "image",
        "output": "out",
        "output_dir": "out",
        "output_path": "out",
        "out_path": "out",
        "out_dtype": "dtype",
        "torch_dtype": "dtype",
        "alpha": "uniform.weight",
        "t": "uniform.weight",
        "random_seed": "seed",
        "out_shard_size": "shard_bytes",
        "max_shard_size": "shard_bytes",
        "cross_every": "cross.every",
        "layer_pairs": "cross.pairs",
        "lambda": "uniform.scale",
        "exchanges": "cross.pairs",
    }

    kind: Literal["merge"] = Field("merge", description="the schema that this file follows")
    method: Literal["uniform", "width", "cross", "extend"] = Field(
        description="uniform, width, cross or extend; run jam inspect to see which fit"
    )
    text: Path | None = Field(None, description="folder of the text parent; null is the shipped mini text model")
    image: Path | None = Field(None, description="folder of the image parent; null is the shipped mini image model")
    image_tokenizer: Path | None = Field(
        None,
        description="folder of an image tokenizer (config.json, model.safetensors) for the result, such as jam convert "
        "makes; null is the image parent's own",
    )
    out: Path = Field(description="folder to write, which must not exist or be empty")
    dtype: Literal["bfloat16", "float16", "float32"] = Field("bfloat16", description="type of the written tensors")
    seed: int = Field(0, ge=0, description="seed of newly made weights (cross blocks, rows) and of what dare draws")
    hash: bool = Field(
        False, description="record the SHA-256 of every file read or written, but report.json and merge.yaml"
    )
    shard_bytes: int = Field(
        5_000_000_000,
        ge=1,
        description="greatest size of a weights file; a merge that was killed goes on after the last",
    )
    uniform: UniformSection = Field(UniformSection(), description="choices of the uniform method")
    width: WidthSection = Field(WidthSection(), description="choices of the width method")
    cross: CrossSection = Field(CrossSection(), description="choices of the cross method")
    extend: ExtendSection = Field(ExtendSection(), description="choices of the extend method")

    @model_validator(mode="after")
    def _no_ignored_section(self) -> "MergeRecipe":
        sections: dict[str, Section] = {name: getattr(self, name) for name in ("uniform", "width", "cross", "extend")}
        for name, section in sections.items():
            if name != self.method and section != type(section)():
                raise ValueError(
                    f'"{name}" has settings but method is "{self.method}", which would ignore them; required: settings '
                    f'of the chosen method only; remove "{name}" or set method to "{name}"'
                )
        return self
