"""Rows of a table or head that begin anew: image codes of a model whose own rows of them are of no use.

Runs once, before the first step; a resumed run takes its checkpoint's rows. Rows that a merge adds begin as it says
(``merge.extend``).
"""

import math
import re

import torch
from torch import Tensor, nn

from finetune.recipe import OptimSection
from jam.errors import RunError


@torch.no_grad()
def fresh_rows(model: nn.Module, optim: OptimSection, seed: int) -> None:
    """Sets the rows of every group that has ``fresh``, in the order of the parameters, under ``seed`` alone.

    Raises:
        RunError: rows of what is no matrix of that many, or no other rows that a mean could be taken of.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        rule = next((group for group in optim.groups if re.search(group.match, name)), None)
        if rule is None or rule.fresh is None:
            continue
        if parameter.dim() != 2 or max(stop for _, stop in rule.rows) > len(parameter):
            raise RunError(
                f"optim.groups: fresh rows {[list(pair) for pair in rule.rows]} of {name}, which is "
                f"{list(parameter.shape)}; name rows of a table or a head"
            )
        new = torch.zeros(len(parameter), dtype=torch.bool)
        for first, stop in rule.rows:
            new[first:stop] = True
        if new.all():
            raise RunError(f"optim.groups: all rows of {name} begin anew, with none to go by; name fewer rows")
        parameter[new] = _rows(rule.fresh, parameter[~new].float(), int(new.sum()), generator).to(parameter)


def _rows(kind: str, old: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """float32 [count, width]; ``old`` are the other rows."""
    width = old.shape[1]
    if kind == "zero":
        return torch.zeros(count, width)
    mean = old.double().mean(0)
    if kind == "mean":
        return mean.float().expand(count, -1)
    noise = torch.randn(count, width, generator=generator)
    if kind == "he":  # He et al., arXiv 1502.01852: variance 2 / fan-in
        return noise * math.sqrt(2 / width)
    return (mean + noise * old.double().std(0, correction=0)).float()
