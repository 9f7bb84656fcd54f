"""Attention masks and positions in the forms that every model here accepts.

A caller gives a 2D mask of real tokens or a 4D bool mask of who may attend to whom. Packed documents are said by a 4D
mask and positions, never guessed from jumps in positions. Shapes: B batch, T query tokens, S key slots.
"""

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig


def default_positions(ids_BT: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
    """int64 [B, T] from 0: counted along a 2D mask (left padding does not count), else on from the cache's length.

    Raises:
        ValueError: a 4D mask; positions inside packed documents cannot be read off it.
    """
    length = ids_BT.shape[1]
    if attention_mask is not None and attention_mask.ndim == 4:
        raise ValueError("a 4D attention mask says nothing about positions; pass position_ids with it")
    if attention_mask is not None:
        return (attention_mask.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
    past = 0 if cache is None else cache.get_seq_length()
    return (torch.arange(length, device=ids_BT.device) + past).expand_as(ids_BT)


def mask_for(
    config: PreTrainedConfig, mask: Tensor | None, dtype: torch.dtype, cache: Cache | None, length: int
) -> Tensor | None:
    """The mask as the attention implementation of ``config`` reads it; 2D masks and None go through.

    A 4D bool mask is widened by hidden slots to the size of a preallocated cache, and for eager attention, which adds
    masks to scores, turned into 0 and a lowest finite value.

    Args:
        length: T of this call.
    """
    if mask is None or mask.ndim != 4 or mask.dtype != torch.bool:
        return mask
    if cache is not None:
        slots, _ = cache.get_mask_sizes(length, 0)
        mask = torch.nn.functional.pad(mask, (0, slots - mask.shape[-1]), value=False)
    if config._attn_implementation != "eager":
        return mask
    # eager attention takes its softmax in float32: float64's lowest number would round to -inf there
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)


def windowed(mask: Tensor | None, window: int) -> Tensor | None:
    """A 4D bool mask that hides what lies ``window`` slots or more before the query, too; other forms go through.

    The last query is in the last slot, and a document lies in one piece.
    """
    if mask is None or mask.ndim != 4 or mask.dtype != torch.bool:
        return mask
    queries, slots = mask.shape[-2:]
    slot = torch.arange(slots, device=mask.device)
    return mask & (slot[-queries:, None] - slot < window)
