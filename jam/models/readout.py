"""A network's forward in two parts: the states of its stack, then the scores of one head on the ids that are wanted.

A decoder scores the codes of an image for rows that draw and text for rows that write; a head of 73,728 rows of which
8,192 are codes is then read in a ninth. ``Bundle.logits`` is the same in one piece, and the oracle of this.

Shapes: B batch, T tokens, S key slots, K codes, V vocabulary, N any leading dimensions.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from jam.models.cpu import Rows, is_packed
from jam.models.cross import JamCrossForCausalLM
from jam.models.families import FAMILIES
from jam.models.masks import masks_for
from jam.models.slot_cache import SlotCache
from jam.models.span_head import owned_slices, place
from jam.models.tower import capped, network_class
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD
from jam.tokens.vocabulary import Vocabulary

States = tuple[Tensor, ...]  # what the heads read, [B, T, ...] each


class Readout(Protocol):
    """The two parts. All scores are raw: an id that a head does not own has the dtype's lowest finite value, or any."""

    def states(self, ids_BT: Tensor, mask_B1TS: Tensor, positions_BT: Tensor, cache: SlotCache) -> States:
        """The final states of every token; the cache takes its keys and values.

        Args:
            mask_B1TS: bool, True where a query may attend.
        """

    def start(self, prompts: SlotCache, rows: Tensor, filled: int, slots: int) -> SlotCache:
        """The cache to decode with, of at least so many slots: row n begins as row ``rows[n]`` of the prompts' cache,
        whose first ``filled`` slots hold something. ``finish`` takes it back."""

    def finish(self, cache: SlotCache) -> None:
        """The call is over."""

    def codes(self, states: States) -> Tensor:
        """[N, K]: the scores of all codes after each state."""

    def text(self, states: States) -> Tensor:
        """[N, V]: the text head's scores after each state. Only those of text and control ids mean anything."""


def readout(model: PreTrainedModel, vocabulary: Vocabulary) -> Readout:
    """The readout of a model: by its parts where jam knows the family, else from its logits."""
    if isinstance(model, JamCrossForCausalLM):
        return TwoTowers(model, vocabulary)
    known = model.config.model_type in FAMILIES and type(model) is network_class(model.config.model_type)
    if known and type(model.lm_head) is nn.Linear and not isinstance(model.lm_head.weight, DTensor):
        return OneTable(model, vocabulary)
    return FromLogits(model, vocabulary)


class _Readout:
    run: Callable[..., States]  # the network itself, nothing around it; each subclass has its own

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary):
        self.model, self.vocabulary = model, vocabulary
        self._packed: dict[str, Rows] = {}

    @property
    def span(self) -> slice:
        span = self.vocabulary.image_span
        assert span is not None, "the grammar opens no image without a span of codes"
        return slice(span.start, span.stop)

    def states(self, ids_BT: Tensor, mask_B1TS: Tensor, positions_BT: Tensor, cache: SlotCache) -> States:
        return self.run(**self.inputs(ids_BT, mask_B1TS, positions_BT, cache))

    def inputs(self, ids_BT: Tensor, mask_B1TS: Tensor, positions_BT: Tensor, cache: SlotCache) -> dict[str, Any]:
        """What ``run`` is called with."""
        mask = masks_for(self.model.config, mask_B1TS, self.model.dtype, cache, ids_BT.shape[1])
        return self._call(ids_BT, mask, positions_BT, cache)

    def start(self, prompts: SlotCache, rows: Tensor, filled: int, slots: int) -> SlotCache:
        prompts.take(rows, filled, slots)
        return prompts

    def finish(self, cache: SlotCache) -> None:
        pass

    @staticmethod
    def _call(ids_BT: Tensor, mask: Any, positions_BT: Tensor, cache: SlotCache) -> dict[str, Any]:
        shared = {"position_ids": positions_BT, "past_key_values": cache, "use_cache": True}
        return {"input_ids": ids_BT, "attention_mask": mask, **shared}

    def _rows(self, name: str, head: nn.Linear, rows: slice) -> Rows:
        """Rows of a head; those of a packed network are packed once."""
        if name in self._packed:
            return self._packed[name]
        packed = is_packed(self.model)
        made = Rows(head.weight[rows], None if head.bias is None else head.bias[rows], packed)
        if packed:
            self._packed[name] = made
        return made


class OneTable(_Readout):
    """A family's own network: its stack, then rows of its head."""

    def run(self, **given: Any) -> States:
        return (self.model.model(**given).last_hidden_state,)

    def codes(self, states: States) -> Tensor:
        return capped(self.model.config, self._rows("codes", self.model.lm_head, self.span)(states[0]))

    def text(self, states: States) -> Tensor:
        return capped(self.model.config, self._rows("text", self.model.lm_head, slice(None))(states[0]))


class TwoTowers(_Readout):
    """The cross model: both towers' states, each head on its own ids."""

    model: JamCrossForCausalLM

    def inputs(self, ids_BT: Tensor, mask_B1TS: Tensor, positions_BT: Tensor, cache: SlotCache) -> dict[str, Any]:
        return self._call(ids_BT, mask_B1TS, positions_BT, cache)  # each tower makes its own masks

    def run(self, **given: Any) -> States:
        return self.model.states(**given)

    def codes(self, states: States) -> Tensor:
        if not self._may_pack:
            return self.model.head(IMAGE_HEAD, *states, [self.span])
        scores = self._rows("codes", self.model.image.lm_head, self.span)(states[1])
        return capped(self.model.image.config, scores)

    def text(self, states: States) -> Tensor:
        size, slices = self.model.config.vocab_size, owned_slices(self.vocabulary, TEXT_HEAD)
        if not self._may_pack:
            return place(self.model.head(TEXT_HEAD, *states), slices, size)
        parts = [self._rows(f"text {part.start}", self.model.text.lm_head, part)(states[0]) for part in slices]
        return place(capped(self.model.text.config, torch.cat(parts, -1)), slices, size)

    @property
    def _may_pack(self) -> bool:
        return is_packed(self.model) and self.model.config.tables == "separate"


class FromLogits(_Readout):
    """Any other causal language model, also one in wrappers: its scores are its states."""

    def run(self, **given: Any) -> States:
        return (self.model(**given).logits,)

    def codes(self, states: States) -> Tensor:
        return states[0][..., self.span]

    def text(self, states: States) -> Tensor:
        return states[0]
