"""A checkpoint folder, parent or fused, to a :class:`Bundle` of everything that runs it.

Stages: headers and sizes (``jam.checkpoint``: missing files, truncated shards) -> jam.json, tokenizers -> the network
by transformers -> one pass over its tensors for NaN and infinity -> the parts fit each other. Nothing is repaired: a
folder that lacks a tensor is refused where transformers would fill in random numbers.

:meth:`Bundle.logits` is the one way to scores, the same for a single-table model and the two-tower one. This file
neither samples nor trains, and opens no network connection.

Shapes: B batch, T query tokens, S key slots, V vocabulary.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, Cache, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from jam.errors import CheckpointError, GenerationError
from jam.layouts import open_model
from jam.models import cross  # also registers jam_cross with transformers' Auto classes
from jam.models.compiled import Compiled
from jam.models.cpu import pack
from jam.models.families import FAMILIES
from jam.models.heads import allowed_ids, restrict
from jam.models.masks import cache_for, default_positions, masks_for
from jam.models.packed import Documents
from jam.models.readout import Readout, readout
from jam.models.tower import OPT_TP_PLAN, network_class
from jam.tokens.belong import check_tokenizers
from jam.tokens.image import ImageTokenizer
from jam.tokens.text import TextTokenizer
from jam.tokens.vocabulary import Vocabulary

_INTEGERS = ("I8", "I16", "I32", "U16", "U32", "U64")  # weights only if quantized; masks and counters are other types
Softmax = Literal["restricted", "joint"]


@dataclass
class Bundle:
    """A model with its vocabulary and tokenizers.

    Attributes:
        image: None for a model that makes no images.
        unconditional: names of the controls that stand for "no condition" before an image.
        sampling: the model's own defaults of ``jam.decode.options.SamplingOptions``.
        backend: of ``torch.compile`` for decoding steps (``jam.models.compiled``), "inductor" for one; None is eager.
    """

    path: Path
    model: PreTrainedModel
    vocabulary: Vocabulary
    text: TextTokenizer
    image: ImageTokenizer | None
    unconditional: tuple[str, ...]
    sampling: dict = field(default_factory=dict)
    backend: str | None = None
    _readout: Readout | Compiled | None = field(default=None, init=False, repr=False, compare=False)

    @cached_property
    def _allowed_2V(self) -> Tensor:
        """What each head may say, with rows of the model beyond the vocabulary (padding of the table) never allowed."""
        spare = self.model.config.vocab_size - self.vocabulary.size
        return nn.functional.pad(allowed_ids(self.vocabulary), (0, spare), value=False)

    @property
    def max_positions(self) -> int:
        """The longest sequence that the model has positions for."""
        return self.model.config.max_position_embeddings

    def readout(self) -> Readout | Compiled:
        """The network in two parts, states and scores, for a decoder."""
        known = self._readout
        if known is None or known.model is not self.model or getattr(known, "backend", None) != self.backend:
            plain = readout(self.model, self.vocabulary)
            self._readout = plain if self.backend is None else Compiled(plain, self.backend)
        return self._readout

    def to(self, device: torch.device) -> "Bundle":
        """Network and image tokenizer on another device."""
        self.model.to(device)
        self._readout = None  # it may hold buffers where the network was
        if self.image is not None:
            self.image.to(device)
        return self

    def pack(self) -> bool:
        """Lays the weights out for this CPU (``jam.models.cpu``): the model decodes faster and can do nothing else.
        False where that is not possible."""
        heads = [module for name, module in self.model.named_modules() if name.split(".")[-1] == "lm_head"]
        return pack(self.model, heads)

    def logits(
        self,
        input_ids_BT: Tensor,
        head_ids_BT: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool = False,
        softmax: Softmax = "restricted",
        documents: Documents | None = None,
    ) -> tuple[Tensor, Cache | None]:
        """Scores [B, T, V] of the token after each position, and the cache.

        Args:
            input_ids_BT: int64 ids.
            head_ids_BT: int64, the head that predicts the token *after* each position (``jam.models.heads``).
            attention_mask: [B, S], 1 or True for real tokens; or bool [B, 1, T, S], True where a query may attend.
                S counts what the cache holds and T; a preallocated cache may be longer, its empty slots are hidden.
            position_ids: int64 [B, T] from 0 (OPT's table adds its own offset). By default counted along a 2D mask or
                on from the cache; required with a 4D mask.
            past_key_values: with ``use_cache`` and None, a new growing cache is made.
            softmax: "restricted" gives the ids that the position's head does not own the lowest finite value; "joint"
                leaves one softmax over all ids (models with one table only).
            documents: those of packed rows, for a network whose attention reads them, beside ``NO_MASK``.

        Raises:
            GenerationError: "joint" of a model with two heads.
            ValueError: a 4D mask without positions.
        """
        if position_ids is None:
            position_ids = default_positions(input_ids_BT, attention_mask, past_key_values)
        config = self.model.config
        if use_cache and past_key_values is None:
            past_key_values = cache_for(config)
        inputs = {
            "input_ids": input_ids_BT,
            "attention_mask": masks_for(
                config, attention_mask, self.model.dtype, past_key_values, input_ids_BT.shape[1]
            ),
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
        }
        if documents is not None:
            inputs["documents"] = documents
        if isinstance(self.model, cross.JamCrossForCausalLM):
            if softmax == "joint" and config.tables == "separate":
                raise GenerationError(
                    "softmax 'joint' of a model with two heads, which share no scale; use 'restricted', or a model "
                    "with one table"
                )
            output = self.model(**inputs, head_ids=head_ids_BT, restricted=softmax == "restricted")
            return output.logits, output.past_key_values
        output = self.model(**inputs)
        logits_BTV = output.logits
        if softmax == "restricted":
            logits_BTV = restrict(logits_BTV, head_ids_BT, self._allowed_2V.to(logits_BTV.device))
        return logits_BTV, output.past_key_values


def load_bundle(
    path: Path, dtype: torch.dtype = torch.float32, tp_plan: Literal["auto"] | None = None, hollow: bool = False
) -> Bundle:
    """Everything in a folder, on the CPU, in eval mode.

    Args:
        tp_plan: "auto" shares each matrix out over the processes of the run (tensor parallelism, by transformers'
            plans), on their devices; every process must then call the model with the same inputs.
        hollow: the network's parameters on the meta device, for a process that gets them from another.

    Raises:
        CheckpointError: no folder, config, shards, tokenizer or jam.json; a truncated shard; tensors missing, of the
            wrong shape or not finite; an unknown model type; parts that do not belong together.
    """
    path = Path(path)
    folder = open_model(path)
    checkpoint, record = folder.checkpoint, folder.jam
    if renamed := next((name for name, info in checkpoint.tensors.items() if info.name != name), None):
        raise CheckpointError(
            f"{path}: a folder of {folder.layout}'s owner, with {checkpoint.tensors[renamed].name} for {renamed}; jam "
            "merge reads it as a parent, run what that makes of it"
        )
    text = TextTokenizer.load(path)
    if quantized := [info for info in checkpoint.tensors.values() if info.dtype in _INTEGERS]:
        raise CheckpointError(
            f"{path}: tensor {quantized[0].name} is {quantized[0].dtype}; float weights are required, dequantize the "
            "checkpoint"
        )
    image = None
    if record.image_tokenizer is not None:
        image = ImageTokenizer.load(path / record.image_tokenizer)
    model = hollow_model(path, dtype) if hollow else load_model(path, checkpoint.config, dtype, tp_plan)
    bundle = Bundle(path, model, record.vocabulary, text, image, record.unconditional, record.sampling)
    _check_parts(bundle)
    return bundle


def load_model(
    path: Path, config: dict, dtype: torch.dtype = torch.float32, tp_plan: Literal["auto"] | None = None
) -> PreTrainedModel:
    """The network alone, whole and finite.

    Args:
        config: the folder's config.json.
        tp_plan: as in :func:`load_bundle`.

    Raises:
        CheckpointError: as :func:`load_bundle`.
    """
    model_type = config.get("model_type")
    if model_type not in ["jam_cross", *FAMILIES, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]:
        raise CheckpointError(
            f"{path}: model type {model_type!r} is not a causal language model that transformers or jam knows; "
            "point to another checkpoint"
        )
    shares = {} if tp_plan is None else {"distributed_config": _shares(path, config)}
    try:
        with quiet_transformers():
            # some of our families are known to transformers under the class alone (Emu3's text model)
            loader = network_class(model_type) if model_type in FAMILIES else AutoModelForCausalLM
            model, info = loader.from_pretrained(
                path,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
                **shares,
            )
    except (StrictDataclassError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path}: transformers cannot load it ({reason[:300]}); mend config.json or weights"
        ) from error
    wrong = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
    if wrong or info["unexpected_keys"]:
        extra = sorted(info["unexpected_keys"])
        raise CheckpointError(
            f"{path}: {len(wrong)} tensors missing or misshapen, {len(extra)} unexpected ({(wrong + extra)[0]}, ...); "
            "config.json and weights must come from one model"
        )
    for name, tensor in model.state_dict().items():
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor  # each process looks at its own
        # the sum of a tensor is not finite if any element is not; the exact test runs only then (a sum may overflow)
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise CheckpointError(f"{path}: tensor {name} has {bad} NaN or infinite numbers; restore the checkpoint")
    return model.eval()


def hollow_model(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The network without numbers: parameters on the meta device, buffers as they are."""
    config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    loader = network_class(config.model_type) if config.model_type in FAMILIES else AutoModelForCausalLM
    make = loader.from_config if loader is AutoModelForCausalLM else loader._from_config
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        model = make(config, dtype=dtype)
    model.tie_weights()  # what was moved to the meta device one by one is no longer tied
    return model.eval()


def _shares(path: Path, config: dict) -> DistributedConfig:
    """How transformers shares a network out over all processes.

    Raises:
        CheckpointError: one process, or numbers of heads that they do not divide.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count < 2:
        raise CheckpointError(f"{path}: tp_plan of 1 process; at least 2 are required, start them with torchrun")
    towers = [config[f"{side}_config"] for side in ("text", "image")] if "text_config" in config else [config]
    for tower in towers:
        heads = tower["num_attention_heads"]
        for name, number in (("attention", heads), ("key-value", tower.get("num_key_value_heads") or heads)):
            if number % count:
                raise CheckpointError(f"{path}: {number} {name} heads over {count} processes; choose a divisor of them")
    plan = OPT_TP_PLAN if config.get("model_type") == "opt" else "auto"
    return DistributedConfig(tp_plan=plan, tp_size=count)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' bars and load report: what is wrong is raised as one line."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_parts(bundle: Bundle) -> None:
    vocabulary, path = bundle.vocabulary, bundle.path
    rows = bundle.model.config.vocab_size
    if rows < vocabulary.size:
        raise CheckpointError(f"{path}: the model has {rows} rows, jam.json names {vocabulary.size} ids; mend jam.json")
    check_tokenizers(path, vocabulary, bundle.text, bundle.image)
