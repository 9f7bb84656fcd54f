"""The loss: weighted cross-entropy under one head a position, as sums that add up over micro-batches and ranks.

L = sum(w * CE) / sum(w), numerator and denominator each summed over all micro-batches and ranks before the division, so
that 8 micro-batches of 1 equal 1 of 8. Shapes: B batch, T tokens, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from finetune.pack import Batch
from finetune.recipe import LossSection
from jam.tokens.render import IMAGE_HEAD


def position_weights(batch: Batch, settings: LossSection) -> Tensor:
    """float32 [B, T]: the document's weight times its modality's."""
    by_head = torch.tensor([settings.text, settings.image], device=batch.weights.device)
    return batch.weights * by_head[batch.head_ids]


def cross_entropy(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """float32 [B, T] nats per position, 0 where there is no label."""
    flat = F.cross_entropy(logits_BTV.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=-1, reduction="none")
    return flat.view_as(batch.labels)


def sums(nats_BT: Tensor, batch: Batch, sources: int) -> Tensor:
    """Unweighted sums for the log: rows text head, image head, then each source; columns nats, count.

    Returns float64 [2 + sources, 2]. Only positions that carry loss are counted.
    """
    counted = (batch.weights > 0) & (batch.labels >= 0)
    image = batch.head_ids == IMAGE_HEAD
    rows = [counted & ~image, counted & image]
    rows += [counted & (batch.sources == number)[:, None] for number in range(sources)]
    nats = nats_BT.detach().double()
    return torch.stack([torch.stack([(nats * row).sum(), row.sum().double()]) for row in rows])
