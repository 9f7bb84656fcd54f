"""Which documents made a step fail: the order of data is arithmetic, so any rank can look up any sequence again.

A number that is none spreads over its whole sequence, since attention multiplies it by zero and gets none; so the
documents of a suspect sequence are tried one by one, each alone, before one is named. Every rank tries the same ones at
the same time, so that shards are gathered for them as in training. Nothing here touches the weights; gradients are
spoilt already, and the run ends.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from finetune.data.sources import Source
from finetune.loss import position_weights
from finetune.order.pack import Sequence
from jam.errors import RunError

if TYPE_CHECKING:
    from finetune.loop import Trainer

LISTED = 4  # sequences whose documents are tried, and documents that are named


def suspect_rows(found: Tensor) -> Tensor:
    """bool [B]: rows of losses [2, B, T] with one that is not finite."""
    return ~torch.isfinite(found.detach()).all(0).all(-1)


def not_finite(trainer: "Trainer", what: str, rows: Tensor | None) -> RunError:
    """The error of a step whose loss or gradient is not finite.

    Args:
        rows: bool [B], this rank's sequences with such a loss; None for a gradient: all are tried. Every rank must
            call this, and every rank gets the same message.
    """
    size, rate = trainer.recipe.train.global_batch_size, trainer.recipe.optim.lr
    suspects = _by_gradient(trainer) if rows is None else _by_loss(trainer, rows)
    tried, failed = _documents(trainer, suspects[:LISTED], backward=rows is None)
    calmer = f"lower optim.lr ({rate:.1g}) or set train.precision: fp32 (resume_allow: [optim, train.precision])"
    if len(suspects) == size and len(failed) == tried > 1:
        blame = f"in all its {size} sequences, so the weights are to blame and no document"
        todo = f"{calmer}; if it comes back, remove the newest checkpoint too"
    elif failed:
        failed = list(dict.fromkeys(failed))  # a small source repeats its documents
        places = (source.where(number) for source, number in failed)
        named = [
            f"data.mix.{source.name} document {number}" + (f" ({place})" if place else "")
            for (source, number), place in zip(failed, places, strict=True)
        ]
        skips = {f"data.mix.{source.name}.skip": set() for source, _ in failed}
        for source, number in failed:
            skips[f"data.mix.{source.name}.skip"] |= {number, *source.skip}
        leave = ", ".join(f"{key}: {sorted(numbers)}" for key, numbers in skips.items())
        blame = f"of {', '.join(named[:LISTED])}"
        todo = f"look at it, leave it out ({leave}; resume_allow: [{', '.join(skips)}]), or {calmer}"
    else:
        owners = sorted({trainer.plan.owner(number)[0] for number in suspects or _numbers(trainer)})
        names = ", ".join(f"data.mix.{trainer.plan.sources[owner].source.name}" for owner in owners)
        blame = f"in {len(suspects) or size} of its {size} sequences, from {names}, of which no document fails alone"
        todo = calmer
    return RunError(
        f"step {trainer.step + 1}: {what}, {blame}; it must be finite, and the step was not taken. The last checkpoint "
        f"stays, but the same command would meet the same step again: {todo}"
    )


def _numbers(trainer: "Trainer") -> range:
    size = trainer.recipe.train.global_batch_size
    return range(trainer.step * size, (trainer.step + 1) * size)


def _by_loss(trainer: "Trainer", rows: Tensor) -> list[int]:
    """Numbers of the sequences, over all ranks, whose loss was not finite."""
    numbers, accelerator = _numbers(trainer), trainer.accelerator
    flags = torch.zeros(len(numbers), dtype=torch.int64, device=accelerator.device)
    flags[accelerator.process_index :: accelerator.num_processes] = rows.to(flags)
    return [numbers[row] for row in accelerator.reduce(flags, "sum").nonzero()[:, 0].tolist()]


def _by_gradient(trainer: "Trainer") -> list[int]:
    """Numbers of the sequences whose gradient is not finite alone: micro-batches first, then theirs."""
    numbers, size, found = _numbers(trainer), trainer.recipe.train.micro_batch_size, []
    for start in range(0, len(numbers) if trainer.engine.tries else 0, size):
        part = [trainer.plan.sequence(number) for number in numbers[start : start + size]]
        if _fails(trainer, part, backward=True):
            found += [numbers[start + row] for row, one in enumerate(part) if _fails(trainer, [one], backward=True)]
    return found


def _documents(trainer: "Trainer", numbers: list[int], backward: bool) -> tuple[int, list[tuple[Source, int]]]:
    """How many documents were tried, and those that fail alone."""
    tried, failed = 0, []
    for number in numbers if trainer.engine.tries else ():
        owner, sequence = trainer.plan.sequence(number)
        source = trainer.plan.sources[owner].source
        for placed in sequence:
            tried += 1
            if _fails(trainer, [(owner, [placed])], backward):
                failed.append((source, placed.document))
    return tried, failed


def _fails(trainer: "Trainer", part: list[tuple[int, Sequence]], backward: bool) -> bool:
    """Whether sequences, each with its source, have a loss or a gradient that is not finite."""
    batch = trainer.lay_out([sequence for _, sequence in part], [owner for owner, _ in part])
    network = trainer.accelerator.unwrap_model(trainer.model)
    precision = torch.autocast(trainer.accelerator.device.type, torch.bfloat16, enabled=trainer.engine.bf16)
    for parameter in network.parameters():  # before the forward pass, which may gather other tensors in their place
        parameter.grad = None
    with torch.set_grad_enabled(backward), precision:
        found = network(batch)
        if not backward:
            return trainer.ranks.any(bool(suspect_rows(found).any()))
        scales = found.new_tensor([1.0, trainer.recipe.loss.z])[:, None, None]
        terms = (found * position_weights(batch, trainer.recipe.loss) * scales).sum()
    if not terms.requires_grad:
        return False
    terms.backward()
    grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    own = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    return trainer.ranks.any(not all(bool(torch.isfinite(grad).all()) for grad in own))
