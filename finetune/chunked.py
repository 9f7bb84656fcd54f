"""Cross-entropy under one head, some rows at a time: the scores of a large vocabulary never stand whole in memory.

Neither forward nor backward holds more than ``chunk`` rows of scores; backward makes them again, one more product of
the head (Wijmans et al., arXiv 2411.09009, save the same memory by a kernel of their own). Beside the nats a row's
logsumexp comes back, with its gradient: z-loss is a function of it.

Shapes: N rows, D model width, V vocabulary, K the head's own ids, C rows of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def plain_nats(scores_NK: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Nats and logsumexp of every row, both [N], from scores that stand whole; at least float32, and float64 stays."""
    scores_NK = scores_NK.to(torch.promote_types(scores_NK.dtype, torch.float32))
    nats_N = F.cross_entropy(scores_NK, targets_N, reduction="none")  # faster on a CPU than from log Z
    return nats_N, nats_N + scores_NK.gather(1, targets_N[:, None])[:, 0]


def chunked_nats(
    x_ND: Tensor, weight_VD: Tensor, slices: list[slice], targets_N: Tensor, cap: float | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """:func:`plain_nats` of ``x @ weight.T`` on the rows that ``slices`` name, ``chunk`` rows of ``x`` at a time.

    Args:
        targets_N: int64, where a row's label stands among the head's own ids.
        cap: scores are ``cap * tanh(score / cap)`` (Gemma2).
    """
    return _ChunkedNats.apply(x_ND, weight_VD, slices, targets_N, cap, chunk)


class _ChunkedNats(torch.autograd.Function):
    """Products are of autocast's dtype where it is on, everything after them of float32 or better."""

    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        slices: list[slice],
        targets_N: Tensor,
        cap: float | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        kind = x_ND.device.type
        casts = torch.is_autocast_enabled(kind) and x_ND.dtype != torch.float64  # which autocast leaves alone
        ctx.dtype = torch.get_autocast_dtype(kind) if casts else torch.promote_types(x_ND.dtype, weight_VD.dtype)
        ctx.settings = slices, cap, chunk
        precise = torch.promote_types(x_ND.dtype, torch.float32)
        nats_N, log_z_N = (torch.empty(len(x_ND), dtype=precise, device=x_ND.device) for _ in range(2))
        with torch.autocast(kind, enabled=False):
            parts = [weight_VD[part].to(ctx.dtype) for part in slices]
            for at, scores_CK in _chunks(x_ND.to(ctx.dtype), parts, cap, chunk, precise):
                nats_N[at], log_z_N[at] = plain_nats(scores_CK, targets_N[at])
        ctx.save_for_backward(x_ND, weight_VD, targets_N, log_z_N)
        return nats_N, log_z_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, nats_N: Tensor, log_z_N: Tensor) -> tuple[Tensor | None, ...]:
        """The arguments are gradients; a score's own is ``softmax * (nats + log_z)``, less ``nats`` at the target."""
        x_ND, weight_VD, targets_N, row_log_z_N = ctx.saved_tensors
        slices, cap, chunk = ctx.settings
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_x = torch.zeros_like(x_ND) if wants_x else None
        grad_weight = torch.zeros_like(weight_VD) if wants_weight else None
        with torch.autocast(x_ND.device.type, enabled=False):
            x_ND = x_ND.to(ctx.dtype)
            parts = [weight_VD[part].to(ctx.dtype) for part in slices]
            for at, scores_CK in _chunks(x_ND, parts, cap, chunk, row_log_z_N.dtype):
                slope_CK = None if cap is None else 1 - (scores_CK / cap).square_()
                grad_CK = scores_CK.sub_(row_log_z_N[at, None]).exp_().mul_((nats_N[at] + log_z_N[at])[:, None])
                grad_CK.scatter_add_(1, targets_N[at, None], -nats_N[at, None])
                if slope_CK is not None:
                    grad_CK.mul_(slope_CK)
                grad_CK, done = grad_CK.to(ctx.dtype), 0
                for part, rows_KD in zip(slices, parts, strict=True):
                    own = grad_CK[:, done : (done := done + len(rows_KD))]
                    if grad_x is not None:
                        grad_x[at] += own @ rows_KD
                    if grad_weight is not None:
                        _add_product(grad_weight[part], own.T, x_ND[at])
        return grad_x, grad_weight, None, None, None, None


def _chunks(
    x_ND: Tensor, parts: list[Tensor], cap: float | None, chunk: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    """Rows and their scores [C, K], which the caller may overwrite: one buffer serves every chunk."""
    buffer_CK = x_ND.new_empty((min(chunk, len(x_ND)), sum(map(len, parts))), dtype=dtype)
    for start in range(0, len(x_ND), chunk):
        at = slice(start, min(start + chunk, len(x_ND)))
        scores_CK, done = buffer_CK[: at.stop - at.start], 0
        for rows_KD in parts:
            scores_CK[:, done : (done := done + len(rows_KD))] = x_ND[at] @ rows_KD.T
        if cap is not None:
            scores_CK.div_(cap).tanh_().mul_(cap)
        yield at, scores_CK


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out += left @ right``, without a product beside it where the types allow."""
    if out.dtype == left.dtype:
        out.addmm_(left, right)
    else:
        out += left @ right
