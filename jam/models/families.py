"""The families that jam knows, each declared once; another one is one more entry of ``FAMILIES``.

Networks live in ``jam.models.tower``, what configurations say by several keys in ``jam.models.traits``. Imports neither
torch nor transformers.
"""

from dataclasses import replace

from jam.checkpoint import Checkpoint
from jam.errors import CheckpointError
from jam.models.family import HEAD, Axes, Family, TensorRule

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
    automatic: bool = True,
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
        norms_around_one=scaled_embeddings,  # Gemma's, as the scale
        reads_head_dim=reads_head_dim,
        automatic=automatic,
        ignored=("rotary_emb.inv_freq",),
    )


_GEMMA2 = {  # and 3
    "scaled_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "head_dim": 256,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

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
                TensorRule("model.decoder.final_layer_norm.weight", ("model",), _AFFINE, _AFFINE, (HEAD,)),
            ),
            inside=(
                TensorRule("model.decoder.layers.{}.self_attn.q_proj.weight", ("heads", "model"), bias="enable_bias"),
                TensorRule("model.decoder.layers.{}.self_attn.k_proj.weight", ("heads", "model"), bias="enable_bias"),
                TensorRule("model.decoder.layers.{}.self_attn.v_proj.weight", ("heads", "model"), bias="enable_bias"),
                TensorRule("model.decoder.layers.{}.self_attn.out_proj.weight", ("model", "heads"), bias="enable_bias"),
                TensorRule(
                    "model.decoder.layers.{}.self_attn_layer_norm.weight",
                    *(("model",), _AFFINE, _AFFINE),
                    tuple(f"model.decoder.layers.{{}}.self_attn.{name}_proj.weight" for name in "qkv"),
                ),
                TensorRule("model.decoder.layers.{}.fc1.weight", ("ffn", "model"), bias="enable_bias"),
                TensorRule("model.decoder.layers.{}.fc2.weight", ("model", "ffn"), bias="enable_bias"),
                TensorRule(
                    "model.decoder.layers.{}.final_layer_norm.weight",
                    *(("model",), _AFFINE, _AFFINE),
                    ("model.decoder.layers.{}.fc1.weight",),
                ),
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
            **_GEMMA2,
            max_position_embeddings=8192,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
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
            **_GEMMA2,
            max_position_embeddings=131072,
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
            automatic=False,
            attention_bias=False,
            mlp_bias=False,
            rms_norm_eps=1e-5,
            num_key_value_heads=8,
            max_position_embeddings=9216,
            rope_theta=1_000_000.0,
        ),
        _gated(
            "chameleon",
            "ChameleonForCausalLM",
            (
                *_attention("attention_bias", "attention_bias"),
                *_head_norms(("head_count", "head_dim"), ("kv_head_count", "head_dim"), bias=True),
                *_gated_mlp("mlp_bias"),
                *_norms(*_BEFORE),
            ),
            ("attention_bias", "mlp_bias", "swin_norm"),
            reads_head_dim=False,
            automatic=False,
            attention_bias=False,
            mlp_bias=False,
            swin_norm=False,
            rms_norm_eps=1e-5,
            num_key_value_heads=32,
            max_position_embeddings=4096,
        ),
    )
}


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
    if sizes.layers > len(checkpoint.tensors):  # before their names are made
        raise CheckpointError(
            f"{checkpoint.path}: config.json asks for more layers ({sizes.layers:.6g}) than the checkpoint has tensors "
            f"({len(checkpoint.tensors)}); they must agree, restore the folder"
        )
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
