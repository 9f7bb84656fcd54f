"""Meta's Chameleon layout (Anole's too) to one jam folder: language model, tokenizer and image tokenizer.

Read: ``models/<size>/`` with ``consolidated.pth`` or ``consolidated.00.pth`` and so on, ``params.json`` and
``consolidate_params.json``; ``tokenizer/`` with ``text_tokenizer.json``, ``vqgan.ckpt`` and ``vqgan.yaml``.

Model-parallel shards hold rows of queries, keys, values, both feed-forward inputs and the head, and columns of the
table and of both outputs; norms are whole in every shard. Rotary pairs are neighbours there and half a head apart in
transformers, so that rows of queries and keys, and the head norms, are sorted anew. Every shard has one norm of queries
and one of keys for its heads; here every head has its own copy. All of it is moved, nothing is computed, but for norms
that differ between shards: their mean is taken, as transformers does, and counted.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from jam.checkpoint import check_place, read_json
from jam.convert.outputs import BLOCK, Output, beside, check_shapes, copied, made, stacked
from jam.convert.pickles import PickledTensor, Pickles
from jam.errors import CheckpointError
from jam.floats import LONG, from_float32, to_float32
from jam.layouts.chameleon import SAMPLING, chameleon_vocabulary
from jam.models.families import FAMILIES
from jam.shards import TensorSpec
from jam.tokens.vocabulary import JamFile, Vocabulary

_LEFT_OUT = ("rope.freqs",)
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_NAMES = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention.q_normalization.weight": "self_attn.q_norm.weight",
    "attention.q_normalization.bias": "self_attn.q_norm.bias",
    "attention.k_normalization.weight": "self_attn.k_norm.weight",
    "attention.k_normalization.bias": "self_attn.k_norm.bias",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
}
_OUTSIDE = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class ChameleonFiles:
    """Where the parts of a checkpoint lie."""

    model: Path
    shards: tuple[Path, ...]
    tokenizer: Path

    @property
    def vqgan(self) -> Path:
        return self.tokenizer / "vqgan.ckpt"


def find_chameleon(source: Path) -> ChameleonFiles | None:
    """The files under ``source``, the folder that holds ``models`` or one size of it; None if it is no Chameleon.

    Raises:
        CheckpointError: several sizes, shards that are not numbered from 0, parts missing, or links out.
    """
    models = [source] if _shards(source) else [path for path in sorted(source.glob("models/*")) if _shards(path)]
    if not models:
        return None
    if len(models) > 1:
        raise CheckpointError(f"{source}: {len(models)} models; one is required, give {models[0]} or another of them")
    model = models[0]
    root = source if model != source else source.resolve().parents[1]
    files = ChameleonFiles(model, _shards(model), root / "tokenizer")
    numbers = [int(match[1]) for path in files.shards if (match := re.search(r"\.(\d+)\.pth$", path.name))]
    if numbers != list(range(len(numbers))):
        raise CheckpointError(f"{model}: shards {numbers}; all from 0 on are required, fetch the missing ones")
    wanted = [model / "params.json", *(files.tokenizer / name for name in ("text_tokenizer.json", "vqgan.yaml"))]
    if absent := [path for path in (*wanted, files.vqgan) if not path.is_file()]:
        raise CheckpointError(f"{absent[0]}: no such file; a whole Chameleon as Meta ships it is required, restore it")
    for path in (*wanted, *files.shards, files.vqgan):
        check_place(root, path)
    return files


def _shards(folder: Path) -> tuple[Path, ...]:
    if (folder / "consolidated.pth").is_file():
        return (folder / "consolidated.pth",)
    return tuple(sorted(folder.glob("consolidated.[0-9][0-9].pth")))


def read_words(path: Path) -> dict[str, int]:
    """Every token of a tokenizer.json. Raises CheckpointError when it is damaged."""
    raw = read_json(path)
    try:
        words = {str(word): int(index) for word, index in raw["model"]["vocab"].items()}
        return words | {str(item["content"]): int(item["id"]) for item in raw.get("added_tokens", [])}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error!r}; the file is damaged, restore it from its source") from None


class Chameleon:
    """A language model's outputs, configuration and vocabulary; ``averaged`` norms differed between shards.

    ``pickles`` has the shards first, in order, and then the image tokenizer.

    Raises:
        CheckpointError: settings that are missing or that the shards contradict; foreign, missing or misshapen tensors.
    """

    def __init__(self, files: ChameleonFiles, pickles: Pickles):
        self.files, self.pickles, self.averaged = files, pickles, 0
        self.states = [pickles.state(number) for number in range(len(files.shards))]
        self.params = self._read_params()
        self.width, self.heads = self._number("dim"), self._number("n_heads")
        if self.width % (2 * self.heads) or self._number("n_layers") < 1:
            raise CheckpointError(
                f"{files.model}/params.json: dim {self.width} with {self.heads} heads; restore the file"
            )
        self.head_dim = self.width // self.heads
        words = read_words(files.tokenizer / "text_tokenizer.json")
        self.vocabulary, self.order = chameleon_vocabulary(words, self._first("tok_embeddings.weight").shape[0])
        self.outputs = self._outputs()
        self.config = self._config()
        check_shapes(self.outputs, FAMILIES["chameleon"], self.config, str(files.model))

    def jam_file(self, codes_per_image: int) -> JamFile:
        vocabulary: Vocabulary = replace(self.vocabulary, codes_per_image=codes_per_image)
        return JamFile(vocabulary, "image_tokenizer", ("bos", "begin_image"), sampling=dict(SAMPLING))

    def _read_params(self) -> dict:
        params = read_json(self.files.model / "params.json")
        params |= params["model"] if isinstance(params.get("model"), dict) else {}
        if (self.files.model / "consolidate_params.json").is_file():
            params |= read_json(self.files.model / "consolidate_params.json")
        return params

    def _number(self, key: str) -> int:
        value = self.params.get(key)
        if type(value) is not int or value < 1:
            raise CheckpointError(
                f"{self.files.model}/params.json: {key} is {value!r}; a positive whole number is required, restore it"
            )
        return value

    def _real(self, key: str, absent: float) -> float:
        value = self.params.get(key, absent)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise CheckpointError(
                f"{self.files.model}/params.json: {key} is {value!r}; a positive number is required, restore it"
            )
        return value

    def _first(self, name: str) -> PickledTensor:
        return self._everywhere(name)[0]

    def _everywhere(self, name: str) -> list[PickledTensor]:
        """A tensor in every shard. Raises CheckpointError unless all have it, in one type and shape."""
        for state, path in zip(self.states, self.files.shards, strict=True):
            if name not in state:
                raise CheckpointError(
                    f"{path}: no tensor {name}; a whole Chameleon is required, restore the checkpoint"
                )
        tensors = [state[name] for state in self.states]
        if len({(tensor.dtype, tensor.shape) for tensor in tensors}) > 1:
            raise CheckpointError(
                f"{self.files.model}: tensor {name} differs in type or shape between shards; restore it"
            )
        shape, rank = tensors[0].shape, 1 if "norm" in name else 2
        if len(shape) != rank or 0 in shape:
            raise CheckpointError(
                f"{self.files.model}: tensor {name} is {list(shape)}; {rank} filled axes are required, restore it"
            )
        return tensors

    def _outputs(self) -> list[Output]:
        found = [self._output(source, target) for source, target in _OUTSIDE.items()]
        wanted = set(_OUTSIDE)
        for layer in range(self._number("n_layers")):
            for source, target in _NAMES.items():
                wanted.add(f"layers.{layer}.{source}")
                found.append(self._output(f"layers.{layer}.{source}", f"model.layers.{layer}.{target}"))
        for state, path in zip(self.states, self.files.shards, strict=True):
            if foreign := sorted(state.keys() - wanted - set(_LEFT_OUT)):
                raise CheckpointError(
                    f"{path}: tensor {foreign[0]} is no part of a Chameleon of params.json; both must be of one model"
                )
        return found

    def _output(self, source: str, target: str) -> Output:
        tensors = self._everywhere(source)
        kind = source.rsplit(".", 2)[-2]
        if kind in ("wq", "wk"):
            return self._rotary(target, tensors)
        if "_normalization" in kind:
            return self._head_norm(source, target, tensors)
        if kind in ("attention_norm", "ffn_norm", "norm"):
            return self._norm(target, tensors)
        if len(tensors) == 1:
            return copied(self.pickles, target, tensors[0])
        if kind in ("wo", "w2", "tok_embeddings"):
            return beside(self.pickles, target, tensors)
        return stacked(target, [copied(self.pickles, target, tensor) for tensor in tensors])

    def _rotary(self, target: str, tensors: Sequence[PickledTensor]) -> Output:
        """Rows of every head from neighbouring pairs to halves."""
        rows, width = tensors[0].shape
        if rows % self.head_dim:
            raise CheckpointError(
                f"{self.files.model}: {target} has {rows} rows in a shard, a head is {self.head_dim} wide; "
                "both must be of one model, restore params.json"
            )
        step = self.head_dim * max(1, BLOCK // (self.head_dim * width))

        def blocks() -> Iterator[np.ndarray]:
            for tensor in tensors:
                for start in range(0, rows, step):
                    block = self.pickles.raw(tensor, slice(start, min(start + step, rows)))
                    pairs = block.reshape(-1, self.head_dim // 2, 2, width)
                    yield np.ascontiguousarray(pairs.transpose(0, 2, 1, 3)).reshape(block.shape)

        return Output(TensorSpec(target, tensors[0].dtype, (rows * len(tensors), width)), blocks)

    def _head_norm(self, source: str, target: str, tensors: Sequence[PickledTensor]) -> Output:
        """[heads, head_dim]: the vector of a head's shard, sorted as the rows of the projection."""
        projection = re.sub(r"([qk])_normalization\.\w+$", r"w\1.weight", source)
        heads = self._first(projection).shape[0] // self.head_dim
        if tensors[0].shape != (self.head_dim,):
            raise CheckpointError(
                f"{self.files.model}: tensor {source} is {list(tensors[0].shape)}, a head is {self.head_dim} wide; "
                "both must be of one model, restore params.json"
            )

        def make() -> np.ndarray:
            rows = [self.pickles.raw(tensor).reshape(-1, 2).T.reshape(1, -1) for tensor in tensors]
            return np.concatenate([np.repeat(row, heads, axis=0) for row in rows])

        return made(target, tensors[0].dtype, (heads * len(tensors), self.head_dim), make)

    def _norm(self, target: str, tensors: Sequence[PickledTensor]) -> Output:
        """A vector that every shard has whole."""
        values, dtype = [self.pickles.raw(tensor) for tensor in tensors], tensors[0].dtype
        result = values[0]
        if any(not np.array_equal(value, result) for value in values):
            self.averaged += 1
            result = from_float32(np.mean([to_float32(value, dtype) for value in values], axis=0), dtype)
        return made(target, dtype, tensors[0].shape, lambda: result)

    def _config(self) -> dict:
        shapes = {output.spec.name: output.spec.shape for output in self.outputs}
        kv_rows = shapes["model.layers.0.self_attn.k_proj.weight"][0]
        theta, epsilon = self._real("rope_theta", 10_000.0), self._real("norm_eps", 1e-5)
        queries, asked = shapes["model.layers.0.self_attn.q_proj.weight"], (self.width, self.width)
        if queries != asked:
            raise CheckpointError(
                f"{self.files.model}: wq is {list(queries)} over {len(self.files.shards)} shards, params.json asks for "
                f"{list(asked)}; all shards of one model are required, fetch the missing ones"
            )
        controls = self.vocabulary.controls
        stored = max({output.spec.dtype for output in self.outputs}, key=lambda name: (name == "F32", name))
        return {
            "model_type": "chameleon",
            "architectures": ["ChameleonForCausalLM"],
            "vocab_size": shapes["model.embed_tokens.weight"][0],
            "hidden_size": self.width,
            "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
            "num_hidden_layers": self._number("n_layers"),
            "num_attention_heads": self.heads,
            "num_key_value_heads": kv_rows // self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": 4096 if theta <= 10_000.0 else 16_384,  # by version; no file says so
            "rms_norm_eps": epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": float(theta)},
            "attention_bias": False,
            "mlp_bias": False,
            "swin_norm": bool(self.params.get("swin_norm", False)),
            "model_parallel_size": len(self.files.shards),
            "tie_word_embeddings": False,
            "dtype": LONG.get(stored, "float32"),
            **{f"{name}_token_id": controls[name] for name in ("bos", "eos", "pad") if name in controls},
        }


def tokenizer_settings(vocabulary: Vocabulary) -> str:
    """tokenizer_config.json, for those who load the folder with transformers."""
    named = {"bos_token": "<s>", "eos_token": "</s>"} | ({"pad_token": "<pad>"} if "pad" in vocabulary.controls else {})
    raw = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **named}
    return json.dumps(raw, indent=2) + "\n"
