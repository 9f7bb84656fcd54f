"""Optimizer and learning rate of a run.

AdamW for everything, or Muon (Jordan et al., 2024, as ``torch.optim.Muon``) for the matrices inside the network and
AdamW for tables, heads and vectors. Muon's rate is scaled to AdamW's update size (Moonlight, arXiv 2502.16982,
section 2.2), so that one ``lr``, one schedule and one decay serve both.
"""

import math
import re
from collections.abc import Sequence

import torch
from torch import nn

from finetune.recipe import OptimSection
from jam.errors import RunError


def learning_rate(optim: OptimSection, step: int, steps: int) -> float:
    """Rate of step ``step`` (0-based) of ``steps``: linear warmup, then the schedule down to ``final_lr_ratio``."""
    warmup = optim.warmup if isinstance(optim.warmup, int) else round(optim.warmup * steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - warmup)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * share)), "linear": 1 - share, "constant": 1.0}[optim.schedule]
    return optim.lr * (optim.final_lr_ratio + (1 - optim.final_lr_ratio) * shape)


class MuonWithAdamW(torch.optim.Optimizer):
    """``torch.optim.Muon`` and ``torch.optim.AdamW`` as one optimizer: one list of groups, one state.

    Sharing both lets schedules, accelerate and checkpoints treat it like any other optimizer.
    """

    def __init__(self, matrices: list[dict], others: list[dict], optim: OptimSection):
        muon = torch.optim.Muon(matrices, lr=optim.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        parts = [(muon, "muon")]
        if others:  # torch refuses an empty list; a recipe's groups may freeze all of them
            parts.append((torch.optim.AdamW(others, lr=optim.lr, betas=optim.betas, eps=optim.eps), "adamw"))
        self.parts = parts
        super().__init__([{**group, "part": name} for part, name in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        for part, name in self.parts:
            part.param_groups = [group for group in self.param_groups if group["part"] == name]
            part.state = self.state

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)  # makes new groups and a new state
        self._share()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for part, _ in self.parts:
            part.step()


def tables(model: nn.Module) -> set[int]:
    """Ids of the parameters that are indexed by token or position: tables, and heads that are not tied to one."""
    owners = (m for name, m in model.named_modules() if isinstance(m, nn.Embedding) or name.endswith("lm_head"))
    found = {id(parameter) for owner in owners for parameter in owner.parameters(recurse=False)}
    # under an adapter that trains rows (finetune.lora) a table or head lies one module deeper
    rows = (parameter for name, parameter in model.named_parameters() if ".token_adapter." in name)
    return found | {id(parameter) for parameter in rows}


def _learn_rows(name: str, parameter: nn.Parameter, rows: Sequence[tuple[int, int]], is_table: bool) -> None:
    """Only these rows get a gradient: under Adam, and without decay, the others keep their bits."""
    last = max(stop for _, stop in rows)
    if not is_table or last > len(parameter):
        shape = list(parameter.shape)
        raise RunError(f"optim.groups: rows up to {last} of {name}, which is {shape}; name rows of a table or a head")
    learns = torch.zeros(len(parameter), 1)
    for first, stop in rows:
        learns[first:stop] = 1
    parameter.register_hook(lambda gradient: gradient * learns.to(gradient))


def build_optimizer(model: nn.Module, optim: OptimSection, adapters: bool = False) -> torch.optim.Optimizer:
    """One group per (rate factor, decay); factor 0 freezes, vectors and chosen rows are not decayed.

    Args:
        adapters: what is frozen stays so, and patterns speak of the rest.

    Raises:
        RunError: a pattern matches no parameter, nothing is left to train, or rows are named of what is no table.
    """
    unmatched = {group.match for group in optim.groups}
    by_id = tables(model)
    matrices: dict[tuple[float, float], list[nn.Parameter]] = {}
    others: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if adapters and not parameter.requires_grad:
            continue
        rule = next((group for group in optim.groups if re.search(group.match, name)), None)
        unmatched -= {group.match for group in optim.groups if re.search(group.match, name)}
        factor = rule.lr_mul if rule else 1.0
        parameter.requires_grad_(factor > 0)
        if factor > 0:
            chosen = rule.rows if rule else None
            if chosen is not None:
                _learn_rows(name, parameter, chosen, id(parameter) in by_id)
            is_rows = chosen is not None or ".token_adapter." in name
            decay = optim.weight_decay if parameter.dim() >= 2 and not is_rows else 0.0
            inner = optim.name == "muon" and parameter.dim() == 2 and id(parameter) not in by_id
            (matrices if inner else others).setdefault((factor, decay), []).append(parameter)
    if unmatched:
        raise RunError(f"optim.groups: {sorted(unmatched)} match no parameter of this model; mend or remove them")
    if not matrices and not others:
        raise RunError("optim.groups freeze every parameter; leave something to train")
    by_matrix, by_other = (
        [{"params": p, "factor": f, "weight_decay": decay} for (f, decay), p in groups.items()]
        for groups in (matrices, others)
    )
    if by_matrix:
        return MuonWithAdamW(by_matrix, by_other, optim)
    return torch.optim.AdamW(by_other, lr=optim.lr, betas=optim.betas, eps=optim.eps)
