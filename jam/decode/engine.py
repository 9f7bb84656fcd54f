"""The decoder loop: text, images and text again in one cached stream, many rows at once.

Stages:
1. ``jam.decode.job`` renders the prompts, checks that they fit, and sets one grammar a row.
2. Prefill of all prompts, and of the guidance rows under them (``jam.decode.slots``).
3. Loop: scores of the head that each row's state asks for, guidance, a draw (``jam.decode.choose``), yield, feed one
   slot; replies that are done leave the batch.

What a row may say next depends on its text, which the host reads token by token to stream it. Inside an image it
depends on nothing: where all rows draw, their codes stay on the device from step to step, and the host reads each one
while the next is computed.

With ``image_beams`` an image is not sampled but searched for: its reply splits into beams (lanes of the batch) at the
first code, the likeliest continuations of all of them go on, and with the last code the likeliest image is chosen.

The loop without a cache, in ``jam.decode.naive``, is the oracle of this one.

Shapes: N rows, L lanes of the batch, V vocabulary, K codes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jam.decode import sampling
from jam.decode.choose import Scores, choose_codes, choose_text, distribution, guided, wide
from jam.decode.grammar import Kind, Phase, Row, Step
from jam.decode.jacobi import Guesses, judge
from jam.decode.job import Job, Options, prepare
from jam.decode.options import SamplingOptions
from jam.decode.slots import Fed, Slots
from jam.document import Document
from jam.models.load import Bundle


@dataclass
class Search:
    """The beams of one image: log probabilities [W] and ids int64 [W, codes so far]."""

    job: Job
    index: int
    position: int  # of the first code in the reply
    scores: Tensor
    ids: Tensor

    @classmethod
    def begin(cls, job: Job, index: int, position: int) -> "Search":
        return cls(job, index, position, torch.zeros(1), torch.zeros(1, 0, dtype=torch.int64))

    def extend(self, score: Callable[[], Scores]) -> list[int]:
        """Goes on by one code, the last one by the likeliest image alone, or by what the frame forces; the beam that
        each new one continues."""
        row, options = self.job.rows[self.index], self.job.options[self.index]
        vocabulary, forced = row.rules.vocabulary, row.forced
        if forced is not None:
            row.advance(forced)
            self.ids = torch.nn.functional.pad(self.ids, (0, 1), value=forced)
            return list(range(len(self.ids)))
        last, scores = row.codes + 1 == row.rules.image.codes, score()
        logits = sampling.top_k(guided(options, scores), options.image_top_k).cpu()
        so_far = self.scores.to(logits.dtype)
        self.scores, beams, codes = sampling.extend_beams(so_far, logits, 1 if last else options.image_beams)
        self.ids = torch.cat([self.ids[beams], codes[:, None] + vocabulary.image_span.start], dim=1)
        row.advance(int(self.ids[0, -1]))
        return beams.tolist()

    def steps(self) -> list[Step]:
        """The codes of the image and what stands among them, once its last one is there; else none."""
        row = self.job.rows[self.index]
        if row.drawing:
            return []
        span = row.rules.vocabulary.image_span
        return [
            Step(self.index, position, token, Kind.CODE if span.start <= token < span.stop else Kind.FRAME, None)
            for position, token in enumerate(self.ids[0].tolist(), self.position)
        ]


def generate(
    bundle: Bundle, prompts: Sequence[Document], options: Options = None, streams: Sequence[int] | None = None
) -> Iterator[Step]:
    """Replies to prompts, token by token; stop iterating to cancel.

    Args:
        prompts: images as codes (``encode_images``). A prompt that ends in a user turn is answered, any other
            continued; one with a hole is filled (``jam.decode.stream.filled``).
        options: for all prompts, or one for each; None takes the model's defaults.
        streams: the numbers of the rows' random streams, by default 0, 1, ...; a reply depends on its prompt, the
            options and its stream, not on its neighbours.

    Yields:
        Steps; within one position in the order of the rows. The codes of an image that beams search for come together,
        when it is found.

    Raises:
        GenerationError: at the call, not at the first step; see ``jam.decode.job.prepare``.
    """
    return run_job(bundle, prepare(bundle, prompts, options, streams))


def run_job(bundle: Bundle, job: Job) -> Iterator[Step]:
    """The steps of a prepared call, which may be run once."""
    return _Loop(bundle, job).run() if job.prompts else iter(())


class _Loop:
    """One call of ``generate``: its lanes, and where they stand."""

    def __init__(self, bundle: Bundle, job: Job):
        self.job, self.device = job, bundle.model.device
        room, opened = max(row.room for row in job.rows), [row.phase is Phase.IMAGE for row in job.rows]
        self.slots = Slots(bundle, job.prompts, room, job.prefix, job.kept, opened)
        self.uniforms = job.uniforms().to(self.device)
        self.draws = job.draws(0).to(self.device) if job.options[0].jacobi_window > 1 else None
        self.vocabulary = bundle.vocabulary
        self.masks: dict[tuple[bool, bool, bool], Tensor] = {}
        self.searches: dict[int, Search] = {}
        self.lanes = {index: [index] for index in range(len(job.rows))}
        self.position = 0
        self._index: tuple[tuple[int, ...], Tensor] | None = None
        self.weights_N2 = torch.zeros(len(job.rows), 2, dtype=torch.float64, device=self.device) if job.weigh else None

    def run(self) -> Iterator[Step]:
        try:
            self.slots.prefill()
            while self.lanes:
                if codes := self._undisturbed():
                    yield from self._guess(codes) if self._guesses() else self._draw(codes)
                else:
                    yield from self._step()
        finally:
            self.slots.close()
        if self.weights_N2 is not None:
            self.job.likelihoods = [tuple(pair) for pair in self.weights_N2.tolist()]

    def _undisturbed(self) -> int:
        """Codes that every open row draws before any of them does something else; 0 where one writes or searches."""
        rows = [self.job.rows[index] for index in self.lanes]
        if any(row.phase is not Phase.IMAGE for row in rows) or any(map(self.job.searches, self.lanes)):
            return 0
        if any(self.job.options[index].image_repetition_penalty != 1 for index in self.lanes):
            return 0  # it wants to know the codes
        return min(row.run for row in rows)

    def _draw(self, count: int) -> Iterator[Step]:
        """So many codes of every open row, fed before they are read."""
        indices, start = list(self.lanes), self.vocabulary.image_span.start
        every, none = (torch.full((len(indices),), flag, device=self.device) for flag in (True, False))
        fed, waiting = Fed(opens=none, code=every, closes=none), None
        groups = self._groups(indices)
        for _ in range(count):
            tokens_L = self._codes(indices, groups) + start
            self.slots.feed(tokens_L, fed)
            read, waiting = waiting, (_reading(tokens_L), self.position)
            self.position += 1
            if read is not None:
                yield from self._taken(indices, *read)
        yield from self._taken(indices, *waiting)

    def _guesses(self) -> bool:
        """Whether the only reply guesses its codes ahead; what weighs them wants their scores one by one."""
        return self.draws is not None and self.weights_N2 is None

    def _guess(self, count: int) -> Iterator[Step]:
        """So many codes of the only open row, several from one forward (``jam.decode.jacobi``)."""
        (index,) = self.lanes
        options, vocabulary, row = self.job.options[index], self.vocabulary, self.job.rows[index]
        start, stop, frame = vocabulary.image_span.start, vocabulary.image_span.stop, row.rules.image
        columns = math.isqrt(frame.codes) if frame.grid is None else frame.columns
        reply = self.job.replies[index]
        known = [token - start for token in reply[len(reply) - row.place :] if start <= token < stop]
        last = row.codes + count
        sure = self._codes([index], self._groups([index])).tolist()
        guesses = Guesses.none(vocabulary.codebook_size, self.device)
        while True:
            for code in sure:
                yield from self.job.take({index: code + start}, self.position)
                self.position += 1
            known += sure
            if len(known) == last:
                break
            ahead = min(options.jacobi_window, last - len(known)) - 1
            guesses = guesses.to(ahead, known, columns)
            fed = torch.cat([torch.tensor(known[-1:], device=self.device), guesses.codes])
            now = distribution(options, self.slots.ahead(fed + start))
            stand, code, after = judge(guesses, now, self.draws[self.position : self.position + ahead + 1])
            self.slots.keep(1 + stand)
            sure, guesses = [*guesses.codes[:stand].tolist(), code], after
        flag = torch.ones(1, dtype=torch.bool, device=self.device)
        self.slots.feed(torch.tensor([known[-1] + start], device=self.device), Fed(~flag, flag, ~flag))

    def _taken(self, indices: list[int], read: Callable[[], list[int]], position: int) -> list[Step]:
        return self.job.take(dict(zip(indices, read(), strict=True)), position)

    def _step(self) -> Iterator[Step]:
        """One token of every open row, whatever it does; finished rows leave."""
        job, found = self.job, {}  # row -> its next tokens, each with the lane that it goes on from and its kind
        chosen = self._choose([index for index in self.lanes if not job.searches(index)])
        for index in self.lanes:
            if index in chosen:
                steps = job.take({index: chosen[index]}, self.position)
                found[index] = [(self.lanes[index][0], steps[0].token, steps[0].kind)]
            else:
                found[index], steps = self._search(index)
                job.replies[index] += [step.token for step in steps]
            yield from steps
        rows = job.open_rows()
        self.position += 1
        fed = [item for index in rows for item in found[index]]
        owners = [index for index in rows for _ in found[index]]
        self.lanes = {index: [lane for lane, owner in enumerate(owners) if owner == index] for index in rows}
        if not rows:
            return
        self.slots.select([lane for lane, _, _ in fed])
        kinds = {
            name: torch.tensor([kind in wanted for _, _, kind in fed], device=self.device)
            for name, wanted in (("opens", {Kind.BEGIN}), ("code", {Kind.CODE, Kind.FRAME}), ("closes", {Kind.END}))
        }
        self.slots.feed(torch.tensor([token for _, token, _ in fed], device=self.device), Fed(**kinds))

    def _search(self, index: int) -> tuple[list[tuple[int, int, Kind]], list[Step]]:
        search = self.searches.setdefault(index, Search.begin(self.job, index, self.position))
        own = self.lanes[index]
        beams = search.extend(lambda: self.slots.code_scores(own))
        tokens = search.ids[:, -1].tolist()
        if steps := search.steps():
            del self.searches[index]
        return [(own[beam], token, Kind.CODE) for beam, token in zip(beams, tokens, strict=True)], steps

    def _choose(self, indices: Sequence[int]) -> dict[int, int]:
        """The next token of rows with one lane each."""
        phases = {index: self.job.rows[index].phase for index in indices}
        chosen = {index: self.job.rows[index].forced for index, phase in phases.items() if phase is Phase.FRAME}
        if drawing := [index for index, phase in phases.items() if phase is Phase.IMAGE]:
            tokens = self._codes(drawing, self._groups(drawing)) + self.vocabulary.image_span.start
            chosen |= dict(zip(drawing, tokens.tolist(), strict=True))
        if writing := [index for index, phase in phases.items() if phase is Phase.TEXT]:
            chosen |= dict(zip(writing, self._text(writing).tolist(), strict=True))
        return chosen

    def _groups(self, indices: Sequence[int]) -> list[tuple[SamplingOptions, Tensor]]:
        """Which of some rows are sampled alike: the options, and places in ``indices`` on the device."""
        groups: dict[SamplingOptions, list[int]] = {}
        for place, index in enumerate(indices):
            groups.setdefault(self.job.options[index], []).append(place)
        return [(options, torch.tensor(at, device=self.device)) for options, at in groups.items()]

    def _at(self, indices: Sequence[int]) -> Tensor:
        """Rows as an index on the device, copied there when they change and not at every code."""
        key = tuple(indices)
        if self._index is None or self._index[0] != key:
            self._index = key, torch.tensor(key, device=self.device)
        return self._index[1]

    def _codes(self, indices: Sequence[int], groups: list[tuple[SamplingOptions, Tensor]]) -> Tensor:
        """int64 [N]: the numbers of the next codes."""
        scores = self.slots.code_scores([self.lanes[index][0] for index in indices])
        used_NK = self.job.used_codes(indices, self.device)
        draws_N = self.uniforms[self._at(indices), self.position]
        if len(groups) == 1:
            return self._weighed(indices, scores, choose_codes(groups[0][0], scores, draws_N, used_NK))
        codes = torch.empty(len(indices), dtype=torch.int64, device=self.device)
        for options, at in groups:
            own = Scores(*(None if part is None else part[at] for part in (scores.full, scores.nothing, scores.images)))
            codes[at] = choose_codes(options, own, draws_N[at], None if used_NK is None else used_NK[at])
        return self._weighed(indices, scores, codes)

    def _weighed(self, indices: Sequence[int], scores: Scores, codes_N: Tensor) -> Tensor:
        """The codes; what they weigh goes to the rows' likelihoods."""
        if self.weights_N2 is not None:
            nothing = scores.full if scores.nothing is None else scores.nothing
            logs = [wide(part).double().log_softmax(-1) for part in (scores.full, nothing)]
            self.weights_N2[self._at(indices)] += torch.cat([part.gather(1, codes_N[:, None]) for part in logs], 1)
        return codes_N

    def _text(self, indices: Sequence[int]) -> Tensor:
        """int64 [N]: the next ids of rows that write."""
        logits_NV = self.slots.text_scores([self.lanes[index][0] for index in indices])
        size = logits_NV.shape[-1]
        legal_NV = torch.stack([self._legal(self.job.rows[index], size) for index in indices])
        used_NV = self.job.used_text(indices, size, self.device)
        draws_N = self.uniforms[self._at(indices), self.position]
        tokens = torch.empty(len(indices), dtype=torch.int64, device=self.device)
        for options, at in self._groups(indices):
            own = None if used_NV is None else used_NV[at]
            tokens[at] = choose_text(options, logits_NV[at], legal_NV[at], draws_N[at], own)
        return tokens

    def _legal(self, row: Row, size: int) -> Tensor:
        """What a row may write, on the device, with the rows of the table beyond the vocabulary."""
        allowed = row.allowed()
        if allowed not in self.masks:
            mask = row.rules.between(*allowed)
            self.masks[allowed] = torch.nn.functional.pad(mask, (0, size - len(mask)), value=False).to(self.device)
        return self.masks[allowed]


def _reading(tokens_L: Tensor) -> Callable[[], list[int]]:
    """Starts a copy to the host; what it returns waits for the copy and not for work that was queued since."""
    if tokens_L.device.type != "cuda":
        return tokens_L.tolist
    host = torch.empty(tokens_L.shape, dtype=tokens_L.dtype, pin_memory=True)
    host.copy_(tokens_L, non_blocking=True)
    done = torch.cuda.current_stream(tokens_L.device).record_event()

    def read() -> list[int]:
        done.synchronize()
        return host.tolist()

    return read
