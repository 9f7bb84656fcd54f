"""Chameleon's language model with raw logits.

transformers' ``ChameleonForConditionalGeneration`` overwrites the scores of all image ids, before the loss too: it can
neither draw nor learn to. This class is the same network without that, and without the image encoder, which jam keeps
in the image tokenizer beside it. The decoder's code is transformers' own; tensors keep their names.

Shapes: B batch, T tokens, V vocabulary.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import ChameleonConfig, ChameleonModel, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.chameleon import modeling_chameleon as chameleon
from transformers.utils.generic import can_return_tuple


class ChameleonDecoder(ChameleonModel):
    """transformers' model without its image encoder: ids in, states out."""

    def __init__(self, config: ChameleonConfig):
        chameleon.ChameleonPreTrainedModel.__init__(self, config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layer = chameleon.ChameleonSwinDecoderLayer if config.swin_norm else chameleon.ChameleonDecoderLayer
        self.layers = nn.ModuleList(layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = chameleon.ChameleonRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = chameleon.ChameleonRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()


class ChameleonForCausalLM(chameleon.ChameleonPreTrainedModel, GenerationMixin):
    """The decoder and its head over text, control and image ids alike."""

    input_modalities = ("text",)
    output_modalities = ("image", "text")
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^model\.vqmodel\."]

    def __init__(self, config: ChameleonConfig):
        super().__init__(config)
        self.model = ChameleonDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, V], and with labels (shifted inside, -100 left out) the mean loss.

        Args:
            input_ids: int64 [B, T]; all else as transformers' decoder takes it.
        """
        output = self.model(input_ids=input_ids, **kwargs)
        logits_BTV = self.lm_head(slice_logits_to_keep(output.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits_BTV, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=output.past_key_values)
