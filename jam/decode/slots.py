"""The cache of a batch: which slots each row sees, and at which position it stands.

A slot is one column of the cache, shared by all rows. Prompts are left-padded, so that every reply grows in the same
columns. Guidance (classifier-free) needs the same image without its text. A guidance row stands under each reply in the
same batch and holds the unconditional prefix (``<s><mask>``) in its last prefill slots. While its reply writes text it
is fed padding that nobody sees. At each ``<break>`` its mask is set back to the prefix and the slot of the ``<break>``,
and its positions go on from the prefix, so an image costs no second prefill:

    slot        0      1      2       3     4     5        6      7      8
    reply       <s>    a      cat     is    red   <break>  c      c      <break>
    nothing     .      <s>    <mask>  .     .     <break>  c      c      .
    position           0      1                   2        3      4

A third row, which drops the text and keeps the images, begins with the prefix and the prompt's images, takes every
image of the reply with its closing control, and goes on counting: nothing of it is hidden again.

A reply that fills a hole with an image begins inside it, and so do the rows under it, with the control that opens one.

Masks are explicit, 4D, over slots, and so are positions: learned positions would otherwise count the gaps.
Nothing here samples or knows the grammar. What a step does it does on the device; nothing is read back.

A reply has one lane, or several while its image is searched for with beams: ``select`` copies, reorders and drops
lanes. Compiled code wants the same shapes at every step: there the lanes of replies that are done stay and are fed
padding, until beams reorder the batch, which then goes on uncompiled.

Shapes: L lanes of the replies still open, A lanes of the batch (L, or more where some stay), B batch rows (a multiple
of A: the streams one under another, the replies' lanes first), P prompt slots, S slots, K codes, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress, pairwise

import torch
from torch import Tensor

from jam.decode.choose import Scores
from jam.models.cpu import attention_dtype
from jam.models.load import Bundle
from jam.models.slot_cache import SlotCache

Ids = Sequence[int]


@dataclass(frozen=True)
class Fed:
    """What the tokens of a step are, bool [L] each: one that opens an image, a code or another one inside an image, one
    that closes an image."""

    opens: Tensor
    code: Tensor
    closes: Tensor


class Slots:
    """One batch from its prompts to the last token of its longest reply.

    Args:
        prompts: ids of each.
        room: tokens of the longest reply possible.
        prefix: the unconditional prefix of guidance rows; None runs none.
        images: what each prompt's third stream begins with; None runs none.
        opened: which replies begin inside an image; None is none.
    """

    def __init__(
        self,
        bundle: Bundle,
        prompts: Sequence[Ids],
        room: int,
        prefix: Ids | None = None,
        images: Sequence[Ids] | None = None,
        opened: Sequence[bool] | None = None,
    ):
        self.readout, self.device = bundle.readout(), bundle.model.device
        self.dtype = attention_dtype(bundle.model)
        self.pad = bundle.vocabulary.controls.get("pad", bundle.vocabulary.controls["eos"])
        self.lanes = len(prompts)
        self.open: list[int] | None = None  # which lanes of the batch the open replies have; None is all, in order
        self.streams = [list(prompts)]
        if prefix is not None:
            self.streams.append([prefix] * self.lanes)
        if images is not None:
            self.streams.append(list(images))
        for stream in self.streams[1:]:
            for lane in compress(range(self.lanes), opened or ()):
                stream[lane] = [*stream[lane], bundle.vocabulary.controls["begin_image"]]
        self.width = max(len(ids) for stream in self.streams for ids in stream)
        self.room = room
        self.prefix = 0 if prefix is None else len(prefix)

    @torch.inference_mode()
    def prefill(self) -> None:
        """Runs every prompt that is there, equal ones once; the scores after them are ready then."""
        groups = [list(dict.fromkeys(map(tuple, stream))) for stream in self.streams]
        self.cache = SlotCache(sum(map(len, groups)), self.width, self.dtype)
        first, states, places = 0, [], []
        for stream, group in zip(self.streams, groups, strict=True):
            states.append(self._start(group, first))
            places += [first + group.index(tuple(ids)) for ids in stream]
            first += len(group)
        self.cache = self.readout.start(self.cache, torch.tensor(places), self.width, self.width + self.room)
        batch = len(places)
        starts = [ids for stream in self.streams for ids in stream]
        self.seen_BS = torch.zeros(batch, self.cache.slots, dtype=torch.bool, device=self.device)
        for row, ids in enumerate(starts):
            self.seen_BS[row, self.width - len(ids) : self.width] = True
        self.next_B = torch.tensor([len(ids) for ids in starts], device=self.device)
        self.prefix_S = torch.zeros_like(self.seen_BS[0])
        self.prefix_S[self.width - self.prefix : self.width] = True
        self.filled = self.width
        rows = torch.tensor(places, device=self.device)
        self.states = tuple(torch.cat(parts)[rows] for parts in zip(*states, strict=True))

    def _start(self, group: Sequence[Ids], first: int) -> tuple[Tensor, ...]:
        """The last states of prompts that go into rows ``first``, ... of the cache."""
        width, count = max(len(ids) for ids in group), len(group)
        ids_NT = torch.full((count, width), self.pad)
        positions_NT = torch.zeros_like(ids_NT)
        real_NT = torch.zeros(count, width, dtype=torch.bool)
        for row, ids in enumerate(group):
            ids_NT[row, width - len(ids) :] = torch.tensor(ids)
            positions_NT[row, width - len(ids) :] = torch.arange(len(ids))
            real_NT[row, width - len(ids) :] = True
        # a padded slot sees itself, or its attention would be a softmax over nothing
        causal_TT = torch.ones(width, width, dtype=torch.bool).tril()
        mask_NTT = real_NT[:, None] & causal_TT | torch.eye(width, dtype=torch.bool)
        start = self.width - width
        self.cache.at(start, self.width, slice(first, first + count), start)
        return self._forward(ids_NT.to(self.device), mask_NTT.to(self.device), positions_NT.to(self.device))

    @torch.inference_mode()
    def feed(self, tokens_L: Tensor, fed: Fed) -> None:
        """Puts one token a lane into the next slot; the scores after them are ready then."""
        tokens_L, fed = self._spread(tokens_L, fed)
        slot, lanes = self.filled, self.lanes
        ids, live = [tokens_L], [torch.ones_like(fed.code)]
        if len(self.streams) > 1:
            nothing = slice(lanes, 2 * lanes)
            # back to the prefix: earlier images and the text between stay hidden
            self.seen_BS[nothing] = torch.where(fed.opens[:, None], self.prefix_S, self.seen_BS[nothing])
            self.next_B[nothing] = torch.where(fed.opens, self.prefix, self.next_B[nothing])
            live.append(fed.opens | fed.code)
        if len(self.streams) > 2:
            live.append(fed.opens | fed.code | fed.closes)
        ids += [torch.where(part, tokens_L, self.pad) for part in live[1:]]
        live_B = torch.cat(live)
        positions_B = torch.where(live_B, self.next_B, 0)
        self.next_B += live_B
        self.seen_BS[:, slot] = live_B
        self.filled += 1
        mask_BS = self.seen_BS.clone() if self.cache.fixed else self.seen_BS[:, : self.filled].clone()
        mask_BS[:, slot] = True  # rows that wait see their padding now and hide it later
        self.cache.at(slot, self.filled)
        self.states = self._forward(torch.cat(ids)[:, None], mask_BS[:, None], positions_B[:, None])

    @torch.inference_mode()
    def ahead(self, tokens_T: Tensor) -> Scores:
        """Raw scores after each of some codes of the only lane, [T, K] a stream; ``keep`` says how many stay."""
        count, batch = len(tokens_T), len(self.seen_BS)
        causal_TT = torch.ones(count, count, dtype=torch.bool, device=self.device).tril()
        seen_BTS = self.seen_BS[:, None, : self.filled].expand(-1, count, -1)
        mask_BTS = torch.cat([seen_BTS, causal_TT.expand(batch, -1, -1)], dim=-1)
        positions_BT = self.next_B[:, None] + torch.arange(count, device=self.device)
        self.cache.at(self.filled, self.filled + count)
        states = self.readout.states(tokens_T.expand(batch, -1), mask_BTS[:, None], positions_BT, self.cache)
        return Scores(*(self.readout.codes(tuple(part[row] for part in states)) for row in range(batch)))

    @torch.inference_mode()
    def keep(self, count: int) -> None:
        """The first ``count`` of the codes that ``ahead`` was given are fed; the others were not."""
        self.seen_BS[:, self.filled : self.filled + count] = True
        self.next_B += count
        self.filled += count

    @torch.inference_mode()
    def code_scores(self, lanes: Sequence[int]) -> Scores:
        """Raw scores of the codes in some lanes, stream by stream, as far as they run."""
        lanes = self._places(lanes)
        every = lanes == list(range(self.lanes))
        found = []
        for stream in range(len(self.streams)):
            first = stream * self.lanes
            rows = slice(first, first + self.lanes) if every else [first + lane for lane in lanes]
            found.append(self.readout.codes(tuple(part[rows] for part in self.states)))
        return Scores(*found)

    @torch.inference_mode()
    def text_scores(self, lanes: Sequence[int]) -> Tensor:
        """Raw scores [N, V] of the text head in some lanes."""
        rows = self._places(lanes)
        return self.readout.text(tuple(part[rows] for part in self.states))

    @torch.inference_mode()
    def select(self, lanes: Sequence[int]) -> None:
        """The lanes from now on, each as a copy of a lane up to now, guidance rows included. Replies that are done are
        left out, so that a long reply does not pay for short ones."""
        wanted = self._places(lanes)
        if self.cache.fixed and all(first < second for first, second in pairwise(wanted)):
            self.open = wanted
            return
        if wanted == list(range(self.lanes)):
            return
        rows = torch.tensor(
            [stream * self.lanes + lane for stream in range(len(self.streams)) for lane in wanted], device=self.device
        )
        self.lanes, self.open = len(wanted), None
        self.seen_BS, self.next_B = self.seen_BS[rows], self.next_B[rows]
        self.cache.take(rows, self.filled)

    def close(self) -> None:
        """The last token is there, or nobody wants it."""
        self.readout.finish(self.cache)

    def _places(self, lanes: Sequence[int]) -> list[int]:
        """Where lanes of the open replies are in the batch."""
        return list(lanes) if self.open is None else [self.open[lane] for lane in lanes]

    def _spread(self, tokens_L: Tensor, fed: Fed) -> tuple[Tensor, Fed]:
        """Both with padding in the lanes of replies that are done, [A] each."""
        if self.open is None or len(self.open) == self.lanes:
            return tokens_L, fed
        at, padding = torch.tensor(self.open, device=self.device), torch.full_like(self.next_B[: self.lanes], self.pad)
        none = torch.zeros_like(padding, dtype=torch.bool)
        flags = (none.index_copy(0, at, part) for part in (fed.opens, fed.code, fed.closes))
        return padding.index_copy(0, at, tokens_L), Fed(*flags)

    def _forward(self, ids_BT: Tensor, mask_BTS: Tensor, positions_BT: Tensor) -> tuple[Tensor, ...]:
        """The states after the last token, [B, ...] each."""
        states = self.readout.states(ids_BT, mask_BTS[:, None], positions_BT, self.cache)
        return tuple(part[:, -1] for part in states)
