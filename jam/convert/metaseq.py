"""A metaseq checkpoint (OPT; CM3Leon's own code was a metaseq, its weights were never published) to an OPT folder.

The layout is that of the published OPT: a pickle with ``model``, whose tensors are named
``decoder.layers.0.fc1.weight`` and so on, and the training settings as ``args`` or ``cfg``; beside it
``gpt2-vocab.json`` or ``vocab.json`` and merges, or a ``tokenizer.json``. Facts of that code: a fused ``qkv_proj``
holds keys, values, queries in this order; tensor-parallel parts (``...-model_part-0.pt``) hold rows of queries, keys,
values, the first feed-forward matrix and the table, columns of both outputs, and everything else whole. Weights that
FSDP has flattened into one vector are refused.

No ``jam.json`` is written: which ids are image codes no file of that layout says.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from jam.checkpoint import read_json
from jam.convert.outputs import Output, beside, check_shapes, copied, stacked
from jam.convert.pickles import PickledTensor, Pickles
from jam.errors import CheckpointError
from jam.floats import LONG
from jam.models.families import FAMILIES
from jam.models.family import HEAD

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # ids 0 to 3 of a metaseq dictionary
_LEFT_OUT = re.compile(r"(^|\.)(version|_float_tensor)$")
_ROWS = ("q_proj", "k_proj", "v_proj", "fc1")
_COLUMNS = ("out_proj", "fc2")
_PLAIN = (None, False)
_WANTED: dict[str, tuple] = {
    "no_scale_embedding": (True,),
    "decoder_normalize_before": (True, None),
    "decoder_learned_sinusoidal": _PLAIN,
    "alibi": _PLAIN,
    "scale_attn": _PLAIN,
    "scale_fc": _PLAIN,
    "scale_heads": _PLAIN,
    "scale_resids": _PLAIN,
}


def find_parts(source: Path) -> tuple[Path, ...]:
    """The pickles of a metaseq folder: one whole file, else its tensor-parallel parts in order; none if there are none.

    Raises:
        CheckpointError: parts that are not numbered from 0, or that FSDP has cut further.
    """
    if source.is_file():
        return (source,)
    for name in ("restored.pt", "consolidated.pt", "reshard.pt"):
        if (source / name).is_file():
            return (source / name,)
    parts = {}
    for path in sorted([*source.glob("*model_part-*.pt"), *source.glob("reshard-no-os/*model_part-*.pt")]):
        if "shard" in path.stem.split("model_part-")[1]:
            raise CheckpointError(
                f"{path}: a piece of a tensor-parallel part; whole parts are required, join the pieces with metaseq"
            )
        number = re.search(r"model_part-(\d+)\.pt$", path.name)
        if number is None:
            raise CheckpointError(
                f"{path}: a part without a number; parts model_part-0.pt, model_part-1.pt and so on are required, "
                "restore its name"
            )
        parts[int(number[1])] = path
    if list(parts) and sorted(parts) != list(range(len(parts))):
        raise CheckpointError(f"{source}: parts {sorted(parts)}; all from 0 on are required, fetch the missing ones")
    return tuple(parts[number] for number in sorted(parts))


@dataclass(frozen=True)
class Metaseq:
    """An OPT about to be written."""

    outputs: tuple[Output, ...]
    config: dict
    left_out: int


def read_metaseq(pickles: Pickles, settings: dict | None = None, files: Sequence[int] | None = None) -> Metaseq:
    """What to write.

    Args:
        files: numbers of the pickles that are the parts, in order; None for all.
        settings: training settings instead of those in the pickle; ``decoder_attention_heads`` and
            ``no_scale_embedding`` at least.

    Raises:
        CheckpointError: settings missing or of a network that OPT is not; tensors that are foreign, missing, or
            differ between parts.
    """
    files = range(len(pickles.paths)) if files is None else files
    where = str(pickles.paths[files[0]])
    states = [
        {name.removeprefix("decoder."): tensor for name, tensor in pickles.state(number).items()} for number in files
    ]
    if flat := next((name for name in states[0] if "flat_param" in name), None):
        raise CheckpointError(
            f"{where}: tensor {flat} is many weights in one vector, as FSDP keeps them; weights by name are required, "
            "unflatten the checkpoint with metaseq (convert_to_singleton)"
        )
    found = _settings(pickles.plain[files[0]], settings, where)
    read = _Reader(pickles, states, where)
    shared = found.get("share_decoder_input_output_embed") in (True, None)
    outputs = [
        read.table("embed_tokens.weight", "model.decoder.embed_tokens.weight"),
        read.whole("embed_positions.weight", "model.decoder.embed_positions.weight"),
        *read.norm("layer_norm", "model.decoder.final_layer_norm"),
    ]
    layers = 0
    while f"layers.{layers}.fc1.weight" in states[0]:
        outputs += read.layer(layers)
        layers += 1
    head = "output_projection.weight"
    if head in states[0]:
        outputs += [] if shared else [read.table(head, HEAD)]
        read.used.add(head)
    elif not shared:
        raise CheckpointError(f"{where}: no tensor decoder.{head}, but the settings share no table; restore the file")
    names = set().union(*states)  # a part must not hold what the first one has not
    left_out = [name for name in names if _LEFT_OUT.search(name) or (shared and name == head)]
    if foreign := sorted(names - read.used - set(left_out)):
        raise CheckpointError(
            f"{where}: tensor decoder.{foreign[0]} is no part of an OPT; only plain pre-norm decoders with learned "
            "positions are read, use another checkpoint"
        )
    config = _config(outputs, layers, found, shared, where)
    check_shapes(outputs, FAMILIES["opt"], config, where)
    return Metaseq(tuple(outputs), config, len(left_out))


def _settings(plain: object, given: dict | None, where: str) -> dict:
    found = dict(given or {})
    if not found and isinstance(plain, dict):
        cfg = plain.get("cfg")
        for place in (plain.get("args"), cfg.get("model") if isinstance(cfg, dict) else None):
            found |= place if isinstance(place, dict) else {}
    for key, values in _WANTED.items():
        if found.get(key) not in values:
            raise CheckpointError(
                f"{where}: setting {key} is {found.get(key)!r}; {values[0]!r} is required for the network that OPT is, "
                "give the settings that the model was trained with in a YAML file with --config"
            )
    heads = found.get("decoder_attention_heads")
    if type(heads) is not int or heads < 1:
        raise CheckpointError(
            f"{where}: setting decoder_attention_heads is {heads!r}; a positive whole number is required, give it in a "
            "YAML file with --config"
        )
    return found


class _Reader:
    """Tensors of all parts under OPT's names; ``used`` is what was asked for."""

    def __init__(self, pickles: Pickles, states: Sequence[dict[str, PickledTensor]], where: str):
        self.pickles, self.states, self.where, self.used = pickles, states, where, set[str]()

    def parts(self, name: str) -> list[PickledTensor]:
        self.used.add(name)
        for number, state in enumerate(self.states):
            if name not in state:
                raise CheckpointError(
                    f"{self.where}: part {number} has no tensor decoder.{name}; a whole checkpoint is required, "
                    "restore it"
                )
        tensors = [state[name] for state in self.states]
        if len({(tensor.dtype, tensor.shape) for tensor in tensors}) > 1:
            raise CheckpointError(
                f"{self.where}: tensor decoder.{name} differs between parts in type or shape; parts of one checkpoint "
                "are required"
            )
        rank = 1 if name.endswith("bias") or "layer_norm." in name else 2
        if len(tensors[0].shape) != rank:
            raise CheckpointError(
                f"{self.where}: tensor decoder.{name} is {list(tensors[0].shape)}; {rank} axes are required, restore "
                "the checkpoint"
            )
        return tensors

    def whole(self, name: str, target: str) -> Output:
        """A tensor that every part has whole. Raises CheckpointError when they differ."""
        tensors = self.parts(name)
        if len(tensors) > 1:
            first = self.pickles.raw(tensors[0])
            if any(not np.array_equal(first, self.pickles.raw(tensor)) for tensor in tensors[1:]):
                raise CheckpointError(
                    f"{self.where}: tensor decoder.{name} differs between parts; parts of one checkpoint are required"
                )
        return copied(self.pickles, target, tensors[0])

    def table(self, name: str, target: str) -> Output:
        """Rows of all parts under each other."""
        return self._rows(self.parts(name), target)

    def _rows(self, tensors: Sequence[PickledTensor], target: str, cut: tuple[int, int] = (0, 1)) -> Output:
        """Of every part the ``cut[0]``-th of ``cut[1]`` equal groups of rows."""
        pieces = []
        for tensor in tensors:
            size, rest = divmod(tensor.shape[0], cut[1])
            if rest:
                raise CheckpointError(
                    f"{self.where}: tensor decoder.{tensor.name.removeprefix('decoder.')} has {tensor.shape[0]} rows; "
                    f"{cut[1]} equal groups are required, restore the checkpoint"
                )
            pieces.append(copied(self.pickles, target, tensor, slice(cut[0] * size, (cut[0] + 1) * size)))
        return pieces[0] if len(pieces) == 1 else stacked(target, pieces)

    def norm(self, name: str, target: str) -> list[Output]:
        """Weight and bias, or neither: norms without learnt numbers."""
        kinds = [kind for kind in ("weight", "bias") if f"{name}.{kind}" in self.states[0]]
        return [self.whole(f"{name}.{kind}", f"{target}.{kind}") for kind in kinds]

    def layer(self, layer: int) -> list[Output]:
        source, target = f"layers.{layer}", f"model.decoder.layers.{layer}"
        found = self.norm(f"{source}.self_attn_layer_norm", f"{target}.self_attn_layer_norm")
        found += self.norm(f"{source}.final_layer_norm", f"{target}.final_layer_norm")
        for kind in ("weight", "bias"):
            fused = f"{source}.self_attn.qkv_proj.{kind}"
            if fused in self.states[0]:
                for number, part in enumerate(("k_proj", "v_proj", "q_proj")):  # in this order, whatever the name says
                    found.append(self._rows(self.parts(fused), f"{target}.self_attn.{part}.{kind}", (number, 3)))
            names = [
                f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "out_proj") if fused not in self.used
            ]
            names = names or ["self_attn.out_proj"]
            for name in (*names, "fc1", "fc2"):
                if kind == "bias" and f"{source}.{name}.bias" not in self.states[0]:
                    continue
                found.append(self._projection(f"{source}.{name}.{kind}", f"{target}.{name}.{kind}"))
        return found

    def _projection(self, name: str, target: str) -> Output:
        tensors, module = self.parts(name), name.split(".")[-2]
        if module in _COLUMNS and name.endswith("bias"):
            return self.whole(name, target)
        if module in _COLUMNS and len(tensors) > 1:
            return beside(self.pickles, target, tensors)
        return self._rows(tensors, target)


def _config(outputs: Sequence[Output], layers: int, found: dict, shared: bool, where: str) -> dict:
    shapes = {output.spec.name: output.spec.shape for output in outputs}
    rows, width = shapes["model.decoder.embed_tokens.weight"]
    if not layers:
        raise CheckpointError(f"{where}: no tensor decoder.layers.0.fc1.weight; a whole checkpoint is required")
    activation = found.get("activation_fn") or "relu"
    if activation not in ("relu", "gelu"):
        raise CheckpointError(f"{where}: setting activation_fn is {activation!r}; relu or gelu is required")
    dtypes = {output.spec.dtype for output in outputs}
    return {
        "model_type": "opt",
        "architectures": ["OPTForCausalLM"],
        "vocab_size": rows,
        "hidden_size": width,
        "word_embed_proj_dim": width,
        "ffn_dim": shapes["model.decoder.layers.0.fc1.weight"][0],
        "num_hidden_layers": layers,
        "num_attention_heads": found["decoder_attention_heads"],
        "max_position_embeddings": shapes["model.decoder.embed_positions.weight"][0] - 2,
        "activation_function": activation,
        "do_layer_norm_before": True,
        "enable_bias": "model.decoder.layers.0.fc1.bias" in shapes,
        "layer_norm_elementwise_affine": "model.decoder.final_layer_norm.weight" in shapes,
        "dropout": _rate("dropout", found, where),
        "attention_dropout": _rate("attention_dropout", found, where),
        "tie_word_embeddings": shared,
        "bos_token_id": 2,  # as transformers' OPT: metaseq begins a text with </s>
        "pad_token_id": 1,
        "eos_token_id": 2,
        "dtype": LONG.get(next(iter(dtypes)), "float32") if len(dtypes) == 1 else "float32",
    }


def _rate(key: str, found: dict, where: str) -> float:
    value = found.get(key) or 0.0
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise CheckpointError(
            f"{where}: setting {key} is {value!r}; a number from 0 to 1 is required, give the settings in a YAML file "
            "with --config"
        )
    return float(value)


def find_tokenizer(folder: Path) -> tuple[Path, ...] | None:
    """``tokenizer.json``, or vocabulary and merges, in the folder of the weights."""
    if (folder / "tokenizer.json").is_file():
        return (folder / "tokenizer.json",)
    for prefix in ("gpt2-", ""):
        pair = (folder / f"{prefix}vocab.json", folder / f"{prefix}merges.txt")
        if all(path.is_file() for path in pair):
            return pair
    return None


def make_tokenizer(files: tuple[Path, ...], rows: int) -> Tokenizer:
    """The text tokenizer: byte-level BPE whose first four ids are metaseq's special tokens.

    Raises:
        CheckpointError: a damaged file, other first ids (fairseq numbers its ids by dict.txt, which is not read), or
            more tokens than the table has rows.
    """
    if len(files) == 1:
        try:
            tokenizer = Tokenizer.from_file(str(files[0]))
        except Exception as error:  # the library raises bare Exception for a bad file
            raise CheckpointError(f"{files[0]}: {error}; the file is damaged, restore it from its source") from None
    else:
        words = read_json(files[0])
        if any(words.get(word) != index for index, word in enumerate(SPECIAL)):
            raise CheckpointError(
                f"{files[0]}: ids of {', '.join(SPECIAL)} are {[words.get(word) for word in SPECIAL]}; 0 to 3 are "
                "required (ids numbered by fairseq's dict.txt are not read), give the folder a tokenizer.json"
            )
        try:
            tokenizer = Tokenizer(models.BPE.from_file(*map(str, files)))
        except Exception as error:  # the library raises bare Exception for a bad file
            raise CheckpointError(f"{files[1]}: {error}; the file is damaged, restore it from its source") from None
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    if tokenizer.get_vocab_size() > rows:
        raise CheckpointError(
            f"{files[0]}: {tokenizer.get_vocab_size()} tokens, the model has {rows} rows; give it its own tokenizer"
        )
    return tokenizer
