"""Attention masks and positions in the forms that every model here accepts.

A caller gives a 2D mask of real tokens or a 4D bool mask of who may attend to whom. Packed documents are said by a 4D
mask and positions, never guessed from jumps in positions. Shapes: B batch, T query tokens, S key slots.
"""

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig

from jam.models.families import FAMILIES
from jam.models.traits import windows_of


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


def masks_for(
    config: PreTrainedConfig, mask: Tensor | None, dtype: torch.dtype, cache: Cache | None, length: int
) -> Tensor | dict[str, Tensor] | None:
    """``mask_for`` a whole network of one of transformers' own classes, under the sliding windows of its layers.

    transformers hands a 4D mask to every layer as it is, windows or not. One mask where all layers see equally far,
    else one by kind of layer, as those classes take them. The cache must keep what is out of the window
    (``cache_for``).
    """
    spans = _windows(config)
    if mask is None or mask.ndim != 4 or mask.dtype != torch.bool or spans == {None}:
        return mask_for(config, mask, dtype, cache, length)
    made = {
        "full_attention" if span is None else "sliding_attention": mask_for(
            config, mask if span is None else windowed(mask, span), dtype, cache, length
        )
        for span in spans
    }
    return made if len(made) > 1 else next(iter(made.values()))


def cache_for(config: PreTrainedConfig) -> DynamicCache:
    """A new growing cache. transformers' own for a network with windows drops what is out of them, slot by slot, while
    our masks count the slots that a row sees: there everything is kept."""
    return DynamicCache(config=config) if _windows(config) == {None} else DynamicCache()


def _windows(config: PreTrainedConfig) -> set[int | None]:
    return set(windows_of(config)) if config.model_type in FAMILIES else {None}


def windowed(mask: Tensor | None, window: int) -> Tensor | None:
    """A 4D bool mask that leaves each query the last ``window`` slots that it sees, its own among them; other forms go
    through.

    Slots that a query does not see have no place in its sequence and are not counted: a guidance row reads its prefix
    and its image as neighbours, whatever the reply wrote between them (``jam.decode.slots``).
    """
    if mask is None or mask.ndim != 4 or mask.dtype != torch.bool:
        return mask
    from_here = mask.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)  # slots that the query sees from this one on
    return mask & (from_here <= window)
