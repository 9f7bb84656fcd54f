"""Families of decoder-only models, as tables: configuration keys to sizes, and every tensor with named axes.

From the axes follow what a uniform merge may average, what a width merge concatenates and where, which tensors have a
row per vocabulary id, and the refusal of a checkpoint with a tensor that nobody claims. Another family is one more
entry of ``FAMILIES``. Networks live in ``jam.models.tower``; this file knows shapes only and imports neither torch
nor transformers.

Axes: "vocab" ids, "positions" learned positions with the family's extra rows, "model" width, "heads" all query heads
times head width, "kv_heads" all key/value heads times head width, "ffn" feed-forward width, "head_dim" one head's width
(a vector that all heads share), "head_count" and "kv_head_count" heads (a matrix with a vector per head), "qkv"
queries, keys and values stacked, "gate_up" the two feed-forward inputs stacked.
"""

from dataclasses import dataclass, replace

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
    (always without one), a bias only if ``bias`` is true; ``True`` stands for one that always exists. A bias has the
    weight's first axis, that of a norm all of its axes."""

    name: str
    axes: Axes
    when: str | None = None
    bias: str | bool = False

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

    def _present(self, config: dict, table: tuple[TensorRule, ...], layer: int) -> dict[str, Axes]:
        result: dict[str, Axes] = {}
        for rule in table:
            if rule.when is None or self.value(config, rule.when):
                result[rule.name.format(layer)] = rule.axes
            if rule.bias is True or (rule.bias and self.value(config, rule.bias)):
                axes = rule.axes if rule.normalises else rule.axes[:1]
                result[rule.name.removesuffix("weight").format(layer) + "bias"] = axes
        return result


_AFFINE = "layer_norm_elementwise_affine"  # OPT: norms have weight and bias, or neither
_MODEL = ("model",)

_SIZES = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "model": "hidden_size",
    "ffn": "intermediate_size",
    "vocab": "vocab_size",
    "positions": "max_position_embeddings",
}


def _layer(*rules: TensorRule) -> tuple[TensorRule, ...]:
    return tuple(replace(rule, name=f"model.layers.{{}}.{rule.name}.weight") for rule in rules)


def _attention(qkv: str | bool, out: str | bool) -> tuple[TensorRule, ...]:
    """Separate projections; the arguments say when they have biases."""
    return _layer(
        TensorRule("self_attn.q_proj", ("heads", "model"), bias=qkv),
        TensorRule("self_attn.k_proj", ("kv_heads", "model"), bias=qkv),
        TensorRule("self_attn.v_proj", ("kv_heads", "model"), bias=qkv),
        TensorRule("self_attn.o_proj", ("model", "heads"), bias=out),
    )


def _gated_mlp(bias: str | bool = False) -> tuple[TensorRule, ...]:
    return _layer(
        TensorRule("mlp.gate_proj", ("ffn", "model"), bias=bias),
        TensorRule("mlp.up_proj", ("ffn", "model"), bias=bias),
        TensorRule("mlp.down_proj", ("model", "ffn"), bias=bias),
    )


def _norms(*names: str) -> tuple[TensorRule, ...]:
    return _layer(*(TensorRule(name, _MODEL) for name in names))


def _head_norms(queries: Axes, keys: Axes, bias: bool = False) -> tuple[TensorRule, ...]:
    """Norms of queries and keys before attention."""
    return _layer(TensorRule("self_attn.q_norm", queries, bias=bias), TensorRule("self_attn.k_norm", keys, bias=bias))


_OUTSIDE = (TensorRule("model.embed_tokens.weight", ("vocab", "model")), TensorRule("model.norm.weight", _MODEL))
_BEFORE = ("input_layernorm", "post_attention_layernorm")
_AROUND = (*_BEFORE, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _gated(
    model_type: str,
    architecture: str,
    inside: tuple[TensorRule, ...],
    alike: tuple[str, ...] = (),
    activation: str = "hidden_act",
    scaled_embeddings: bool = False,
    reads_head_dim: bool = True,
    **defaults: object,
) -> Family:
    """A family of Llama's build: rotary positions, gated feed-forward, RMS norms; what differs is given."""
    common = {
        activation: "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
    }
    return Family(
        model_type=model_type,
        architecture=architecture,
        keys=_SIZES,
        defaults=common | defaults,
        alike=(activation, "rms_norm_eps", "rope", *alike),
        outside=_OUTSIDE,
        inside=inside,
        embed="model.embed_tokens.weight",
        scaled_embeddings=scaled_embeddings,
        reads_head_dim=reads_head_dim,
        ignored=("rotary_emb.inv_freq",),
    )


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
            reads_head_dim=False,
        ),
        _gated(
            "llama",
            "LlamaForCausalLM",
            (*_attention("attention_bias", "attention_bias"), *_gated_mlp("mlp_bias"), *_norms(*_BEFORE)),
            ("attention_bias", "mlp_bias"),
            attention_bias=False,
            mlp_bias=False,
        ),
        _gated(
            "mistral",
            "MistralForCausalLM",
            (*_attention(False, False), *_gated_mlp(), *_norms(*_BEFORE)),
            ("windows",),
            sliding_window=4096,
            max_position_embeddings=131072,
        ),
        _gated(
            "qwen2",
            "Qwen2ForCausalLM",
            (*_attention(True, False), *_gated_mlp(), *_norms(*_BEFORE)),
            ("windows",),
            num_key_value_heads=32,
            max_position_embeddings=32768,
            use_sliding_window=False,
            sliding_window=4096,
            max_window_layers=28,
        ),
        _gated(
            "qwen3",
            "Qwen3ForCausalLM",
            (
                *_attention("attention_bias", "attention_bias"),
                *_head_norms(("head_dim",), ("head_dim",)),
                *_gated_mlp(),
                *_norms(*_BEFORE),
            ),
            ("attention_bias", "windows"),
            attention_bias=False,
            head_dim=128,
            num_key_value_heads=32,
            max_position_embeddings=32768,
            use_sliding_window=False,
            sliding_window=4096,
            max_window_layers=28,
        ),
        _gated(
            "gemma",
            "GemmaForCausalLM",
            (*_attention("attention_bias", "attention_bias"), *_gated_mlp(), *_norms(*_BEFORE)),
            ("attention_bias",),
            scaled_embeddings=True,
            hidden_act="gelu_pytorch_tanh",
            attention_bias=False,
            head_dim=256,
            num_key_value_heads=16,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
        ),
        _gated(
            "gemma2",
            "Gemma2ForCausalLM",
            (*_attention("attention_bias", "attention_bias"), *_gated_mlp(), *_norms(*_AROUND)),
            ("attention_bias", "windows", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
            "hidden_activation",
            scaled_embeddings=True,
            hidden_activation="gelu_pytorch_tanh",
            attention_bias=False,
            head_dim=256,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            query_pre_attn_scalar=256,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            sliding_window=4096,
            sliding_window_pattern=2,
        ),
        _gated(
            "gemma3_text",
            "Gemma3ForCausalLM",
            (
                *_attention("attention_bias", "attention_bias"),
                *_head_norms(("head_dim",), ("head_dim",)),
                *_gated_mlp(),
                *_norms(*_AROUND),
            ),
            ("attention_bias", "windows", "query_pre_attn_scalar"),
            "hidden_activation",
            scaled_embeddings=True,
            hidden_activation="gelu_pytorch_tanh",
            attention_bias=False,
            head_dim=256,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=131072,
            query_pre_attn_scalar=256,
            sliding_window=4096,
            sliding_window_pattern=6,
            rope_theta=1_000_000.0,
            rope_local_base_freq=10_000.0,
        ),
        _gated(
            "smollm3",
            "SmolLM3ForCausalLM",
            (*_attention("attention_bias", "attention_bias"), *_gated_mlp("mlp_bias"), *_norms(*_BEFORE)),
            ("attention_bias", "mlp_bias", "windows", "rotary_layers"),
            attention_bias=False,
            mlp_bias=False,
            num_key_value_heads=4,
            tie_word_embeddings=True,
            max_position_embeddings=32768,
            use_sliding_window=False,
            rope_theta=2_000_000.0,
        ),
        _gated(
            "phi3",
            "Phi3ForCausalLM",
            (
                *_layer(
                    TensorRule("self_attn.qkv_proj", ("qkv", "model")),
                    TensorRule("self_attn.o_proj", ("model", "heads")),
                    TensorRule("mlp.gate_up_proj", ("gate_up", "model")),
                    TensorRule("mlp.down_proj", ("model", "ffn")),
                ),
                *_norms(*_BEFORE),
            ),
            ("windows",),
            rms_norm_eps=1e-5,
            max_position_embeddings=4096,
        ),
        _gated(
            "olmo2",
            "Olmo2ForCausalLM",
            (
                *_attention("attention_bias", "attention_bias"),
                *_head_norms(("heads",), ("kv_heads",)),
                *_gated_mlp(),
                *_norms("post_attention_layernorm", "post_feedforward_layernorm"),
            ),
            ("attention_bias",),
            rms_norm_eps=1e-5,
            attention_bias=False,
        ),
        _gated(
            "emu3_text_model",
            "Emu3ForCausalLM",
            (*_attention("attention_bias", "attention_bias"), *_gated_mlp("mlp_bias"), *_norms(*_BEFORE)),
            ("attention_bias", "mlp_bias"),
            attention_bias=False,
            mlp_bias=False,
            rms_norm_eps=1e-5,
            num_key_value_heads=8,
            max_position_embeddings=9216,
            rope_theta=1_000_000.0,
        ),
        _gated(
            "chameleon",
            "ChameleonForConditionalGeneration",
            (
                *_attention("attention_bias", "attention_bias"),
                *_head_norms(("head_count", "head_dim"), ("kv_head_count", "head_dim"), bias=True),
                *_gated_mlp("mlp_bias"),
                *_norms(*_BEFORE),
            ),
            ("attention_bias", "mlp_bias", "swin_norm"),
            reads_head_dim=False,
            attention_bias=False,
            mlp_bias=False,
            swin_norm=False,
            rms_norm_eps=1e-5,
            num_key_value_heads=32,
            max_position_embeddings=4096,
        ),
    )
}


def trait(config: dict, key: str) -> object:
    """One of a family's ``alike``: a configuration value, or what several keys say together in one spelling."""
    computed = {"rope": rope, "windows": windows, "rotary_layers": rotary_layers}
    return computed[key](config) if key in computed else FAMILIES[config["model_type"]].value(config, key)


def rope(config: dict) -> dict:
    """Rotary settings in one spelling: ``rope_parameters`` of transformers 5, ``rope_theta``, ``rope_scaling`` of 4.

    A family whose layer types turn at different speeds (Gemma 3) has one entry for each.

    >>> base = {"model_type": "llama"}
    >>> rope(base | {"rope_theta": 10000.0}) == rope(base | {"rope_parameters": {"rope_type": "default"}})
    True
    """
    theta = FAMILIES[config["model_type"]].value(config, "rope_theta")
    given = config.get("rope_parameters") or {}
    if "rope_local_base_freq" not in FAMILIES[config["model_type"]].defaults:
        return _rope_of_layers(given or config.get("rope_scaling") or {}, theta, config)
    local = FAMILIES[config["model_type"]].value(config, "rope_local_base_freq")
    return {
        "full_attention": _rope_of_layers(
            given.get("full_attention") or config.get("rope_scaling") or {}, theta, config
        ),
        "sliding_attention": _rope_of_layers(given.get("sliding_attention") or {}, local, config),
    }


def _rope_of_layers(given: dict, theta: object, config: dict) -> dict:
    found = {"partial_rotary_factor": config.get("partial_rotary_factor") or 1.0} | given
    found["rope_type"] = found.pop("type", None) or found.get("rope_type", "default")
    found["rope_theta"] = float(found.get("rope_theta") or theta)
    return found


def rotary_layers(config: dict) -> list[bool]:
    """Whether each layer has rotary positions (SmolLM3 leaves every fourth without)."""
    layers = config[FAMILIES[config["model_type"]].keys["layers"]]
    named, every = config.get("no_rope_layers"), config.get("no_rope_layer_interval", 4)
    if named is not None:
        return [bool(flag) for flag in named]
    return [(layer + 1) % every != 0 for layer in range(layers)]


def windows(config: dict) -> list[int | None]:
    """The sliding window of every layer in tokens, None where a layer sees everything before it.

    >>> windows({"model_type": "mistral", "num_hidden_layers": 2, "sliding_window": None})
    [None, None]
    >>> windows({"model_type": "gemma2", "num_hidden_layers": 3, "sliding_window": 8})
    [8, None, 8]
    """
    family = FAMILIES[config["model_type"]]
    layers, window = config[family.keys["layers"]], family.value(config, "sliding_window")
    if window is None or family.value(config, "use_sliding_window") is False:
        return [None] * layers
    kinds = config.get("layer_types")
    if kinds is None:
        first, every = family.value(config, "max_window_layers"), family.value(config, "sliding_window_pattern")
        if every is not None:  # Gemma: every so-manieth layer sees everything
            kinds = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in range(layers)]
        else:  # Qwen: from a layer on; Mistral, Phi3: all
            kinds = ["full_attention" if layer < (first or 0) else "sliding_attention" for layer in range(layers)]
    return [window if kind == "sliding_attention" else None for kind in kinds]


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
    if family.value(config, "use_bidirectional_attention"):
        raise CheckpointError(f"{where}: use_bidirectional_attention is set; a causal model is required, use another")
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
