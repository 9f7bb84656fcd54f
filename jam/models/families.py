"""Families of decoder-only models, as tables: configuration keys to sizes, and every tensor with named axes.

From the axes follow what a uniform merge may average, what a width merge concatenates and where, which tensors have a
row per vocabulary id, and the refusal of a checkpoint with a tensor that nobody claims. Another family is one more
entry of ``FAMILIES``. Networks live in ``jam.models.tower``; this file knows shapes only and imports neither torch
nor transformers.

Axes: "vocab" ids, "positions" learned positions with the family's extra rows, "model" width, "heads" all query heads
times head width, "kv_heads" all key/value heads times head width, "ffn" feed-forward width.
"""

from dataclasses import dataclass

from jam.checkpoint import Checkpoint
from jam.errors import CheckpointError

Axes = tuple[str, ...]

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
    (always without one), a bias along the first axis only if ``bias`` is true."""

    name: str
    axes: Axes
    when: str | None = None
    bias: str | None = None


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
    ignored: tuple[str, ...] = ()  # endings of buffers that old checkpoints carry and transformers recomputes

    def value(self, config: dict, key: str) -> object:
        """A configuration value, or transformers' default for it."""
        found = config.get(key)
        return self.defaults.get(key) if found is None else found

    def sizes(self, config: dict, where: str = "config.json") -> Sizes:
        """Raises CheckpointError when a size is missing or not a positive whole number."""
        found: dict[str, int] = {}
        for name, key in self.keys.items():
            value = self.value(config, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CheckpointError(
                    f"{where}: {key} is {value!r}; a positive whole number is required, restore the file"
                )
            found[name] = value
        derived = {"num_key_value_heads": found["heads"], "head_dim": found["model"] // found["heads"]}
        for key, absent in derived.items():
            value = self.value(config, key) or absent
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
        }
        return tuple(lengths[axis] for axis in axes)

    def tensors(self, config: dict) -> dict[str, Axes]:
        """Every tensor of a model of this configuration, in network order; a tied head is no tensor."""
        sizes = self.sizes(config)
        result = self._present(config, self.outside, 0)
        for layer in range(sizes.layers):
            result |= self._present(config, self.inside, layer)
        if not sizes.tied:
            result[HEAD] = ("vocab", "model")
        return result

    def _present(self, config: dict, table: tuple[TensorRule, ...], layer: int) -> dict[str, Axes]:
        result: dict[str, Axes] = {}
        for rule in table:
            if rule.when is None or self.value(config, rule.when):
                result[rule.name.format(layer)] = rule.axes
            if rule.bias is not None and self.value(config, rule.bias):
                result[rule.name.removesuffix("weight").format(layer) + "bias"] = rule.axes[:1]
        return result


_AFFINE = "layer_norm_elementwise_affine"  # OPT: norms have weight and bias, or neither

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            model_type="opt",  # CM3Leon is an OPT without biases, norm weights and dropout
            architecture="OPTForCausalLM",
            keys={
                "layers": "num_hidden_layers",
                "heads": "num_attention_heads",
                "model": "hidden_size",
                "ffn": "ffn_dim",
                "vocab": "vocab_size",
                "positions": "max_position_embeddings",
            },
            defaults={
                "activation_function": "relu",
                "do_layer_norm_before": True,
                "enable_bias": True,
                "layer_norm_elementwise_affine": True,
                "tie_word_embeddings": True,
                "_remove_final_layer_norm": False,
            },
            alike=(
                "activation_function",
                "do_layer_norm_before",
                "enable_bias",
                "layer_norm_elementwise_affine",
                "_remove_final_layer_norm",
            ),
            outside=(
                TensorRule("model.decoder.embed_tokens.weight", ("vocab", "model")),
                TensorRule("model.decoder.embed_positions.weight", ("positions", "model")),
                TensorRule("model.decoder.final_layer_norm.weight", ("model",), _AFFINE, _AFFINE),
            ),
            inside=(
                TensorRule("model.decoder.layers.{}.self_attn.q_proj.weight", ("heads", "model"), bias="enable_bias"),
                TensorRule("model.decoder.layers.{}.self_attn.k_proj.weight", ("heads", "model"), bias="enable_bias"),
                TensorRule("model.decoder.layers.{}.self_attn.v_proj.weight", ("heads", "model"), bias="enable_bias"),
                TensorRule("model.decoder.layers.{}.self_attn.out_proj.weight", ("model", "heads"), bias="enable_bias"),
                TensorRule("model.decoder.layers.{}.self_attn_layer_norm.weight", ("model",), _AFFINE, _AFFINE),
                TensorRule("model.decoder.layers.{}.fc1.weight", ("ffn", "model"), bias="enable_bias"),
                TensorRule("model.decoder.layers.{}.fc2.weight", ("model", "ffn"), bias="enable_bias"),
                TensorRule("model.decoder.layers.{}.final_layer_norm.weight", ("model",), _AFFINE, _AFFINE),
            ),
            embed="model.decoder.embed_tokens.weight",
            extra_positions=2,
        ),
        Family(
            model_type="llama",
            architecture="LlamaForCausalLM",
            keys={
                "layers": "num_hidden_layers",
                "heads": "num_attention_heads",
                "model": "hidden_size",
                "ffn": "intermediate_size",
                "vocab": "vocab_size",
                "positions": "max_position_embeddings",
            },
            defaults={
                "hidden_act": "silu",
                "rms_norm_eps": 1e-6,
                "attention_bias": False,
                "mlp_bias": False,
                "tie_word_embeddings": False,
                "max_position_embeddings": 2048,
            },
            alike=("hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "rope"),
            outside=(
                TensorRule("model.embed_tokens.weight", ("vocab", "model")),
                TensorRule("model.norm.weight", ("model",)),
            ),
            inside=(
                TensorRule("model.layers.{}.self_attn.q_proj.weight", ("heads", "model"), bias="attention_bias"),
                TensorRule("model.layers.{}.self_attn.k_proj.weight", ("kv_heads", "model"), bias="attention_bias"),
                TensorRule("model.layers.{}.self_attn.v_proj.weight", ("kv_heads", "model"), bias="attention_bias"),
                TensorRule("model.layers.{}.self_attn.o_proj.weight", ("model", "heads"), bias="attention_bias"),
                TensorRule("model.layers.{}.mlp.gate_proj.weight", ("ffn", "model"), bias="mlp_bias"),
                TensorRule("model.layers.{}.mlp.up_proj.weight", ("ffn", "model"), bias="mlp_bias"),
                TensorRule("model.layers.{}.mlp.down_proj.weight", ("model", "ffn"), bias="mlp_bias"),
                TensorRule("model.layers.{}.input_layernorm.weight", ("model",)),
                TensorRule("model.layers.{}.post_attention_layernorm.weight", ("model",)),
            ),
            embed="model.embed_tokens.weight",
            ignored=("rotary_emb.inv_freq",),
        ),
    )
}


def rope(config: dict) -> dict:
    """Rotary settings in one spelling: ``rope_parameters`` of transformers 5, ``rope_theta``, ``rope_scaling`` of 4.

    >>> rope({"rope_theta": 10000.0}) == rope({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}})
    True
    """
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found["rope_type"] = found.pop("type", None) or found.get("rope_type", "default")
    found.setdefault("rope_theta", float(config.get("rope_theta") or 10000.0))
    return found


def family_of(config: dict, where: str) -> Family:
    """The family of a configuration; ``where`` names the folder in errors.

    Raises:
        CheckpointError: unknown model type, or a variant of a known one that the table does not describe.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"{where}: model type {model_type!r}; known families are {', '.join(FAMILIES)}, use a parent of one of them"
        )
    family = FAMILIES[model_type]
    width, inner = config.get("hidden_size"), config.get("word_embed_proj_dim")
    if model_type == "opt" and inner not in (None, width):
        raise CheckpointError(
            f"{where}: word_embed_proj_dim {inner} differs from hidden_size {width}; projected embeddings (as in "
            "opt-350m) are not supported, use another parent"
        )
    if model_type == "opt" and not (family.value(config, "do_layer_norm_before")):
        raise CheckpointError(f"{where}: do_layer_norm_before is false; only pre-norm OPT models are supported")
    if family.value(config, "_remove_final_layer_norm"):
        raise CheckpointError(f"{where}: _remove_final_layer_norm is set; use a checkpoint with the final norm")
    return family


def check_tensors(checkpoint: Checkpoint, family: Family) -> dict[str, Axes]:
    """Compare a checkpoint's headers with its configuration; the family's tensors with their axes.

    A head stored beside a tied configuration is claimed and left out, as transformers ignores it too.

    Raises:
        CheckpointError: a tensor that nobody claims, one that is missing, or one of another shape.
    """
    sizes = family.sizes(checkpoint.config, f"{checkpoint.path}/config.json")
    expected = family.tensors(checkpoint.config)
    for name, info in checkpoint.tensors.items():
        if name not in expected and not name.endswith(family.ignored) and not (name == HEAD and sizes.tied):
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} {list(info.shape)} is no part of a {family.model_type} model of "
                "this config.json; the configuration must describe every tensor, mend it or use another checkpoint"
            )
    for name, axes in expected.items():
        shape = family.shape(sizes, axes)
        if name not in checkpoint.tensors:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} {list(shape)} is missing; a whole checkpoint is required, restore it"
            )
        if checkpoint.tensors[name].shape != shape:
            raise CheckpointError(
                f"{checkpoint.path}: tensor {name} is {list(checkpoint.tensors[name].shape)}, config.json asks for "
                f"{list(shape)}; they must agree, restore the folder"
            )
    return expected
