"""One decoder-only transformers model, driven layer by layer.

A tower *is* transformers' own class (its tensors keep their names); :class:`Tower` only knows where each family keeps
its table, its layers, its final norm and its head, and calls them one at a time, so that a fused model can exchange
states between layers. Stages: ``rows`` -> ``embed`` -> ``inputs`` -> ``run`` layer by layer -> ``finish`` -> the head's
scores through ``scores``.

Most families are of Llama's build and need nothing of their own here: scaled embeddings (Gemma), layers without rotary
positions (SmolLM3), fused projections (Phi3), norms before or after (Olmo2) are inside transformers' modules. What a
layer is given from outside differs in two ways: rotary positions by layer type (Gemma3) and sliding windows. This file
chooses no positions and owns no parameters.

Shapes: B batch, T tokens, D model width.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig, PreTrainedModel

from jam.errors import CheckpointError
from jam.models.chameleon import ChameleonForCausalLM
from jam.models.families import FAMILIES
from jam.models.traits import windows_of

OPT_TP_PLAN = {"model.decoder.layers.*.fc1": "colwise", "model.decoder.layers.*.fc2": "rowwise"}
"""OPT's plan of tensor parallelism, which transformers has none of: its attention counts all heads, and stays whole."""

Masks = Callable[[int | None], Tensor | None]  # the mask under a sliding window, or without one


_TABLES = ("embed_tokens", "lm_head")


def network_class(model_type: str) -> type[PreTrainedModel]:
    """The CausalLM of a known family: transformers' own, but for Chameleon, which cannot draw there."""
    if model_type == "chameleon":
        return ChameleonForCausalLM
    return getattr(transformers, FAMILIES[model_type].architecture)


def cap_of(config: PreTrainedConfig) -> float | None:
    """What a family caps its logits at (Gemma2), or None."""
    return getattr(config, "final_logit_softcapping", None)


def capped(config: PreTrainedConfig, logits: Tensor) -> Tensor:
    """A head's output as the family scores it."""
    cap = cap_of(config)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def build_tower(config: PreTrainedConfig, first_slot: int, tables: bool = True) -> PreTrainedModel:
    """The family's CausalLM, its layers numbered ``first_slot, first_slot + 1, ...`` in the fused model's one cache.

    Args:
        tables: False replaces table and head by identities (a shared table serves both towers).

    Raises:
        CheckpointError: a model type that cannot be a tower.
    """
    if config.model_type not in FAMILIES:
        raise CheckpointError(
            f"model type {config.model_type!r} cannot be a tower; {', '.join(FAMILIES)} can, choose another parent"
        )
    if not tables:
        config.tie_word_embeddings = False  # nothing left to tie
    model = network_class(config.model_type)(config)
    decoder = Tower(model).decoder
    for index, layer in enumerate(decoder.layers):
        layer.self_attn.layer_idx = first_slot + index
    if config.model_type == "opt":
        model.tp_plan = OPT_TP_PLAN
    if not tables:
        decoder.embed_tokens = nn.Identity()
        model.lm_head = nn.Identity()
        model.tp_plan = {name: way for name, way in model.tp_plan.items() if not name.endswith(_TABLES)}
    return model


class Tower:
    """A view on a CausalLM of a known family; holds no parameters, so it may be made on every forward."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.config = model, model.config
        self.is_opt = model.config.model_type == "opt"
        self.decoder = model.model.decoder if self.is_opt else model.model
        self.layers = self.decoder.layers

    def rows(self, ids_BT: Tensor) -> Tensor:
        """Rows of the tower's own table, scaled as the family scales them."""
        return self.decoder.embed_tokens(ids_BT)

    def embed(self, rows_BTE: Tensor, positions_BT: Tensor) -> Tensor:
        """First states from table rows and 0-based positions (OPT's table adds its own offset of 2)."""
        if not self.is_opt:
            return rows_BTE
        x_BTD = rows_BTE if self.decoder.project_in is None else self.decoder.project_in(rows_BTE)
        # its first argument, a 2D attention mask, is only read to infer positions that were not given
        return x_BTD + self.decoder.embed_positions(positions_BT, position_ids=positions_BT)

    def inputs(self, x_BTD: Tensor, positions_BT: Tensor, masks: Masks) -> list[dict[str, Any]]:
        """What each layer is given beside its states: its mask, and its rotary positions where it has some."""
        spans = windows_of(self.config)
        given: list[dict[str, Any]] = [{"attention_mask": masks(window)} for window in spans]
        if self.is_opt:
            return given
        kinds = self.config.layer_types if self.config.model_type == "gemma3_text" else [None] * len(spans)
        rotary = {
            kind: self.decoder.rotary_emb(x_BTD, positions_BT, *([] if kind is None else [kind])) for kind in set(kinds)
        }
        return [one | {"position_embeddings": rotary[kind]} for one, kind in zip(given, kinds, strict=True)]

    def run(self, index: int, x_BTD: Tensor, cache: Cache | None, **inputs: Any) -> Tensor:
        """Layer ``index``; LayerDrop (OPT) is honoured as the parent's training did.

        States go in by position: gradient checkpointing recomputes from positional tensors.
        """
        layerdrop = self.decoder.layerdrop if self.is_opt else 0.0
        if self.model.training and layerdrop > 0.0 and torch.rand([]) < layerdrop:
            return x_BTD
        output = self.layers[index](x_BTD, past_key_values=cache, **inputs)
        return output[0] if isinstance(output, tuple) else output  # Chameleon's layers return a tuple

    def finish(self, x_BTD: Tensor) -> Tensor:
        """What the head reads."""
        if not self.is_opt:
            return self.decoder.norm(x_BTD)
        x_BTD = x_BTD if self.decoder.final_layer_norm is None else self.decoder.final_layer_norm(x_BTD)
        return x_BTD if self.decoder.project_out is None else self.decoder.project_out(x_BTD)

    def scores(self, logits: Tensor) -> Tensor:
        return capped(self.config, logits)
