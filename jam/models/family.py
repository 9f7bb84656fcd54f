"""What a family of decoder-only models is: configuration keys to sizes, and every tensor with named axes.

From the axes follow what a uniform merge may average, what a width merge concatenates and where, which tensors have a
row per vocabulary id, and the refusal of a checkpoint with a tensor that nobody claims. Knows shapes only and imports
neither torch nor transformers.

Axes: "vocab" ids, "positions" learned positions with the family's extra rows, "model" width, "heads" all query heads
times head width, "kv_heads" all key/value heads times head width, "ffn" feed-forward width, "head_dim" one head's width
(a vector that all heads share), "head_count" and "kv_head_count" heads (a matrix with a vector per head), "qkv"
queries, keys and values stacked, "gate_up" the two feed-forward inputs stacked.
"""

from dataclasses import dataclass

from jam.errors import CheckpointError

Axes = tuple[str, ...]

MAX_SIZE = 1 << 30  # far above any real size
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Sizes:
    """Sizes of one model under our names; ``positions`` counts usable positions, without a family's extra rows."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    model: int
    ffn: int
    vocab: int
    positions: int
    tied: bool


@dataclass(frozen=True)
class TensorRule:
    """A weight and its axes. ``when`` and ``bias`` are configuration keys: the weight exists only if ``when`` is true
    (always without one), a bias only if ``bias`` is true; ``True`` stands for one that always exists. A bias has the
    weight's first axis, that of a norm all of its axes. ``feeds`` names what reads a norm that may be without weights.
    """

    name: str
    axes: Axes
    when: str | None = None
    bias: str | bool = False
    feeds: tuple[str, ...] = ()

    @property
    def normalises(self) -> bool:
        return "norm" in self.name


@dataclass(frozen=True)
class Family:
    """One transformers model type.

    ``keys`` maps our size names to configuration keys; ``defaults`` are the values that transformers takes for absent
    keys; ``alike`` are the keys on which two parents of one merged network must agree.
    """

    model_type: str
    architecture: str
    keys: dict[str, str]
    defaults: dict[str, object]
    alike: tuple[str, ...]
    outside: tuple[TensorRule, ...]  # once per model
    inside: tuple[TensorRule, ...]  # once per layer, "{}" in the name
    embed: str
    extra_positions: int = 0  # rows of the position table before position 0
    reads_head_dim: bool = True  # a configured head_dim counts; else a head is the width over the heads
    scaled_embeddings: bool = False  # a table's row enters the network times the square root of the width
    automatic: bool = True  # transformers' AutoModelForCausalLM loads it
    norms_around_one: bool = False  # a norm multiplies by one plus its weight
    ignored: tuple[str, ...] = ()  # endings of buffers that old checkpoints carry and transformers recomputes

    def value(self, config: dict, key: str) -> object:
        """A configuration value, or transformers' default for a key that is absent (one that is null is null)."""
        return config[key] if key in config else self.defaults.get(key)

    def sizes(self, config: dict, where: str = "config.json") -> Sizes:
        """Raises CheckpointError when a size is missing or not a positive whole number."""
        found: dict[str, int] = {}
        for name, key in self.keys.items():
            value = self.value(config, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(
                    f"{where}: {key} is {value!r}; a positive whole number is required, restore the file"
                )
            if value > MAX_SIZE:
                raise CheckpointError(
                    f"{where}: {key} is above {MAX_SIZE}; a size of a real model is required, restore the file"
                )
            found[name] = value
        derived = {"num_key_value_heads": found["heads"], "head_dim": found["model"] // found["heads"]}
        for key, absent in derived.items():
            value = absent if key == "head_dim" and not self.reads_head_dim else self.value(config, key) or absent
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(
                    f"{where}: {key} is {value!r}; a positive whole number is required, restore the file"
                )
            derived[key] = value
        tied = bool(self.value(config, "tie_word_embeddings"))
        return Sizes(**found, kv_heads=derived["num_key_value_heads"], head_dim=derived["head_dim"], tied=tied)

    def shape(self, sizes: Sizes, axes: Axes) -> tuple[int, ...]:
        lengths = {
            "vocab": sizes.vocab,
            "positions": sizes.positions + self.extra_positions,
            "model": sizes.model,
            "heads": sizes.heads * sizes.head_dim,
            "kv_heads": sizes.kv_heads * sizes.head_dim,
            "ffn": sizes.ffn,
            "head_dim": sizes.head_dim,
            "head_count": sizes.heads,
            "kv_head_count": sizes.kv_heads,
            "qkv": (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim,
            "gate_up": 2 * sizes.ffn,
        }
        return tuple(lengths[axis] for axis in axes)

    def segments(self, sizes: Sizes, axis: str) -> tuple[int, ...]:
        """Lengths of the parts of an axis: one, or several of a fused projection."""
        heads, kv_heads = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        parts = {"qkv": (heads, kv_heads, kv_heads), "gate_up": (sizes.ffn, sizes.ffn)}
        return parts.get(axis) or self.shape(sizes, (axis,))

    def tensors(self, config: dict) -> dict[str, Axes]:
        """Every tensor of a model of this configuration, in network order; a tied head is no tensor."""
        sizes = self.sizes(config)
        result = self._present(config, self.outside, 0)
        for layer in range(sizes.layers):
            result |= self._present(config, self.inside, layer)
        if not sizes.tied:
            result[HEAD] = ("vocab", "model")
        return result

    def norms(self, config: dict) -> dict[str, tuple[str, ...]]:
        """Norms over all features of a state, or over all heads at once, with weights or without: the module's name,
        and the tensors that read it where those are declared (``TensorRule.feeds``)."""
        rules = [(rule, 0) for rule in self.outside]
        rules += [(rule, layer) for layer in range(self.sizes(config).layers) for rule in self.inside]
        return {
            rule.name.removesuffix(".weight").format(layer): tuple(name.format(layer) for name in rule.feeds)
            for rule, layer in rules
            if rule.normalises and rule.axes in (("model",), ("heads",), ("kv_heads",))
        }

    def _present(self, config: dict, table: tuple[TensorRule, ...], layer: int) -> dict[str, Axes]:
        result: dict[str, Axes] = {}
        for rule in table:
            if rule.when is None or self.value(config, rule.when):
                result[rule.name.format(layer)] = rule.axes
            if rule.bias is True or (rule.bias and self.value(config, rule.bias)):
                axes = rule.axes if rule.normalises else rule.axes[:1]
                result[rule.name.removesuffix("weight").format(layer) + "bias"] = axes
        return result
