"""The cache of a batch: which slots each row sees, and at which position it stands.

A slot is one column of the cache, shared by all rows. Prompts are left-padded, so that every reply grows in the same
columns. Guidance (classifier-free) needs the same image without its text. A guidance row stands under each reply in the
same batch and holds the unconditional prefix (``<s><mask>``) in its last prefill slots. While its reply writes text it
is fed padding that nobody sees. At each ``<break>`` its mask is set back to the prefix and the slot of the ``<break>``,
and its positions go on from the prefix, so an image costs no second prefill:

    slot        0      1      2       3     4     5        6      7      8
    reply       <s>    a      cat     is    red   <break>  c      c      <break>
    guidance    .      <s>    <mask>  .     .     <break>  c      c      .
    position           0      1                   2        3      4

Masks are explicit, 4D, over slots, and so are positions: learned positions would otherwise count the gaps.
Nothing here samples or knows the grammar.

A reply has one lane, or several while its image is searched for with beams: ``select`` copies, reorders and drops
lanes.

Shapes: L lanes of the replies still open, B batch rows (L, or 2L with guidance, the replies' lanes first), P prompt
slots, S slots, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from jam.decode.grammar import Kind
from jam.models.heads import next_heads
from jam.models.load import Bundle
from jam.tokens.render import IMAGE_HEAD, TEXT_HEAD


class Slots:
    """One batch from its prompts to the last token of its longest reply.

    Args:
        prompts: ids of each.
        prefix: the unconditional prefix of guidance rows; None runs none.
        room: tokens of the longest reply possible.
    """

    def __init__(self, bundle: Bundle, prompts: Sequence[Sequence[int]], prefix: Sequence[int] | None, room: int):
        self.bundle, self.prefix = bundle, prefix
        self.device = bundle.model.device
        self.lanes = len(prompts)
        self.starts = [*prompts, *([] if prefix is None else [prefix] * len(prompts))]
        self.width = max(len(ids) for ids in self.starts)
        self.pad = bundle.vocabulary.controls.get("pad", bundle.vocabulary.controls["eos"])
        self.seen_BS = torch.zeros(len(self.starts), self.width + room, dtype=torch.bool)
        self.next_B = torch.tensor([len(ids) for ids in self.starts])
        for row, ids in enumerate(self.starts):
            self.seen_BS[row, self.width - len(ids) : self.width] = True
        self.filled = self.width
        self.cache = None

    def prefill(self) -> tuple[Tensor, Tensor | None]:
        """Logits after the prompts: [L, V] of the lanes, one a prompt, [L, V] of their guidance rows or None."""
        ids_BP = torch.full((len(self.starts), self.width), self.pad)
        positions_BP = torch.zeros_like(ids_BP)
        for row, ids in enumerate(self.starts):
            ids_BP[row, self.width - len(ids) :] = torch.tensor(ids)
            positions_BP[row, self.width - len(ids) :] = torch.arange(len(ids))
        # a padded slot sees itself, or its attention would be a softmax over nothing
        causal_PP = torch.ones(self.width, self.width, dtype=torch.bool).tril()
        mask_BPP = self.seen_BS[:, None, : self.width] & causal_PP | torch.eye(self.width, dtype=torch.bool)
        heads_BP = next_heads(ids_BP, self.bundle.vocabulary)
        return self._forward(ids_BP, heads_BP, mask_BPP, positions_BP)

    def feed(self, tokens: Sequence[tuple[int, Kind]]) -> tuple[Tensor, Tensor | None]:
        """Puts one token a lane into the next slot; logits as ``prefill``."""
        batch, slot = len(self.seen_BS), self.filled
        ids_B = torch.full((batch,), self.pad)
        positions_B = torch.zeros(batch, dtype=torch.int64)
        heads_B = torch.full((batch,), TEXT_HEAD)
        for lane, (token, kind) in enumerate(tokens):
            live = [lane]
            drawing = kind in (Kind.BEGIN, Kind.CODE)
            if self.prefix is not None and drawing:
                guidance = self.lanes + lane
                live.append(guidance)
                if kind is Kind.BEGIN:  # back to the prefix: earlier images and the text between stay hidden
                    self.seen_BS[guidance] = False
                    self.seen_BS[guidance, self.width - len(self.prefix) : self.width] = True
                    self.next_B[guidance] = len(self.prefix)
            ids_B[live], positions_B[live] = token, self.next_B[live]
            heads_B[live] = IMAGE_HEAD if drawing else TEXT_HEAD
            self.next_B[live] += 1
            self.seen_BS[live, slot] = True
        self.filled += 1
        mask_B1S = self.seen_BS[:, None, : self.filled].clone()
        mask_B1S[:, :, slot] = True  # rows that wait see their padding now and hide it later
        return self._forward(ids_B[:, None], heads_B[:, None], mask_B1S, positions_B[:, None])

    def select(self, lanes: Sequence[int]) -> None:
        """The lanes from now on, each as a copy of a lane up to now, guidance row included. Replies that are done are
        left out, so that a long reply does not pay for short ones."""
        if list(lanes) == list(range(self.lanes)):
            return
        rows = [*lanes, *([] if self.prefix is None else (self.lanes + lane for lane in lanes))]
        self.lanes = len(lanes)
        self.seen_BS, self.next_B = self.seen_BS[rows], self.next_B[rows]
        self.cache.batch_select_indices(torch.tensor(rows, device=self.device))

    @torch.inference_mode()
    def _forward(
        self, ids_BT: Tensor, heads_BT: Tensor, mask_BTS: Tensor, positions_BT: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        logits_BTV, self.cache = self.bundle.logits(
            ids_BT.to(self.device),
            heads_BT.to(self.device),
            attention_mask=mask_BTS[:, None].to(self.device),
            position_ids=positions_BT.to(self.device),
            past_key_values=self.cache,
            use_cache=True,
        )
        logits_BV = logits_BTV[:, -1]
        return logits_BV[: self.lanes], None if self.prefix is None else logits_BV[self.lanes :]
