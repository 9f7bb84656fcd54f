"""One exchange between two towers: gated cross-attention and FFN blocks in both directions.

A block changes its own tower's states x from the other tower's states y:

    a     = out_proj(attention(norm_self(x), norm_other(y)))
    delta = a + fc2(gelu(fc1(norm_ffn(x + a))))
    x_new = x + tanh(gate) * delta

Both directions of an exchange read the same states from before it. The scalar gate starts at zero and is the *only*
zero (two would never learn: the product's gradient is zero), so that a fresh fusion equals its towers. Design:
JAM-Cross (arXiv 2309.15564), cross-attention in both directions between corresponding layers; norms, FFN and the scalar
gate (Flamingo, arXiv 2204.14198) are choices of ours.

Keys of a position are its own and earlier ones (the self-attention's mask serves, both streams have the same tokens)
and lie in their own slot of the one cache. This file knows no families, no heads over the vocabulary and no positions:
both streams carry their positions in their states.

Shapes: B batch, T query tokens, S key tokens, D own width, E the other's width, N heads, H head width, F feed-forward.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def eager_attention(
    module: nn.Module,
    q_BNTH: Tensor,
    k_BNSH: Tensor,
    v_BNSH: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Plain attention with an additive mask, the oracle of the fused kernels: ([B, T, N, H], weights [B, N, T, S])."""
    weights_BNTS = q_BNTH @ k_BNSH.transpose(2, 3) * scaling
    if attention_mask is not None:
        weights_BNTS = weights_BNTS + attention_mask
    precise = torch.promote_types(q_BNTH.dtype, torch.float32)  # at least float32, and float64 stays
    weights_BNTS = weights_BNTS.softmax(-1, dtype=precise).to(q_BNTH.dtype)
    weights_BNTS = nn.functional.dropout(weights_BNTS, p=dropout, training=module.training)
    return (weights_BNTS @ v_BNSH).transpose(1, 2).contiguous(), weights_BNTS


class CrossBlock(nn.Module):
    """One direction of an exchange.

    Args:
        config: the fused model's config (the attention implementation is read from it at each call).
        width, other_width: D and E.
        heads: the own tower's heads, of width D / N.
        ffn_ratio: F / D.
        layer_idx: this block's slot in the cache.
    """

    def __init__(
        self, config: PreTrainedConfig, width: int, other_width: int, heads: int, ffn_ratio: int, layer_idx: int
    ):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = width // heads
        self.scaling = self.head_dim**-0.5
        self.num_key_value_groups = 1
        self.is_causal = True
        self.norm_self = nn.RMSNorm(width, eps=1e-6)
        self.norm_other = nn.RMSNorm(other_width, eps=1e-6)
        self.norm_ffn = nn.RMSNorm(width, eps=1e-6)
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(other_width, width, bias=False)
        self.v_proj = nn.Linear(other_width, width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)
        self.fc1 = nn.Linear(width, ffn_ratio * width, bias=False)
        self.fc2 = nn.Linear(ffn_ratio * width, width, bias=False)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x_BTD: Tensor, y_BTE: Tensor, mask: Tensor | None, cache: Cache | None, **kwargs: Any) -> Tensor:
        """New states of the own tower."""
        a_BTD = self._attend(self.norm_self(x_BTD), self.norm_other(y_BTE), mask, cache, **kwargs)
        delta_BTD = a_BTD + self.fc2(nn.functional.gelu(self.fc1(self.norm_ffn(x_BTD + a_BTD))))
        return x_BTD + self.gate.tanh() * delta_BTD

    def _attend(self, x_BTD: Tensor, y_BTE: Tensor, mask: Tensor | None, cache: Cache | None, **kwargs: Any) -> Tensor:
        q_BNTH, k_BNSH, v_BNSH = (
            states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for states in (self.q_proj(x_BTD), self.k_proj(y_BTE), self.v_proj(y_BTE))
        )
        if cache is not None:
            k_BNSH, v_BNSH = cache.update(k_BNSH, v_BNSH, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        out_BTNH, _ = attend(self, q_BNTH, k_BNSH, v_BNSH, mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.out_proj(out_BTNH.flatten(2))


class Exchange(GradientCheckpointingLayer):
    """Both directions; checkpointed as one layer, with both streams positional."""

    def __init__(self, text: CrossBlock, image: CrossBlock):
        super().__init__()
        self.text = text
        self.image = image

    def forward(
        self,
        text_BTD: Tensor,
        image_BTE: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        return (
            self.text(text_BTD, image_BTE, attention_mask, past_key_values, **kwargs),
            self.image(image_BTE, text_BTD, attention_mask, past_key_values, **kwargs),
        )
