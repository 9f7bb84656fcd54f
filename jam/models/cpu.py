"""A network that only runs, on a CPU: weights in the layout of its matrix kernels, attention in float32.

A product of a few rows with a matrix as PyTorch keeps it uses a third of the memory bandwidth: oneDNN lays the matrix
out anew, or walks it the wrong way, at every call. In oneDNN's own layout it takes a half to two thirds of the time.
``torch.compile`` freezes weights into that layout too, after a minute of compiling; this takes a copy. The dense matrix
is let go of, so that memory stays what it was.

PyTorch's attention in bfloat16 takes five to ten times as long as in float32 here, so that its queries are widened and
the decoder keeps keys and values in float32 (``attention_dtype``). Figures: benchmarks/decode.py and docs/log.md.

Shapes: N leading dimensions, D inputs, K outputs; B batch, H heads, T queries, S key slots.
"""

from collections.abc import Collection
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROWS = 16  # the number of rows that the layout is made for; others run as well
WIDE = "jam_float32"


class Rows:
    """Some rows of a matrix as a linear map, ``x @ weight[rows].T + bias``; packed where that is possible."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, pack: bool = False):
        self.weight, self.bias, self.packed = weight, bias, None
        if pack and _can_pack(weight):
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)

    def __call__(self, x_ND: Tensor) -> Tensor:
        """[N, K]"""
        if self.packed is None:
            return nn.functional.linear(x_ND, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x_ND, self.packed, self.bias, "none", [], "")


def pack(model: nn.Module, heads: Collection[nn.Module] = ()) -> bool:
    """Packs every plain linear map of a network in place, all but ``heads``, whose rows are read one part at a time
    (``jam.models.readout``), and widens its attention. The network can then be neither trained nor saved nor moved.
    False, and nothing is changed, on another device or where oneDNN is missing.
    """
    own = [module for module in model.modules() if type(module) is nn.Linear and module not in set(heads)]
    if not own or not all(_can_pack(module.weight) for module in own):
        return False
    for module in own:
        packed = Rows(module.weight, module.bias, pack=True)
        packed.weight = module.weight = nn.Parameter(module.weight.new_empty(0), requires_grad=False)
        module.forward = MethodType(lambda _, x, packed=packed: packed(x), module)
    # a configuration hands what it is told on to those inside it, which want their own (Gemma2's is eager): outer first
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    own_ways = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    for config, way in own_ways:
        config._attn_implementation = WIDE if way == "sdpa" else way
    model.jam_packed, model.jam_wide = True, all(way == "sdpa" for _, way in own_ways)
    return True


def is_packed(model: nn.Module) -> bool:
    return getattr(model, "jam_packed", False)


def attention_dtype(model: nn.Module) -> torch.dtype | None:
    """What keys and values are best kept in; None is the network's own, which attention that is not widened needs."""
    return torch.float32 if getattr(model, "jam_wide", False) else None


def wide_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA attention in float32 where half precision comes in: [B, T, H, D] of the query's dtype."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(wide)
    parts = (part.to(wide) for part in (query, key, value))
    out, _ = sdpa_attention_forward(module, *parts, attention_mask, **kwargs)
    return out.to(query.dtype), None


AttentionInterface.register(WIDE, wide_attention)
AttentionMaskInterface.register(WIDE, sdpa_mask)


def _can_pack(weight: Tensor) -> bool:
    mkldnn = torch.ops.mkldnn
    known = hasattr(mkldnn, "_reorder_linear_weight") and hasattr(mkldnn, "_linear_pointwise")
    if weight.device.type != "cpu" or not known or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32
