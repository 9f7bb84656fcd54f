"""The decoder as one would first write it: the oracle of ``jam.decode.engine``.

One row at a time, a full forward of everything at each step, no cache, no padding, no mask; the streams of guidance are
sequences of their own: ``<s><mask><break>`` and the image so far, or ``<s><mask>``, every image before and these. Heads
come from the ids (``jam.models.heads.next_heads``), not from the grammar's state, and scores from whole logits. What it
shares with the engine is the choice of a token from given scores. Far too slow for use: a reply of n tokens costs n
forwards of up to n tokens.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from jam.decode import sampling
from jam.decode.choose import Scores, choose_codes, choose_text
from jam.decode.engine import Search
from jam.decode.grammar import Phase, Step
from jam.decode.job import Job, Options, prepare
from jam.document import Document
from jam.models.heads import next_heads
from jam.models.load import Bundle


def generate_naive(
    bundle: Bundle, prompts: Sequence[Document], options: Options = None, streams: Sequence[int] | None = None
) -> Iterator[Step]:
    """Same arguments, steps and errors as ``jam.decode.engine.generate``; the rows come one after the other."""
    job = prepare(bundle, prompts, options, streams)
    return (step for index in range(len(job.prompts)) for step in _Row(bundle, job, index).run())


class _Row:
    """One reply."""

    def __init__(self, bundle: Bundle, job: Job, index: int):
        self.bundle, self.job, self.index = bundle, job, index
        self.row, self.options, self.controls = job.rows[index], job.options[index], bundle.vocabulary.controls
        self.images: list[int] = []  # whole images of the reply, between their controls

    def run(self) -> Iterator[Step]:
        position = 0
        while self.row.phase is not Phase.DONE:
            if self.job.searches(self.index):
                steps = self._search(position)
                self.job.replies[self.index] += [step.token for step in steps]
            else:
                steps = self.job.take({self.index: self._next(position)}, position)
            yield from steps
            position += len(steps)

    def _next(self, position: int) -> int:
        job, index, device = self.job, self.index, torch.device("cpu")
        draw = torch.tensor([sampling.uniform(self.options.seed, job.streams[index], position)])
        match self.row.phase:
            case Phase.IMAGE:
                scores = self._codes([self._image()])
                start = self.bundle.vocabulary.image_span.start
                return int(choose_codes(self.options, scores, draw, job.used_codes([index], device))) + start
            case Phase.FRAME:
                if self.row.place == self.row.rules.image.last:
                    self.images += [self.controls["begin_image"], *self._image(), self.row.forced]
                return self.row.forced
        logits = self._last([*job.prompts[index], *job.replies[index]])
        legal = self.row.legal()[None]
        return int(choose_text(self.options, logits, legal, draw, job.used_text([index], logits.shape[-1], device)))

    def _image(self) -> list[int]:
        """What the reply has of the image at hand, after the control that opens it."""
        reply = self.job.replies[self.index]
        begins = [at for at, token in enumerate(reply) if token == self.controls["begin_image"]]
        return reply[begins[-1] + 1 :] if begins else list(reply)  # one in a hole is open from the start

    def _search(self, position: int) -> list[Step]:
        """The codes of an image that beams search for, every beam from its beginning at every step."""
        search, size = Search.begin(self.job, self.index, position), self._image()
        while self.job.searches(self.index):
            search.extend(lambda: self._codes([[*size, *ids] for ids in search.ids.tolist()]))
        return search.steps()

    def _codes(self, images: list[list[int]]) -> Scores:
        """Scores after images that have begun, in every stream; the reply holds their beginning."""
        job, index, begin = self.job, self.index, self.controls["begin_image"]
        starts = [[*job.prompts[index], *job.replies[index][: len(job.replies[index]) - len(self._image())]]]
        if job.prefix is not None:
            starts.append([*job.prefix, begin])
        if job.kept is not None:
            starts.append([*job.kept[index], *self.images, begin])
        span = self.bundle.vocabulary.image_span
        whole = [torch.cat([self._last([*start, *codes]) for codes in images]) for start in starts]
        return Scores(*(logits[:, span.start : span.stop] for logits in whole))

    @torch.inference_mode()
    def _last(self, ids: list[int]) -> Tensor:
        """Logits [1, V] after a sequence."""
        ids_1T = torch.tensor([ids], device=self.bundle.model.device)
        positions_1T = torch.arange(len(ids), device=self.bundle.model.device)[None]
        heads_1T = next_heads(ids_1T, self.bundle.vocabulary)
        return self.bundle.logits(ids_1T, heads_1T, position_ids=positions_1T)[0][:, -1]
