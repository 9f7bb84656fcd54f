"""How much memory a decode call takes at its peak, from sizes alone.

Weights, heads that were packed beside their tables, and the larger of the prefill with its cache and the cache of all
rows with what a step holds for the moment. The process with its libraries comes on top.
``benchmarks/decode_memory.py`` sets it against the kernel's figure; docs/decoding.md has the formula.

Shapes: B rows of the batch (replies, their guidance streams and beams), P prompt slots, S slots, L layers of the cache,
H heads of keys, D head width, V vocabulary, K codes.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from jam.models.cpu import attention_dtype, is_packed
from jam.models.cross import JamCrossForCausalLM
from jam.models.load import Bundle

PER_SCORE = 28  # bytes: scores, blended, filtered and sorted in float32, their order in int64, masks


@dataclass(frozen=True)
class DecodeMemory:
    """Bytes. ``started`` is the prefill's cache and ``prefill`` what it computes with, both over when the rows have
    theirs (``cache``); ``step`` comes after. glibc may keep what is over, so that up to ``started`` comes on top of
    ``peak``: whether it does, changes from run to run."""

    weights: int
    heads: int
    cache: int
    started: int
    prefill: int
    step: int

    @property
    def peak(self) -> int:
        return self.weights + self.heads + max(self.started + self.prefill, self.cache + self.step)


def decode_memory(bundle: Bundle, rows: int, prompt: int, room: int, prompts: int = 2) -> DecodeMemory:
    """The peak of replies that use all of their room.

    Args:
        rows: replies, times their streams (2 with guidance, 3 with images apart), times their beams.
        prompt: tokens of the longest prompt.
        room: tokens that the longest reply may have.
        prompts: different prompts of all streams together, as equal ones run once; 2 is one prompt and its guidance.
    """
    model, vocabulary = bundle.model, bundle.vocabulary
    size = model.dtype.itemsize
    slot = _slot_values(model.config) * (attention_dtype(model) or model.dtype).itemsize
    # of a token: four states, and either both inputs and the output of a feed-forward or attention's four in float32
    widest = max(
        4 * tower.hidden_size * size + max(3 * _inner(tower) * size, 16 * tower.hidden_size)
        for tower in _towers(model.config)
    )
    masks = 5 * prompts * prompt**2  # bool, and as numbers
    codes = 0 if vocabulary.image_span is None else vocabulary.codebook_size
    return DecodeMemory(
        weights=_weights(model) + (0 if bundle.image is None else _weights(bundle.image.network)),
        heads=_packed_heads(bundle, codes),
        cache=rows * (prompt + room) * slot,
        started=prompts * prompt * slot,
        prefill=prompts * prompt * widest + masks,
        step=PER_SCORE * rows * model.config.vocab_size,
    )


def _weights(model: object) -> int:
    """Parameters and buffers; a matrix that was packed counts as it was."""
    if not isinstance(model, nn.Module):
        return 0
    held = sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
    packed = [part for part in model.modules() if isinstance(part, nn.Linear) and not part.weight.numel()]
    return held + sum(part.in_features * part.out_features * part.weight.dtype.itemsize for part in packed)


def _packed_heads(bundle: Bundle, codes: int) -> int:
    """A packed network's decoder keeps the rows that it reads a second time: those of text and those of codes."""
    model = bundle.model
    if not is_packed(model):
        return 0
    if not isinstance(model, JamCrossForCausalLM):
        return (model.config.vocab_size + codes) * model.config.hidden_size * model.dtype.itemsize
    if model.config.tables != "separate":
        return 0
    text, image = _towers(model.config)
    return ((bundle.vocabulary.size - codes) * text.hidden_size + codes * image.hidden_size) * model.dtype.itemsize


def _towers(config: PreTrainedConfig) -> tuple[PreTrainedConfig, ...]:
    return (config.text_config, config.image_config) if config.model_type == "jam_cross" else (config,)


def _slot_values(config: PreTrainedConfig) -> int:
    """Keys and values of one slot in one row, over all layers: 2 L H D."""
    own = 0
    for tower in _towers(config):
        heads = getattr(tower, "num_key_value_heads", None) or tower.num_attention_heads
        width = getattr(tower, "head_dim", None) or tower.hidden_size // tower.num_attention_heads
        own += 2 * tower.num_hidden_layers * heads * width
        own += 2 * len(getattr(config, "exchanges", None) or ()) * tower.hidden_size  # each side's cross-attention
    return own


def _inner(config: PreTrainedConfig) -> int:
    return getattr(config, "intermediate_size", None) or config.ffn_dim
