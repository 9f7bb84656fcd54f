"""How often a run will read each source, said before it begins; a source that teaches nothing is refused.

How many sequences of a source a run reads is arithmetic; how many an epoch has is seen in its first window (documents
that the run packs first anyway), of a small source in its first epochs: an estimate, since CM3 grows documents
otherwise in every epoch.
"""

from collections.abc import Callable

import numpy as np

from finetune.order.pack import Sequence
from finetune.order.plan import BLOCK, WINDOW, Plan
from finetune.recipe import FinetuneRecipe, LossSection
from jam.errors import DataError

EPOCHS = 8  # of a small source that are looked at, at most
REPEATS = 4  # epochs that teach about as much as new data would (arXiv 2305.16264)


def sequences_of(plan: Plan, total: int) -> list[int]:
    """How many of the first ``total`` sequences each source gives."""
    whole, rest = divmod(total, BLOCK)
    owners = [plan.owner(whole * BLOCK + slot)[0] for slot in range(rest)]
    return [whole * quota + owners.count(number) for number, quota in enumerate(plan.quota)]


def _learnt(window: list[Sequence], loss: LossSection) -> bool:
    by_head = np.array([loss.text, loss.image])
    return any(
        (placed.tokens.weights[1:] * by_head[placed.tokens.heads[1:]] > 0).any() for part in window for placed in part
    )


def check_supply(plan: Plan, recipe: FinetuneRecipe, steps: int, tell: Callable[[str], None]) -> None:
    """Tells of every source that is read more than ``REPEATS`` times.

    Raises:
        DataError: a source of which no token has a loss, or that the run reads more often than its ``max_epochs``.
    """
    counts = sequences_of(plan, steps * recipe.train.global_batch_size)
    for packed, count in zip(plan.sources, counts, strict=True):
        source, limit = packed.source, recipe.data.mix[packed.source.name].max_epochs
        window = packed.window(0)
        if window and not _learnt(window, recipe.loss):
            raise DataError(
                f"data.mix.{source.name}: none of its tokens has a loss (loss.text {recipe.loss.text:g}, loss.image "
                f"{recipe.loss.image:g}, its own {source.loss_text:g} and {source.loss_image:g}); raise a weight or "
                "remove the source"
            )
        few = range(1 + min(EPOCHS - 1, WINDOW // source.size))  # those of a small source differ by a sequence or two
        per_epoch = float(np.mean([len(packed.window(n)) for n in few])) * source.size / min(source.size, WINDOW)
        epochs = count / max(per_epoch, 1.0)
        if limit is not None and epochs > limit:
            raise DataError(
                f"data.mix.{source.name}: the run reads {source.size:,} documents about {epochs:.1f} times ({count:,} "
                f"sequences, {per_epoch:,.0f} to an epoch), max_epochs is {limit:g}; lower its weight or the run's "
                "length, or raise max_epochs"
            )
        if epochs > REPEATS:
            tell(f"{source.name}: about {epochs:.1f} epochs of {source.size:,} documents will be read")
