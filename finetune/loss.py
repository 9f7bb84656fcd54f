"""The loss: weighted cross-entropy under one head a position, as sums that add up over micro-batches and ranks.

L = sum(w * CE) / sum(w), numerator and denominator each summed over all micro-batches and ranks before the division, so
that 8 micro-batches of 1 equal 1 of 8 (but for ``own_codes``, drawn anew in each). Shapes: B batch, T tokens, V
vocabulary, N rows of one head, K its own ids.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.chunked import chunked_nats, plain_nats
from finetune.order.pack import Batch
from finetune.recipe import LossSection
from jam.errors import RunError
from jam.models.cross import JamCrossForCausalLM
from jam.models.families import FAMILIES
from jam.models.load import Bundle, Softmax
from jam.models.masks import masks_for
from jam.models.packed import DOCUMENTS, NO_MASK, Documents
from jam.models.span_head import owned_slices, span_scores
from jam.models.tower import cap_of, capped
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD

SCORES = 2**26  # of a chunk, where the recipe leaves that to us: a quarter of a GB in float32


class TokenLoss(nn.Module):
    """Nats of every token that is learnt: the model as training calls it, so that what wraps it wraps head and loss.

    Beside the nats go the squares of log Z, the softmax's normaliser, whose mean z-loss holds down (PaLM, arXiv
    2204.02311, section 5; Chameleon, arXiv 2405.09818, section 2.3).

    Of [B, T, V] scores a position needs those of its own head, and only where something is predicted. Each head is
    evaluated on these rows and its own ids alone (``benchmarks/train_step.py`` has what that is worth). The result is
    that of :meth:`Bundle.logits` under :func:`cross_entropy`, which is what runs for one softmax over all ids and for
    heads that are not a plain matrix.

    Args:
        loss: ``softmax`` and ``chunk``; ``z`` above 0 asks for the squares.
        own_codes: share of sequences that, in training, read some of their image codes as the model itself draws them.

    Raises:
        RunError: one softmax asked of two heads, which share no scale; ``own_codes`` without :attr:`narrow`.
    """

    def __init__(self, bundle: Bundle, loss: LossSection, own_codes: float = 0.0):
        super().__init__()
        self.model, self.bundle, self.own_codes = bundle.model, bundle, own_codes
        self.softmax: Softmax = loss.softmax
        self.chunk, self.z = loss.chunk, loss.z > 0
        softmax, config = loss.softmax, bundle.model.config
        self.cross = isinstance(bundle.model, JamCrossForCausalLM)
        if softmax == "joint" and self.cross and config.tables == "separate":
            raise RunError(
                "loss.softmax: joint asks for one softmax, this model has two heads that share no scale; "
                "use restricted, or a model with one table"
            )
        head = bundle.model.get_output_embeddings()
        inner = getattr(head, "original_module", head)  # under an adapter of some rows, which has a weight as well
        plain = config.model_type in FAMILIES and type(inner) is nn.Linear and inner.bias is None
        self.narrow = softmax == "restricted" and (self.cross or plain)
        if own_codes and not self.narrow:
            raise RunError("objective.own_codes needs loss.softmax: restricted and plain heads; set it to 0")
        self.slices = {kind: owned_slices(bundle.vocabulary, kind) for kind in (TEXT_HEAD, IMAGE_HEAD)}
        local = torch.full((2, config.vocab_size), -1)  # where an id stands among its head's own; -1 is foreign
        for kind, parts in self.slices.items():
            own = torch.cat([torch.arange(part.start, part.stop) for part in parts])
            local[kind, own] = torch.arange(len(own))
        self.register_buffer("local", local, persistent=False)
        self.register_buffer("image_ids", own, persistent=False)  # of the image head, the last of the two

    def forward(self, batch: Batch) -> Tensor:
        """Float [2, B, T]: nats and, if z-loss asks for them, squares of log Z; 0 where nothing is learnt."""
        batch = batch.learnt()
        if self.own_codes and self.training:
            batch = self.with_own_codes(batch)
        if not self.narrow:
            seen = self.seen(batch)
            logits_BTV = self.bundle.logits(batch.ids, batch.head_ids, softmax=self.softmax, **seen)[0]
            nats_BT = cross_entropy(logits_BTV, batch)
            squares_BT = log_z_squared(logits_BTV, batch) if self.z else torch.zeros_like(nats_BT)
            return torch.stack([nats_BT, squares_BT])
        states = self._states(batch)
        heads, labels = batch.head_ids.flatten(), batch.labels.flatten()
        found = torch.zeros((2, *labels.shape), dtype=_precise(states[0]), device=labels.device)
        for kind in self.slices:  # also without rows, so that every step touches every parameter
            at = ((labels >= 0) & (heads == kind)).nonzero()[:, 0]
            nats_N, log_z_N = self._nats(kind, [state[at] for state in states], self.local[kind, labels[at]])
            squares_N = log_z_N.square() if self.z else torch.zeros_like(nats_N)
            found = found.index_copy(1, at, torch.stack([nats_N, squares_N]))
        return found.view(2, *batch.labels.shape)

    @torch.no_grad()
    def with_own_codes(self, batch: Batch) -> Batch:
        """The same with some image codes read as the model draws them after what the batch reads; labels stay.

        A share ``own_codes`` of rows draws a rate from U(0, 1) each. A model that has only read right codes is lost at
        its own first wrong one: scheduled sampling (Bengio et al., arXiv 1506.03099) in two passes instead of one a
        token (Mihaylova and Martins, arXiv 1906.07651). Every rank makes the first pass, rows to change or not, so that
        weights that are gathered for it are gathered everywhere.
        """
        span = self.bundle.vocabulary.image_span
        if span is None:
            return batch
        next_ids = batch.labels[:, :-1]  # ids[:, 1:] as they are right
        codes = (next_ids >= span.start) & (next_ids < span.stop) & (batch.head_ids[:, :-1] == IMAGE_HEAD)
        rows = len(codes)
        rate = torch.rand(rows, 1, device=codes.device) * (torch.rand(rows, 1, device=codes.device) < self.own_codes)
        hit = codes & (torch.rand(codes.shape, device=codes.device) < rate)
        at = F.pad(hit, (0, 1)).flatten().nonzero()[:, 0]
        scores_NK = self._head(IMAGE_HEAD, [state[at] for state in self._states(batch)]).float()
        # scores that are not finite are for the loss of the second pass to report
        drawn = self.image_ids[torch.multinomial(scores_NK.softmax(-1).nan_to_num(1.0), 1)[:, 0]]
        ids = batch.ids.clone()
        is_code = (drawn >= span.start) & (drawn < span.stop)  # the image head also knows the closing control
        ids.view(-1)[at[is_code] + 1] = drawn[is_code]
        torch.clear_autocast_cache()  # before torch 2.10 it kept the weights' casts of this pass, without history
        return replace(batch, ids=ids)

    def seen(self, batch: Batch) -> dict[str, Any]:
        """Positions, and who attends to whom in the form that the network's attention asks for."""
        if self.model.config._attn_implementation != DOCUMENTS:
            return {"position_ids": batch.positions, "attention_mask": batch.mask}
        documents = Documents.of(batch.owners, batch.ids.device)
        return {"position_ids": batch.positions, "attention_mask": NO_MASK, "documents": documents}

    def _states(self, batch: Batch) -> list[Tensor]:
        """Final states [B * T, D] as the heads read them: one for a single-table model, one a tower for two."""
        seen = self.seen(batch)
        if self.cross:
            states = self.model.states(batch.ids, **seen)
        else:
            length = batch.ids.shape[1]
            seen["attention_mask"] = masks_for(
                self.model.config, seen["attention_mask"], self.model.dtype, None, length
            )
            states = [self.model.base_model(batch.ids, use_cache=False, **seen).last_hidden_state]
        return [state.flatten(0, 1) for state in states]

    def _head(self, kind: int, states: list[Tensor]) -> Tensor:
        """Scores [N, K] of one head over its own ids."""
        if self.cross:
            return self.model.head(kind, *states)
        scores_NK = span_scores(states[0], self.model.get_output_embeddings().weight, self.slices[kind])
        return capped(self.model.config, scores_NK)

    def _nats(self, kind: int, states: list[Tensor], targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Nats and log Z of one head's rows, both [N]."""
        chunk = self.chunk
        if chunk == "auto":
            chunk = max(1, SCORES // sum(part.stop - part.start for part in self.slices[kind]))
        if chunk is None or len(targets_N) <= chunk:  # one chunk: nothing to make twice
            return plain_nats(self._head(kind, states), targets_N)
        if self.cross:
            read = partial(chunked_nats, targets_N=targets_N, cap=self.model.cap(kind), chunk=chunk)
            return self.model.head(kind, *states, read=read)
        weight, cap = self.model.get_output_embeddings().weight, cap_of(self.model.config)
        return chunked_nats(states[0], weight, self.slices[kind], targets_N, cap, chunk)


def position_weights(batch: Batch, settings: LossSection) -> Tensor:
    """float32 [B, T]: the document's weight times its modality's."""
    by_head = torch.tensor([settings.text, settings.image], device=batch.weights.device)
    return batch.weights * by_head[batch.head_ids]


def cross_entropy(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """Nats per position [B, T], at least float32, 0 where there is no label."""
    logits_NV = logits_BTV.flatten(0, 1)
    logits_NV = logits_NV.to(_precise(logits_NV))
    flat = F.cross_entropy(logits_NV, batch.labels.flatten(), ignore_index=-1, reduction="none")
    return flat.view_as(batch.labels)


def log_z_squared(logits_BTV: Tensor, batch: Batch) -> Tensor:
    """float32 [B, T], 0 where there is no label; Z is the sum of exponentials."""
    return logits_BTV.to(_precise(logits_BTV)).logsumexp(-1).square() * (batch.labels >= 0)


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


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
