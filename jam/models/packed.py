"""Attention inside the documents of packed rows, document by document.

A row of packed documents under a mask pays for every pair of its tokens and learns from those inside a document: twelve
captions in 1,024 positions use a twelfth. Here queries, keys and values of all rows are laid out anew by document,
documents of nearly one length side by side (:class:`Documents`), attended to causally without a mask, and laid back.
Every other part of a network works on single positions and never knows.

``set_attn_implementation(DOCUMENTS)`` puts it into any network that takes its attention from transformers' interface;
the documents go to the forward pass as ``documents=``, beside :data:`NO_MASK`. Without them it is transformers' SDPA.
The oracle is a 4D mask (``tests/models/test_packed.py``); figures: ``benchmarks/train.py``.

Shapes: B rows, T positions, N = B * T, H heads, D head width, G documents of a group, L its longest, P all of G * L.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

DOCUMENTS = "jam_documents"
SLACK = 1 / 8  # of a group's longest document, the most by which another one may be shorter
PLAIN = 384  # tokens up to which two matrix products beat PyTorch's bfloat16 kernel on a CPU, slow backwards


@dataclass(frozen=True)
class Documents:
    """Where the documents of B rows lie.

    Args:
        groups: (G, L) of each group; their tokens follow each other in ``take``.
        take: int64 [P], the position (of N) that each place of a group reads; padding reads position 0.
        back: int64 [N], the place at which each position is read.
        real: bool [P], False for padding.
    """

    groups: tuple[tuple[int, int], ...]
    take: Tensor
    back: Tensor
    real: Tensor

    @classmethod
    def of(cls, owners_BT: Tensor, device: torch.device | str = "cpu") -> "Documents":
        """Reads them off the number of each position's document, which changes where the next one begins.

        Args:
            owners_BT: integers [B, T] on the CPU.
        """
        owners = owners_BT.numpy()
        begins = np.ones(owners.shape, bool)
        begins[:, 1:] = owners[:, 1:] != owners[:, :-1]
        starts = np.flatnonzero(begins)
        lengths = np.diff(starts, append=owners.size)
        order = np.argsort(-lengths, kind="stable")
        groups, take, real, at = [], [], [], 0
        while at < len(order):
            longest = int(lengths[order[at]])
            stop = at + int((lengths[order[at:]] >= (1 - SLACK) * longest).sum())
            chosen, places = order[at:stop, None], np.arange(longest)
            inside = places < lengths[chosen]
            take.append(np.where(inside, starts[chosen] + places, 0).ravel())
            real.append(inside.ravel())
            groups.append((stop - at, longest))
            at = stop
        where, filled = np.concatenate(take), np.concatenate(real)
        back = np.empty(owners.size, np.int64)
        back[where[filled]] = np.flatnonzero(filled)
        return cls(tuple(groups), *(torch.from_numpy(array).to(device) for array in (where, back, filled)))


class _Out(torch.autograd.Function):
    """Rows [N, ...] in the order of the groups [P, ...]. Nothing is learnt at padding, so that its gradient is 0 and
    the way back is a selection as well: index_select's own backward adds row by row."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, take: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return rows.index_select(0, take)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class _Back(torch.autograd.Function):
    """The way back: [P, ...] to [N, ...]."""

    @staticmethod
    def forward(ctx: Any, places: Tensor, take: Tensor, back: Tensor, real: Tensor) -> Tensor:
        ctx.save_for_backward(take, real)
        return places.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        take, real = ctx.saved_tensors
        return grad.index_select(0, take).mul_(real[:, None, None]), None, None, None


def document_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    documents: Documents | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, T, H, D] for queries [B, H, T, D] and keys and values of H or fewer heads; transformers' attention interface.

    Args:
        documents: those of these rows; None is transformers' SDPA under ``attention_mask``.
        sliding_window: a query sees so many tokens of its document, its own among them.
        softcap: scores are capped at it (Gemma2).
    """
    if documents is None and softcap is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if documents is None:  # which SDPA refuses
        groups = query.shape[1] // key.shape[1]
        seen = _causal_mask(query.shape[2], key.shape[2], query.device) if attention_mask is None else attention_mask
        out = _plain(query, repeat_kv(key, groups), repeat_kv(value, groups), seen, dropout, scaling, softcap)
        return out.transpose(1, 2), None
    rows = (part.transpose(1, 2).flatten(0, 1) for part in (query, key, value))
    laid = [_Out.apply(part, documents.take, documents.back) for part in rows]
    sizes = [count * length for count, length in documents.groups]
    found = []
    for (count, length), *parts in zip(documents.groups, *(part.split(sizes) for part in laid), strict=True):
        q, k, v = (part.unflatten(0, (count, length)).transpose(1, 2) for part in parts)
        k, v = (repeat_kv(part, q.shape[1] // part.shape[1]) for part in (k, v))
        out = _causal(q, k, v, dropout, scaling, sliding_window, softcap)
        found.append(out.transpose(1, 2).flatten(0, 1))
    out = _Back.apply(torch.cat(found), documents.take, documents.back, documents.real)
    return out.unflatten(0, (query.shape[0], query.shape[2])), None


def _causal(
    q: Tensor, k: Tensor, v: Tensor, dropout: float, scaling: float | None, window: int | None, cap: float | None
) -> Tensor:
    """[G, H, L, D]; padding stands behind a document, where no token of it looks."""
    length = q.shape[2]
    window = None if window is None or window >= length else window
    plain = cap is not None or (q.device.type == "cpu" and q.dtype == torch.bfloat16 and length <= PLAIN)
    if not plain and window is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
    seen = _causal_mask(length, length, q.device)
    if window is not None:
        seen = seen & seen.new_ones(seen.shape).triu(1 - window)
    if not plain:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, dropout_p=dropout, scale=scaling)
    return _plain(q, k, v, seen, dropout, scaling, cap)


def _causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def _plain(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scaling: float | None, cap: float | None
) -> Tensor:
    """Two matrix products with the softmax between them; ``mask`` bool or additive."""
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    return F.dropout(weights, dropout) @ v


NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
"""Stands where transformers would make a mask of T by T positions out of none: one that it hands on as it is."""

AttentionInterface.register(DOCUMENTS, document_attention)
AttentionMaskInterface.register(DOCUMENTS, sdpa_mask)
