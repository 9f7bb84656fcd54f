"""JAM-Cross: a text LLM and an image-text model in lockstep, joined by cross-attention both ways (arXiv 2309.15564).

Stages of a forward: both towers embed the same ids -> layers run in lockstep, an exchange after each pair listed in
``config.exchanges`` -> both final norms -> at each position *one* head, chosen by the grammar, scores its own ids;
every other id gets the dtype's lowest finite value. With zero gates each head is its parent's (docs/decisions.md).

The towers are transformers' own classes (``text.model.decoder...``); each keeps its own table and head. With
``tables="shared"`` (the paper's) one table serves both and the head reads a projection of both final states.

All attention slots share one Cache, text layers first, then image layers, then text and image side of each exchange.
This file knows no sampling, no tokenizers and no training loop.

Shapes: B batch, T tokens, S key slots, D text width, E image width, N rows, K a head's own ids, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.masking_utils import create_causal_mask, sliding_window_overlay
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults

from jam.models.cross_config import JamCrossConfig
from jam.models.exchange import CrossBlock, Exchange
from jam.models.heads import next_heads
from jam.models.masks import default_positions, mask_for, windowed
from jam.models.span_head import Read, SpanHead, owned_slices, place, span_scores
from jam.models.tower import Tower, build_tower, cap_of
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD
from jam.tokens.vocabulary import Vocabulary

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"]
"""``target_modules`` for peft: every projection of both towers and of the exchanges, never a head or a table."""


class SharedTables(nn.Module):
    """One table for both towers (``tables="shared"``): the LLM's width, a linear map into the image tower, and the
    projection of both final states that the tied head reads (starts as [I, 0]: the text tower alone)."""

    def __init__(self, vocab_size: int, text_width: int, image_width: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, text_width)
        self.image_in = nn.Linear(text_width, image_width, bias=False)
        self.project = nn.Linear(text_width + image_width, text_width, bias=False)


class JamCrossForCausalLM(PreTrainedModel, GenerationMixin):
    """Both towers with their exchanges; see the module's docstring."""

    config_class = JamCrossConfig
    config: JamCrossConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Exchange"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _tp_plan: ClassVar[dict[str, str]] = {
        f"cross.*.{side}.{name}": style
        for side in ("text", "image")
        for name, style in {
            "q_proj": "colwise",
            "k_proj": "colwise",
            "v_proj": "colwise",
            "out_proj": "rowwise",
            "fc1": "colwise",
            "fc2": "rowwise",
        }.items()
    }

    def __init__(self, config: JamCrossConfig):
        super().__init__(config)
        self.vocabulary = Vocabulary.from_json(config.vocabulary)
        self.gradient_checkpointing = False
        text, image, separate = config.text_config, config.image_config, config.tables == "separate"
        self.text = build_tower(text, 0, separate)
        self.image = build_tower(image, text.num_hidden_layers, separate)
        if separate:
            for tower in (self.text, self.image):
                tower.lm_head = SpanHead(tower.lm_head.in_features, config.vocab_size, bias=False)
        else:
            self.shared = SharedTables(config.vocab_size, text.hidden_size, image.hidden_size)
        slot = text.num_hidden_layers + image.num_hidden_layers
        sizes = (text.hidden_size, text.num_attention_heads), (image.hidden_size, image.num_attention_heads)
        self.cross = nn.ModuleList()
        for _ in config.exchanges:
            (width_t, heads_t), (width_i, heads_i) = sizes
            self.cross.append(
                Exchange(
                    CrossBlock(config, width_t, width_i, heads_t, config.ffn_ratio, slot),
                    CrossBlock(config, width_i, width_t, heads_i, config.ffn_ratio, slot + 1),
                )
            )
            slot += 2
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CrossBlock):
            initialization.zeros_(module.gate)
        elif isinstance(module, SharedTables):
            initialization.eye_(module.image_in.weight)
            initialization.eye_(module.project.weight)  # [I, 0]

    def get_input_embeddings(self) -> nn.Module:
        """The text tower's table, or the shared one; the image tower's is ``model.image.get_input_embeddings()``."""
        return self.text.get_input_embeddings() if self.config.tables == "separate" else self.shared.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.config.tables == "separate":
            self.text.set_input_embeddings(value)
        else:
            self.shared.embed = value

    def get_output_embeddings(self) -> nn.Module | None:
        return self.text.lm_head if self.config.tables == "separate" else None

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Module:
        """Both towers' tables and heads together. Ids beyond the vocabulary's spans exist but are never predicted."""
        if self.config.tables == "separate":
            table = self.text.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
            self.image.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        else:
            table = self._get_resized_embeddings(self.shared.embed, new_num_tokens, pad_to_multiple_of, mean_resizing)
            self.shared.embed = table
            self.config.text_config.vocab_size = self.config.image_config.vocab_size = table.weight.shape[0]
        self.config.vocab_size = table.weight.shape[0]
        return table

    def states(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Final states of both towers, as their heads read them: ([B, T, D], [B, T, E]).

        Args:
            attention_mask: [B, S] with 1 or True for real tokens, or [B, 1, T, S] bool (True: may attend) or additive.
            position_ids: [B, T] from 0; by default counted from the 2D mask, else from the cache's length. Packed
                documents need both a 4D mask and positions.
        """
        text, image = Tower(self.text), Tower(self.image)
        if position_ids is None:
            position_ids = default_positions(input_ids, attention_mask, past_key_values)
        if self.config.tables == "separate":
            rows, image_rows = text.rows(input_ids), image.rows(input_ids)
        else:
            rows = self.shared.embed(input_ids)
            image_rows = self.shared.image_in(rows)
        x_BTD, y_BTE = text.embed(rows, position_ids), image.embed(image_rows, position_ids)
        # the one without a window serves cross-attention too; positions are not consulted, a 4D mask says packing
        masks = self._masks(x_BTD, attention_mask, past_key_values)
        seen = masks(self.config)  # now: it counts the slots of the cache, to which the layers will add
        kwargs = kwargs | {"position_ids": position_ids}
        text_inputs = text.inputs(x_BTD, position_ids, partial(masks, text.config))
        image_inputs = image.inputs(y_BTE, position_ids, partial(masks, image.config))
        text_done = image_done = 0
        ends = [*self.config.exchanges, [len(text.layers), len(image.layers)]]
        for index, (text_end, image_end) in enumerate(ends):
            for layer in range(text_done, text_end):
                x_BTD = text.run(layer, x_BTD, past_key_values, **text_inputs[layer], **kwargs)
            for layer in range(image_done, image_end):
                y_BTE = image.run(layer, y_BTE, past_key_values, **image_inputs[layer], **kwargs)
            text_done, image_done = text_end, image_end
            if index < len(self.cross):
                x_BTD, y_BTE = self.cross[index](
                    x_BTD, y_BTE, attention_mask=seen, past_key_values=past_key_values, **kwargs
                )
        return text.finish(x_BTD), image.finish(y_BTE)

    def _masks(self, x_BTD: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Callable[..., Tensor | None]:
        """Masks in the form that a network's attention reads (Gemma2's is eager by default), by sliding window; each
        is made once."""
        made: dict[tuple[str, int | None], Tensor | None] = {}

        def mask(config: PreTrainedConfig, window: int | None = None) -> Tensor | None:
            key = config._attn_implementation, window
            if key not in made:
                length = x_BTD.shape[1]
                wanted = attention_mask if window is None else windowed(attention_mask, window)
                made[key] = create_causal_mask(
                    config=config,
                    inputs_embeds=x_BTD,
                    attention_mask=mask_for(config, wanted, x_BTD.dtype, cache, length),
                    past_key_values=cache,
                    and_mask_function=None if window is None else sliding_window_overlay(window),
                )
            return made[key]

        return mask

    def head(
        self,
        kind: int,
        text_ND: Tensor,
        image_NE: Tensor,
        slices: list[slice] | None = None,
        read: Read | None = None,
    ) -> Any:
        """Logits [N, K] of one head over its own ids only, in the order of ``owned_slices(vocabulary, kind)``.

        Args:
            kind: TEXT_HEAD or IMAGE_HEAD.
            text_ND, image_NE: the final states of the same rows.
            slices: fewer of its ids.
            read: what is made of states, weight and slices instead of logits; :meth:`cap` is then its own matter.

        Raises:
            ValueError: ``read`` of a head that is wrapped, resized or sharded by rows.
        """
        slices = owned_slices(self.vocabulary, kind) if slices is None else slices
        if self.config.tables == "shared":
            z_ND = self.shared.project(torch.cat([text_ND, image_NE], -1))
            return (read or span_scores)(z_ND, self.shared.embed.weight, slices)
        tower, states = (self.text, text_ND) if kind == TEXT_HEAD else (self.image, image_NE)
        head = tower.lm_head
        if isinstance(getattr(head, "original_module", None), SpanHead):  # peft trains some rows: it makes the weight
            own = (read or span_scores)(states, head.weight, slices)
            return Tower(tower).scores(own) if read is None else own
        if isinstance(head, SpanHead) and not isinstance(head.weight, DTensor):
            return Tower(tower).scores(head(states, slices)) if read is None else head(states, slices, read)
        if read is not None:
            raise ValueError(f"a head of class {type(head).__name__} has no weight to read; ask for its logits")
        logits = head(states)  # wrapped (LoRA), resized or sharded by rows: all ids, then its own
        return Tower(tower).scores(torch.cat([logits[..., part] for part in slices], -1))

    def cap(self, kind: int) -> float | None:
        """What a head's logits are capped at (Gemma2's tower), or None."""
        if self.config.tables == "shared":
            return None
        tower = self.config.text_config if kind == TEXT_HEAD else self.config.image_config
        return cap_of(tower)

    def logits(self, text_BTD: Tensor, image_BTE: Tensor, heads_BT: Tensor) -> Tensor:
        """[..., V]: each position's own head on its own ids, the lowest finite value elsewhere.

        A head is evaluated on its own rows and ids only, both heads even without rows, so that every step touches every
        parameter. Compiled code has no data-dependent shapes: there both are evaluated everywhere, then chosen.
        """
        size = self.config.vocab_size
        parts = {kind: owned_slices(self.vocabulary, kind) for kind in (TEXT_HEAD, IMAGE_HEAD)}
        if torch.compiler.is_compiling():
            text, image = (place(self.head(kind, text_BTD, image_BTE), part, size) for kind, part in parts.items())
            return torch.where((heads_BT == IMAGE_HEAD)[..., None], image, text)
        text_ND, image_NE, heads_N = text_BTD.flatten(0, -2), image_BTE.flatten(0, -2), heads_BT.flatten()
        rows = {kind: (heads_N == kind).nonzero()[:, 0] for kind in parts}
        own = {kind: self.head(kind, text_ND[at], image_NE[at]) for kind, at in rows.items()}
        out_NV = own[TEXT_HEAD].new_empty((len(heads_N), size))
        for kind, at in rows.items():
            out_NV = out_NV.index_copy_(0, at, place(own[kind], parts[kind], size))
        return out_NV.unflatten(0, heads_BT.shape)

    def joint(self, text_BTD: Tensor, image_BTE: Tensor) -> Tensor:
        """[..., V], every id scored by the shared head. Raises ValueError for two heads, which share no scale."""
        if self.config.tables != "shared":
            raise ValueError("one softmax over two heads that share no scale; use restricted logits or shared tables")
        z_BTD = self.shared.project(torch.cat([text_BTD, image_BTE], -1))
        return nn.functional.linear(z_BTD, self.shared.embed.weight)

    @can_return_tuple
    @merge_with_config_defaults
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        head_ids: Tensor | None = None,
        restricted: bool = True,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Restricted logits [B, T, V] and, with labels, the mean loss under each position's own softmax.

        Args:
            input_ids: int64 [B, T].
            attention_mask, position_ids: see :meth:`states`.
            head_ids: int64 [B, T], the head that predicts the token *after* each position; by default read off
                ``input_ids``, which must then be whole sequences.
            restricted: False leaves one softmax over all ids (``tables="shared"`` only).
            labels: int64 [B, T], ids to predict in place (shifted inside), -100 to leave out.

        Raises:
            ValueError: no ``head_ids`` with a filled cache (what a ``<break>`` means depends on the ids before it), or
                one softmax asked of two heads.
        """
        if head_ids is None:
            if past_key_values is not None and past_key_values.get_seq_length() > 0:
                raise ValueError("head_ids are required with a filled cache; compute next_heads on the whole sequence")
            head_ids = next_heads(input_ids, self.vocabulary)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        text_BTD, image_BTE = self.states(
            input_ids, attention_mask, position_ids, past_key_values, use_cache=use_cache, **kwargs
        )
        text_BTD, image_BTE = (slice_logits_to_keep(states, logits_to_keep) for states in (text_BTD, image_BTE))
        heads_BT = slice_logits_to_keep(head_ids[..., None], logits_to_keep)[..., 0]
        logits_BTV = self.logits(text_BTD, image_BTE, heads_BT) if restricted else self.joint(text_BTD, image_BTE)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=past_key_values)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """transformers' own, plus the heads, read off the whole sequence so far."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        inputs["head_ids"] = next_heads(input_ids, self.vocabulary)[:, -inputs["input_ids"].shape[1] :]
        return inputs


AutoConfig.register("jam_cross", JamCrossConfig, exist_ok=True)
AutoModelForCausalLM.register(JamCrossConfig, JamCrossForCausalLM, exist_ok=True)
