"""A network's forward in two parts: the states of its stack, then the scores of one head on the ids that are wanted.

A decoder scores the codes of an image for rows that draw and text for rows that write; a head of 73,728 rows of which
8,192 are codes is then read in a ninth. ``Bundle.logits`` is the same in one piece, and the oracle of this.

Shapes: B batch, T tokens, S key slots, K codes, V vocabulary, N any leading dimensions.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from jam.models.cross import JamCrossForCausalLM
from jam.models.families import FAMILIES
from jam.models.masks import masks_for
from jam.models.tower import capped, network_class
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD
from jam.tokens.vocabulary import Span, Vocabulary

States = tuple[Tensor, ...]  # what the heads read, [B, T, ...] each


class Readout(Protocol):
    """The two parts. All scores are raw: an id that a head does not own has the dtype's lowest finite value, or any."""

    def states(self, ids_BT: Tensor, mask_B1TS: Tensor, positions_BT: Tensor, cache: Cache) -> States:
        """The final states of every token; the cache takes its keys and values.

        Args:
            mask_B1TS: bool, True where a query may attend.
        """

    def codes(self, states: States) -> Tensor:
        """[N, K]: the scores of all codes after each state."""

    def text(self, states: States) -> Tensor:
        """[N, V]: the text head's scores after each state. Only those of text and control ids mean anything."""


def readout(model: PreTrainedModel, vocabulary: Vocabulary) -> Readout:
    """The readout of a model: by its parts where jam knows the family, else from its logits."""
    if isinstance(model, JamCrossForCausalLM):
        return TwoTowers(model, vocabulary)
    known = model.config.model_type in FAMILIES and type(model) is network_class(model.config.model_type)
    if known and type(model.lm_head) is nn.Linear:
        return OneTable(model, vocabulary)
    return FromLogits(model, vocabulary)


class _Readout:
    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary):
        self.model, self.vocabulary = model, vocabulary

    @property
    def span(self) -> Span:
        assert self.vocabulary.image_span is not None, "the grammar opens no image without a span of codes"
        return self.vocabulary.image_span

    def _inputs(self, ids_BT: Tensor, mask_B1TS: Tensor, positions_BT: Tensor, cache: Cache) -> dict:
        mask = masks_for(self.model.config, mask_B1TS, self.model.dtype, cache, ids_BT.shape[1])
        shared = {"position_ids": positions_BT, "past_key_values": cache, "use_cache": True}
        return {"input_ids": ids_BT, "attention_mask": mask, **shared}


class OneTable(_Readout):
    """A family's own network: its stack, then rows of its head."""

    def states(self, ids_BT: Tensor, mask_B1TS: Tensor, positions_BT: Tensor, cache: Cache) -> States:
        output = self.model.model(**self._inputs(ids_BT, mask_B1TS, positions_BT, cache))
        return (output.last_hidden_state,)

    def codes(self, states: States) -> Tensor:
        head, rows = self.model.lm_head, slice(self.span.start, self.span.stop)
        bias = None if head.bias is None else head.bias[rows]
        return capped(self.model.config, nn.functional.linear(states[0], head.weight[rows], bias))

    def text(self, states: States) -> Tensor:
        return capped(self.model.config, self.model.lm_head(states[0]))


class TwoTowers(_Readout):
    """The cross model: both towers' states, each head on its own ids."""

    model: JamCrossForCausalLM

    def states(self, ids_BT: Tensor, mask_B1TS: Tensor, positions_BT: Tensor, cache: Cache) -> States:
        return self.model.states(ids_BT, mask_B1TS, positions_BT, cache, use_cache=True)

    def codes(self, states: States) -> Tensor:
        return self.model.head(IMAGE_HEAD, *states, [slice(self.span.start, self.span.stop)])

    def text(self, states: States) -> Tensor:
        heads = torch.full(states[0].shape[:-1], TEXT_HEAD, device=states[0].device)
        return self.model.logits(*states, heads)


class FromLogits(_Readout):
    """Any other causal language model, also one in wrappers: its scores are its states."""

    def states(self, ids_BT: Tensor, mask_B1TS: Tensor, positions_BT: Tensor, cache: Cache) -> States:
        return (self.model(**self._inputs(ids_BT, mask_B1TS, positions_BT, cache)).logits,)

    def codes(self, states: States) -> Tensor:
        return states[0][..., self.span.start : self.span.stop]

    def text(self, states: States) -> Tensor:
        return states[0]
