"""Which documents made a step fail: the order of data is arithmetic, so any rank can look up any sequence again.

A number that is none spreads over its whole sequence, since attention multiplies it by zero and gets none; so the
documents of a suspect sequence are tried one by one, each alone, before one is named. Nothing here touches the weights;
gradients are spoilt already, and the run ends.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune.loss import position_weights
from finetune.pack import Placed
from jam.errors import RunError

if TYPE_CHECKING:
    from finetune.loop import Trainer

LISTED = 4  # sequences that are looked into, and documents that are named


def suspect_rows(found: Tensor) -> Tensor:
    """bool [B]: rows of losses [2, B, T] with one that is not finite."""
    return ~torch.isfinite(found.detach()).all(0).all(-1)


def not_finite(trainer: "Trainer", what: str, rows: Tensor | None) -> RunError:
    """The error of a step whose loss or gradient is not finite.

    Args:
        rows: bool [B], this rank's sequences with such a loss; None for a gradient: all are tried. Every rank must
            call this, and every rank gets the same message.
    """
    size, world = trainer.recipe.train.global_batch_size, trainer.accelerator.num_processes
    flags = torch.zeros(size, dtype=torch.int64, device=trainer.accelerator.device)
    if rows is not None:
        flags[trainer.accelerator.process_index :: world] = rows.to(flags)
        flags = trainer.accelerator.reduce(flags, "sum")
    numbers = [trainer.step * size + row for row in (flags.nonzero()[:, 0].tolist() or range(size))]
    named, skips = _documents(trainer, numbers, backward=rows is None)
    rate = trainer.recipe.optim.lr
    weights = f"lower optim.lr ({rate:.1g}) or set train.precision: fp32"
    if not named or (rows is not None and bool(flags.all()) and size > 1):
        blame = f"in {int(flags.sum()) or size} of its {size} sequences, so the weights are to blame, not a document"
        todo = f"{weights} (resume_allow: [optim, train.precision]); if it comes back, remove the newest checkpoint too"
    else:
        blame = f"of {', '.join(named)}"
        keys = sorted(skips)
        leave = ", ".join(f"{key}.skip: {sorted(skips[key])}" for key in keys)
        todo = (
            f"look at it, leave it out ({leave}; resume_allow: [{', '.join(f'{key}.skip' for key in keys)}]), or "
            f"{weights} (resume_allow: [optim, train.precision])"
        )
    return RunError(
        f"step {trainer.step + 1}: {what}, {blame}; it must be finite, and the step was not taken. The last checkpoint "
        f"stays, but the same command would meet the same step again: {todo}"
    )


def _documents(trainer: "Trainer", numbers: list[int], backward: bool) -> tuple[list[str], dict[str, set[int]]]:
    """Names of the documents that fail alone, and their numbers by key of the recipe; empty where none does."""
    named: dict[str, None] = {}
    skips: dict[str, set[int]] = {}
    for number in numbers if backward else numbers[:LISTED]:
        owner, sequence = trainer.plan.sequence(number)
        source = trainer.plan.sources[owner].source
        for placed in sequence if trainer.whole else ():
            if len(named) < LISTED and _fails(trainer, owner, placed, backward):
                where = source.where(placed.document)
                key = f"data.mix.{source.name}"
                named[f"{key} document {placed.document}{f' ({where})' if where else ''}"] = None
                skips.setdefault(key, set()).add(placed.document)
    return list(named), skips


def _fails(trainer: "Trainer", owner: int, placed: Placed, backward: bool) -> bool:
    """Whether a document alone has a loss, or a gradient, that is not finite."""
    batch = trainer.lay_out([[placed]], [owner])
    network = trainer.accelerator.unwrap_model(trainer.model)
    with torch.set_grad_enabled(backward), trainer.accelerator.autocast():
        found = network(batch)
        if not backward:
            return bool(suspect_rows(found).any())
        for parameter in network.parameters():
            parameter.grad = None
        scales = found.new_tensor([1.0, trainer.recipe.loss.z])[:, None, None]
        terms = (found * position_weights(batch, trainer.recipe.loss) * scales).sum()
    if not terms.requires_grad:
        return False
    terms.backward()
    grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return not all(bool(torch.isfinite(grad).all()) for grad in grads)
