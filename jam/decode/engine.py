"""The decoder loop: text, images and text again in one cached stream, many rows at once.

Stages:
1. ``prepare`` renders the prompts, checks that they fit, and sets one grammar a row.
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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor

from jam.decode import sampling
from jam.decode.choose import Scores, choose_codes, choose_text, guided, used, wide
from jam.decode.grammar import Kind, Phase, Row, Rules, Step
from jam.decode.options import SamplingOptions, default_options
from jam.decode.slots import Fed, Slots
from jam.decode.stop import StopText
from jam.document import Document
from jam.errors import GenerationError
from jam.models.load import Bundle
from jam.tokens.render import render
from jam.tokens.text import TextStream, TextTokenizer

Options = SamplingOptions | Sequence[SamplingOptions] | None


@dataclass
class Job:
    """A prepared call: prompts as ids, and of each row its settings, its grammar and its random numbers.

    ``prefix`` stands for "no condition" before the control that opens an image; ``kept`` are the prompts without their
    text, for the third stream. Both are None where no row needs them. With ``weigh``,
    ``likelihoods`` holds after the run the log probabilities of each row's codes under its prompt and under nothing
    (nats, over all its images; the same twice without a prefix).
    """

    options: list[SamplingOptions]
    prompts: list[list[int]]
    rows: list[Row]
    streams: list[int]
    prefix: list[int] | None = None
    kept: list[list[int]] | None = None
    tokenizer: TextTokenizer | None = None  # where a row has stop strings
    weigh: bool = False
    replies: list[list[int]] = field(init=False)
    likelihoods: list[tuple[float, float]] = field(init=False)

    def __post_init__(self) -> None:
        self.replies, self.likelihoods = [[] for _ in self.rows], [(0.0, 0.0)] * len(self.rows)
        self._texts: dict[int, tuple[TextStream, StopText]] = {}

    def searches(self, index: int) -> bool:
        """Whether a row is inside an image that beams search for."""
        return self.options[index].image_beams > 1 and self.rows[index].phase is Phase.IMAGE

    def take(self, tokens: dict[int, int], position: int) -> list[Step]:
        """Advances the rows by their tokens."""
        steps = []
        for index, token in tokens.items():
            kind = self.rows[index].advance(token)
            self.replies[index].append(token)
            if self.options[index].stop:
                self._look(index, token, kind)
            steps.append(Step(index, position, token, kind, self.rows[index].stop))
        return steps

    def _look(self, index: int, token: int, kind: Kind) -> None:
        """Ends a row whose text holds a stop string, unless it still owes images."""
        if kind is not Kind.TEXT:
            self._texts.pop(index, None)  # an image parts stretches of text
            return
        if index not in self._texts:
            self._texts[index] = TextStream(self.tokenizer), StopText(self.options[index].stop)
        stream, text = self._texts[index]
        text.push(stream.push(token))
        if text.found and not self.rows[index].owed:
            self.rows[index].end()
        elif text.found:
            text.flush()

    def open_rows(self) -> list[int]:
        return [index for index, row in enumerate(self.rows) if row.phase is not Phase.DONE]

    def uniforms(self) -> Tensor:
        """float64 [N, tokens of the longest reply possible]."""
        count = max(row.room for row in self.rows)
        draws = zip(self.options, self.streams, strict=True)
        return torch.stack([torch.from_numpy(sampling.uniforms(own.seed, row, count)) for own, row in draws])

    def used_codes(self, indices: Sequence[int], device: torch.device) -> Tensor | None:
        """bool [N, K]: the codes that each row's image at hand has; None where no row minds."""
        if all(self.options[index].image_repetition_penalty == 1 for index in indices):
            return None
        vocabulary = self.rows[indices[0]].rules.vocabulary
        last = [self.replies[index][len(self.replies[index]) - self.rows[index].codes :] for index in indices]
        codes = [[token - vocabulary.image_span.start for token in ids] for ids in last]
        return used(codes, vocabulary.codebook_size, device)

    def used_text(self, indices: Sequence[int], size: int, device: torch.device) -> Tensor | None:
        """bool [N, V]: the text that each row's prompt and reply have; None where no row minds."""
        if all(self.options[index].text_repetition_penalty == 1 for index in indices):
            return None
        text = self.rows[indices[0]].rules.is_text
        flags = used([[*self.prompts[index], *self.replies[index]] for index in indices], size, torch.device("cpu"))
        flags[:, : len(text)] &= text
        return flags.to(device)


def context_length(bundle: Bundle) -> int:
    """Tokens that prompt and reply may have together."""
    return bundle.max_positions


def encode_images(bundle: Bundle, document: Document) -> Document:
    """The document with its pixels as codes.

    Raises:
        GenerationError: there are pixels, and this model has no image tokenizer.
    """

    def encode(images: list) -> list[tuple[int, ...]]:
        if bundle.image is None:
            raise GenerationError(
                f"{bundle.path}: the prompt holds {len(images)} images and this model has no image tokenizer; "
                "leave the images out or use a model that reads images"
            )
        return [tuple(row) for row in bundle.image.encode(images).tolist()]

    return document.with_codes(encode)


def options_of(bundle: Bundle, prompts: Sequence[Document], options: Options) -> list[SamplingOptions]:
    """The options of every prompt. Raises GenerationError for another number of them than of prompts."""
    options = default_options(bundle) if options is None else options
    each = [options] * len(prompts) if isinstance(options, SamplingOptions) else list(options)
    if len(each) != len(prompts):
        raise GenerationError(
            f"there are {len(prompts)} prompts and {len(each)} options; required: one for all, or one a prompt"
        )
    return each


def prepare(
    bundle: Bundle, prompts: Sequence[Document], options: Options = None, streams: Sequence[int] | None = None
) -> Job:
    """Prompts to ids, with every check that can be made before the first forward; arguments as ``generate``.

    Raises:
        GenerationError: a prompt longer than the context, or no room for what the options ask; with the numbers.
    """
    each = options_of(bundle, prompts, options)
    rendered = [render(prompt, bundle.vocabulary, bundle.text, complete=False).ids.tolist() for prompt in prompts]
    return prepare_ids(bundle, rendered, each, streams)


def prepare_ids(
    bundle: Bundle,
    prompts: Sequence[list[int]],
    options: Sequence[SamplingOptions],
    streams: Sequence[int] | None = None,
) -> Job:
    """As ``prepare``, from ids that stand outside an image and one set of options a prompt."""
    context, rows = context_length(bundle), []
    for index, (tokens, own) in enumerate(zip(prompts, options, strict=True)):
        rules = Rules(bundle.vocabulary, own.mode, own.min_images, own.max_images)
        where = f"prompt {index}: " if len(prompts) > 1 else ""
        left = context - len(tokens)
        if left < rules.needed_tokens:
            raise GenerationError(
                f"{where}the prompt has {len(tokens)} tokens and the model's context {context}; the reply needs room "
                f"for {rules.needed_tokens} more; shorten the prompt or leave turns out"
            )
        if own.max_tokens < rules.needed_tokens:
            raise GenerationError(
                f"max_tokens is {own.max_tokens}; a reply with {rules.needed_images} images needs "
                f"{rules.needed_tokens} ({rules.image_tokens} an image and 1 to end); raise max_tokens"
            )
        rows.append(Row(rules, min(left, own.max_tokens)))
    numbers = list(range(len(rows)) if streams is None else streams)
    job = Job(list(options), list(prompts), rows, numbers, tokenizer=bundle.text)
    guided_rows = [index for index, row in enumerate(rows) if options[index].guided and row.rules.may_draw]
    if guided_rows:
        job.prefix = _unconditional_prefix(bundle)
        needed = len(job.prefix) + rows[0].rules.image_tokens
        if needed > context:
            raise GenerationError(
                f"the model's context is {context}; guidance needs {needed} for one image; set guidance_scale to 1"
            )
    if any(options[index].keeps_images for index in guided_rows):
        job.kept = [[*job.prefix, *_images_of(bundle, tokens)] for tokens in prompts]
        for index in range(len(rows)):  # it runs under all
            rules, most = rows[index].rules, rows[index].room
            drawn = int(min(rules.most_images, most // rules.image_tokens)) * rules.image_tokens
            if len(job.kept[index]) + drawn > context:
                raise GenerationError(
                    f"the model's context is {context}; the stream that keeps images needs "
                    f"{len(job.kept[index]) + drawn}; set max_images lower, or leave image_guidance_scale out"
                )
    return job


def _images_of(bundle: Bundle, tokens: Sequence[int]) -> list[int]:
    """The ids of a prompt's images alone, each between its controls."""
    controls, span = bundle.vocabulary.controls, bundle.vocabulary.image_span
    found: list[int] = []
    for is_code, run in groupby(tokens, lambda token: span.start <= token < span.stop):
        if is_code:
            found += [controls["begin_image"], *run, controls["end_image"]]
    return found


def _unconditional_prefix(bundle: Bundle) -> list[int]:
    """Ids that stand for "no condition" before the control that opens the image."""
    controls = bundle.vocabulary.controls
    missing = [name for name in bundle.unconditional if name not in controls]
    if missing or bundle.unconditional[-1:] != ("begin_image",) or len(bundle.unconditional) < 2:
        raise GenerationError(
            f"{bundle.path}: jam.json's unconditional prompt is {list(bundle.unconditional)}; required: named controls "
            "that end in begin_image; mend jam.json or set guidance_scale to 1"
        )
    return [controls[name] for name in bundle.unconditional[:-1]]


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

    def extend(self, scores: Scores) -> list[int]:
        """Goes on by one code, the last one by the likeliest image alone; the beam that each new one continues."""
        row, options = self.job.rows[self.index], self.job.options[self.index]
        vocabulary = row.rules.vocabulary
        last = row.codes + 1 == vocabulary.codes_per_image
        logits = sampling.top_k(guided(options, scores), options.image_top_k).cpu()
        so_far = self.scores.to(logits.dtype)
        self.scores, beams, codes = sampling.extend_beams(so_far, logits, 1 if last else options.image_beams)
        self.ids = torch.cat([self.ids[beams], codes[:, None] + vocabulary.image_span.start], dim=1)
        row.advance(int(self.ids[0, -1]))
        return beams.tolist()

    def steps(self) -> list[Step]:
        """The codes of the image, once the row has left it; else none."""
        if self.job.rows[self.index].phase is Phase.IMAGE:
            return []
        ids = enumerate(self.ids[0].tolist(), self.position)
        return [Step(self.index, position, token, Kind.CODE, None) for position, token in ids]


def generate(
    bundle: Bundle, prompts: Sequence[Document], options: Options = None, streams: Sequence[int] | None = None
) -> Iterator[Step]:
    """Replies to prompts, token by token; stop iterating to cancel.

    Args:
        prompts: images as codes (``encode_images``). A prompt that ends in a user turn is answered, any other
            continued.
        options: for all prompts, or one for each; None takes the model's defaults.
        streams: the numbers of the rows' random streams, by default 0, 1, ...; a reply depends on its prompt, the
            options and its stream, not on its neighbours.

    Yields:
        Steps; within one position in the order of the rows. The codes of an image that beams search for come together,
        when it is found.

    Raises:
        GenerationError: at the call, not at the first step; see ``prepare``.
    """
    return run_job(bundle, prepare(bundle, prompts, options, streams))


def run_job(bundle: Bundle, job: Job) -> Iterator[Step]:
    """The steps of a prepared call, which may be run once."""
    return _Loop(bundle, job).run() if job.prompts else iter(())


class _Loop:
    """One call of ``generate``: its lanes, and where they stand."""

    def __init__(self, bundle: Bundle, job: Job):
        self.job, self.device = job, bundle.model.device
        self.slots = Slots(bundle, job.prompts, max(row.room for row in job.rows), job.prefix, job.kept)
        self.uniforms = job.uniforms().to(self.device)
        self.vocabulary = bundle.vocabulary
        self.masks: dict[tuple[bool, bool, bool], Tensor] = {}
        self.searches: dict[int, Search] = {}
        self.lanes = {index: [index] for index in range(len(job.rows))}
        self.position = 0
        self._index: tuple[tuple[int, ...], Tensor] | None = None
        self.weights_N2 = torch.zeros(len(job.rows), 2, dtype=torch.float64, device=self.device) if job.weigh else None

    def run(self) -> Iterator[Step]:
        self.slots.prefill()
        while self.lanes:
            if codes := self._undisturbed():
                yield from self._draw(codes)
            else:
                yield from self._step()
        if self.weights_N2 is not None:
            self.job.likelihoods = [tuple(pair) for pair in self.weights_N2.tolist()]

    def _undisturbed(self) -> int:
        """Codes that every open row draws before any of them does something else; 0 where one writes or searches."""
        rows = [self.job.rows[index] for index in self.lanes]
        if any(row.phase is not Phase.IMAGE for row in rows) or any(map(self.job.searches, self.lanes)):
            return 0
        if any(self.job.options[index].image_repetition_penalty != 1 for index in self.lanes):
            return 0  # it wants to know the codes
        return min(row.rules.vocabulary.codes_per_image - row.codes for row in rows)

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
            name: torch.tensor([kind is wanted for _, _, kind in fed], device=self.device)
            for name, wanted in (("opens", Kind.BEGIN), ("code", Kind.CODE), ("closes", Kind.END))
        }
        self.slots.feed(torch.tensor([token for _, token, _ in fed], device=self.device), Fed(**kinds))

    def _search(self, index: int) -> tuple[list[tuple[int, int, Kind]], list[Step]]:
        search = self.searches.setdefault(index, Search.begin(self.job, index, self.position))
        own = self.lanes[index]
        beams = search.extend(self.slots.code_scores(own))
        tokens = search.ids[:, -1].tolist()
        if steps := search.steps():
            del self.searches[index]
        return [(own[beam], token, Kind.CODE) for beam, token in zip(beams, tokens, strict=True)], steps

    def _choose(self, indices: Sequence[int]) -> dict[int, int]:
        """The next token of rows with one lane each."""
        phases = {index: self.job.rows[index].phase for index in indices}
        chosen = {
            index: self.vocabulary.controls["end_image"] for index, phase in phases.items() if phase is Phase.CLOSE
        }
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
