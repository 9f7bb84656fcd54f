"""What goes into a network's norms, token by token, and what corrects a norm over two networks side by side.

A norm that two halves share divides both by one length, y = x / length(both), where each half's own network has
x / length(half). What is left to choose is a factor for each half, once for all tokens: ``fit`` takes the one with the
least squared error over the tokens that were measured, weighed as the half's own norm gives them out. Layer norms also
take away the mean of both halves instead of the half's own; where there is a bias, an offset corrects it on average.

Shapes: B batch, T tokens of the longest document, D features, N measured tokens.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jam.errors import DataError
from jam.evaluate.loss import Progress, batches_by_length


@dataclass(frozen=True)
class Moments:
    """Of a norm's input: ``mean`` and ``square`` (mean of squares over the features), float64 [N], and the features'
    number. ``centred``: the norm takes the mean away (layer norm)."""

    mean: np.ndarray
    square: np.ndarray
    width: int
    centred: bool
    epsilon: float
    bias: bool

    def length(self) -> np.ndarray:
        """float64 [N], what the norm divides by."""
        return np.sqrt(self.square - (self.mean**2 if self.centred else 0.0) + self.epsilon)


def side_by_side(first: Moments, second: Moments) -> Moments:
    """The moments of both inputs end to end."""
    width = first.width + second.width
    mean, square = (
        (first.width * a + second.width * b) / width
        for a, b in ((first.mean, second.mean), (first.square, second.square))
    )
    return Moments(mean, square, width, first.centred, first.epsilon, first.bias)


@dataclass(frozen=True)
class Fit:
    """``factor * y + offset`` stands for the half's own norm; ``before`` and ``after`` are relative errors (root of the
    summed squares over the own norm's) with factor 1 and as fitted."""

    factor: float
    offset: float
    before: float
    after: float


def fit(own: Moments, both: Moments) -> Fit:
    """The factor (and offset, where the norm has a bias) that makes a half of a joint norm most like its own.

    With x of mean m and length s in its own norm, M and S in the joint one: own = (x - m) / s and joint = (x - M) / S,
    m and M being zero in norms that take no mean away. Sums over features and tokens follow from the moments.
    """
    scale, joint_scale = own.length(), both.length()
    if not (np.all(scale > 0) and np.any(own.square > 0)):
        raise DataError("a half's states are all zero before a norm; a trained model is required, nothing is measured")
    shift = own.mean - both.mean if own.centred else np.zeros_like(own.mean)
    variance = own.square - (own.mean**2 if own.centred else 0.0)
    cross = float(np.mean(variance / (scale * joint_scale)))
    square = float(np.mean((variance + shift**2) / joint_scale**2))
    level = float(np.mean(shift / joint_scale)) if own.bias else 0.0
    total = float(np.mean(variance / scale**2))
    factor = cross / (square - level**2)
    offset = -factor * level if own.bias else 0.0

    def error(factor: float, offset: float) -> float:
        mean = float(np.mean(shift / joint_scale))
        left = total - 2 * factor * cross + factor**2 * square + 2 * factor * offset * mean + offset**2
        return float(np.sqrt(max(0.0, left) / total))

    return Fit(factor, offset, error(1.0, 0.0), error(factor, offset))


@torch.no_grad()
def norm_inputs(
    model: PreTrainedModel,
    norms: Sequence[str],
    documents: Sequence[np.ndarray],
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> Mapping[str, Moments]:
    """Moments of what enters each of a network's norms (names of modules) while it reads documents.

    Args:
        documents: ids, int [T] each; every token of them is measured, in an order that only the lengths decide.
    """
    network, seen = model.base_model.eval(), {name: ([], []) for name in norms}
    real = torch.zeros(0)

    def record(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x_ND = inputs[0].reshape(*real.shape, -1)[real].double()  # OPT flattens them on the way
        widths[name] = x_ND.shape[-1]
        for column, values in zip(seen[name], (x_ND.mean(-1), x_ND.square().mean(-1)), strict=True):
            column.append(values.cpu().numpy())

    modules = {name: model.get_submodule(name) for name in norms}
    widths: dict[str, int] = {}
    done, overall = 0, sum(len(ids) for ids in documents)
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(partial(record, name)).remove)
        for group in batches_by_length([len(ids) for ids in documents], batch_tokens):
            longest = len(documents[group[0]])
            ids_BT = np.zeros((len(group), longest), np.int64)
            real_BT = np.zeros((len(group), longest), bool)
            for row, index in enumerate(group):
                ids_BT[row, : len(documents[index])] = documents[index]
                real_BT[row, : len(documents[index])] = True
            real = torch.from_numpy(real_BT).to(model.device)
            positions = torch.arange(longest, device=model.device).expand_as(real)
            # padding stands on the right: a causal model never reads it, so no mask is needed
            network(input_ids=torch.from_numpy(ids_BT).to(model.device), position_ids=positions, use_cache=False)
            done += int(real_BT.sum())
            if progress:
                progress(done, overall)
    return {
        name: Moments(
            *(np.concatenate(column) for column in seen[name]),
            widths[name],
            isinstance(module, nn.LayerNorm),
            float(getattr(module, "eps", None) or module.variance_epsilon),
            getattr(module, "bias", None) is not None,
        )
        for name, module in modules.items()
    }
