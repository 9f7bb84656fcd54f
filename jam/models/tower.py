"""One decoder-only transformers model, driven layer by layer.

A tower *is* transformers' own class (its tensors keep their names); :class:`Tower` only knows where each family keeps
its table, its layers, its final norm and its head, and calls them one at a time, so that a fused model can exchange
states between layers. Stages: ``rows`` -> ``embed`` -> ``rotary`` -> ``run`` layer by layer -> ``finish``.

What differs between families is the table ``FAMILIES``; a family is added there. This file builds no masks, chooses no
positions and owns no parameters.

Shapes: B batch, T tokens, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaForCausalLM, OPTForCausalLM, PreTrainedConfig, PreTrainedModel

from jam.errors import CheckpointError


@dataclass(frozen=True)
class Family:
    """How one transformers family is driven.

    Attributes:
        model_class: its CausalLM.
        decoder: the module that holds table, layers and final norm.
        embed: (decoder, token rows [B, T, E], position_ids [B, T]) -> first states [B, T, D].
        rotary: (decoder, states, position_ids) -> keyword arguments for every layer.
        finish: (decoder, states) -> what the head reads.
    """

    model_class: type[PreTrainedModel]
    decoder: Callable[[PreTrainedModel], nn.Module]
    embed: Callable[[nn.Module, Tensor, Tensor], Tensor]
    rotary: Callable[[nn.Module, Tensor, Tensor], dict[str, Any]]
    finish: Callable[[nn.Module, Tensor], Tensor]


def _opt_embed(decoder: nn.Module, rows_BTE: Tensor, positions_BT: Tensor) -> Tensor:
    x_BTD = rows_BTE if decoder.project_in is None else decoder.project_in(rows_BTE)
    # its first argument, a 2D attention mask, is only read to infer positions that were not given
    return x_BTD + decoder.embed_positions(positions_BT, position_ids=positions_BT)


def _opt_finish(decoder: nn.Module, x_BTD: Tensor) -> Tensor:
    x_BTD = x_BTD if decoder.final_layer_norm is None else decoder.final_layer_norm(x_BTD)
    return x_BTD if decoder.project_out is None else decoder.project_out(x_BTD)


FAMILIES: dict[str, Family] = {
    "opt": Family(
        OPTForCausalLM,
        decoder=lambda model: model.model.decoder,
        embed=_opt_embed,
        rotary=lambda decoder, x_BTD, positions_BT: {},
        finish=_opt_finish,
    ),
    "llama": Family(
        LlamaForCausalLM,
        decoder=lambda model: model.model,
        embed=lambda decoder, rows_BTE, positions_BT: rows_BTE,
        rotary=lambda decoder, x_BTD, positions_BT: {
            "position_embeddings": decoder.rotary_emb(x_BTD, position_ids=positions_BT)
        },
        finish=lambda decoder, x_BTD: decoder.norm(x_BTD),
    ),
}


def family_of(model_type: str) -> Family:
    """Raises CheckpointError for a model type that cannot be a tower."""
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"model type {model_type!r} cannot be a tower; {', '.join(FAMILIES)} can, choose another parent"
        )
    return FAMILIES[model_type]


def build_tower(config: PreTrainedConfig, first_slot: int, tables: bool = True) -> PreTrainedModel:
    """The family's CausalLM, its layers numbered ``first_slot, first_slot + 1, ...`` in the fused model's one cache.

    Args:
        tables: False replaces table and head by identities (a shared table serves both towers).
    """
    family = family_of(config.model_type)
    if not tables:
        config.tie_word_embeddings = False  # nothing left to tie
    model = family.model_class(config)
    decoder = family.decoder(model)
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = first_slot + index
    if not tables:
        decoder.embed_tokens = nn.Identity()
        model.lm_head = nn.Identity()
    return model


class Tower:
    """A view on a CausalLM of a known family; holds no parameters, so it may be made on every forward."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.family = family_of(model.config.model_type)
        self.decoder = self.family.decoder(model)
        self.layers = self.decoder.layers

    def rows(self, ids_BT: Tensor) -> Tensor:
        """Rows of the tower's own table."""
        return self.decoder.embed_tokens(ids_BT)

    def embed(self, rows_BTE: Tensor, positions_BT: Tensor) -> Tensor:
        """First states from table rows and 0-based positions (OPT's table adds its own offset of 2)."""
        return self.family.embed(self.decoder, rows_BTE, positions_BT)

    def rotary(self, x_BTD: Tensor, positions_BT: Tensor) -> dict[str, Any]:
        return self.family.rotary(self.decoder, x_BTD, positions_BT)

    def run(self, index: int, x_BTD: Tensor, mask: Tensor | None, cache: Cache | None, **kwargs: Any) -> Tensor:
        """Layer ``index``; LayerDrop (OPT) is honoured as the parent's training did.

        States go in by position: gradient checkpointing recomputes from positional tensors.
        """
        layerdrop = self.decoder.layerdrop if self.model.config.model_type == "opt" else 0.0
        if self.model.training and layerdrop > 0.0 and torch.rand([]) < layerdrop:
            return x_BTD
        return self.layers[index](x_BTD, attention_mask=mask, past_key_values=cache, **kwargs)

    def finish(self, x_BTD: Tensor) -> Tensor:
        return self.family.finish(self.decoder, x_BTD)
