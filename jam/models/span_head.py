"""Evaluating a head on the ids it owns, and placing the result among all ids.

What a head owns are slices of the id space (control + text, or control + image), so that its rows are views of its
weight and nothing is gathered. Shapes: B batch, T tokens, D model width, K a head's own ids, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from jam.tokens.render import TEXT_HEAD
from jam.tokens.vocabulary import Vocabulary


def owned_slices(vocabulary: Vocabulary, head: int) -> list[slice]:
    """The ids that a head may say, as slices in ascending order, neighbours joined.

    Args:
        head: TEXT_HEAD (text and control ids) or IMAGE_HEAD (image and control ids).
    """
    foreign = "image" if head == TEXT_HEAD else "text"
    slices: list[slice] = []
    for span in vocabulary.spans:
        if span.kind == foreign:
            continue
        if slices and slices[-1].stop == span.start:
            slices[-1] = slice(slices[-1].start, span.stop)
        else:
            slices.append(slice(span.start, span.stop))
    return slices


def span_scores(x_BTD: Tensor, weight_VD: Tensor, slices: list[slice]) -> Tensor:
    """``x @ weight[part].T`` of every slice, side by side: [..., K], differentiable once."""
    if torch.is_grad_enabled() and weight_VD.requires_grad and not torch.compiler.is_compiling():
        return _SpanScores.apply(x_BTD, weight_VD, slices)
    return torch.cat([nn.functional.linear(x_BTD, weight_VD[part]) for part in slices], -1)


class _SpanScores(torch.autograd.Function):
    """The same with one gradient table for all slices.

    A slice's own gradient is as large as the whole table, mostly zeros, and autograd would add those of all slices up.
    Without rows nothing is cast and the gradient is zeros. Under autocast the products are of its dtype.
    """

    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, weight_VD: Tensor, slices: list[slice]) -> Tensor:
        kind = x_BTD.device.type
        casts = torch.is_autocast_enabled(kind) and x_BTD.dtype != torch.float64  # which autocast leaves alone
        ctx.slices, ctx.dtype, ctx.table = slices, x_BTD.dtype, (weight_VD.shape, weight_VD.dtype)
        parts = [weight_VD[part] for part in slices] if x_BTD.numel() else []
        if casts:
            dtype = torch.get_autocast_dtype(kind)
            x_BTD, parts = x_BTD.to(dtype), [part.to(dtype) for part in parts]
        ctx.save_for_backward(x_BTD, *parts)
        if not parts:
            return x_BTD.new_empty((*x_BTD.shape[:-1], sum(part.stop - part.start for part in slices)))
        return torch.cat([nn.functional.linear(x_BTD, part) for part in parts], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTK: Tensor) -> tuple[Tensor, Tensor, None]:
        x_BTD, *parts = ctx.saved_tensors
        shape, dtype = ctx.table
        grad_x, grad_VD = torch.zeros_like(x_BTD, dtype=ctx.dtype), x_BTD.new_zeros(shape, dtype=dtype)
        at = 0
        for part, rows_KD in zip(ctx.slices, parts, strict=False):  # no parts without rows
            own = grad_BTK[..., at : (at := at + part.stop - part.start)]
            grad_x += own @ rows_KD
            grad_VD[part] = own.reshape(-1, own.shape[-1]).T @ x_BTD.reshape(-1, x_BTD.shape[-1])
        return grad_x, grad_VD, None


Read = Callable[[Tensor, Tensor, list[slice]], Any]
"""What is made of states, a head's weight and slices of its rows; :func:`span_scores` is one."""


class SpanHead(nn.Linear):
    """A head without bias that can score some slices of its rows only.

    A module and not a function of the weight: sharding and offloading gather a module's weight when it is *called*.
    """

    def forward(self, x_BTD: Tensor, slices: list[slice] | None = None, read: Read = span_scores) -> Any:
        """[..., V], or with ``slices`` [..., K] in their order, or what another ``read`` makes of them."""
        if slices is None:
            return super().forward(x_BTD)
        return read(x_BTD, self.weight, slices)


def place(own_K: Tensor, slices: list[slice], size: int) -> Tensor:
    """Scores of owned ids [..., K] among all ids [..., size]; the others get the dtype's lowest finite value."""
    out = own_K.new_full((*own_K.shape[:-1], size), torch.finfo(own_K.dtype).min)
    at = 0
    for part in slices:
        width = part.stop - part.start
        out[..., part] = own_K[..., at : at + width]
        at += width
    return out
