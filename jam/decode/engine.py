"""The decoder loop: text, images and text again in one cached stream, many rows at once.

Stages:
1. ``prepare`` renders the prompts, checks that they fit, and sets one grammar a row.
2. Prefill of all prompts, and of one guidance row under each (``jam.decode.slots``).
3. Loop: guide, restrict to the grammar, sample, yield, feed one slot; replies that are done leave the batch.

With ``image_beams`` an image is not sampled but searched for: its reply splits into beams (lanes of the batch) at the
first code, the likeliest continuations of all of them go on, and with the last code the likeliest image is chosen.

The loop without a cache, in ``jam.decode.naive``, is the oracle of this one.

Shapes: N rows that are still open, L lanes of the batch, V vocabulary, K codes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from jam.decode import sampling
from jam.decode.grammar import Kind, Mode, Phase, Row, Rules, Step
from jam.decode.slots import Slots
from jam.document import Document
from jam.errors import GenerationError
from jam.models.load import Bundle
from jam.tokens.render import render

_TYPES: dict[object, tuple[tuple[type, ...], str]] = {
    Mode: ((str,), "a word"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    int | None: ((int, type(None)), "a whole number or none"),
}


@dataclass(frozen=True)
class SamplingOptions:
    """How to reply. ``max_tokens`` counts every token of the reply, image codes and controls included.

    Mode ``image`` makes at least one image and no text. Guidance scale 1 is off and costs nothing. ``image_beams``
    above 1 searches for the likeliest image (needs ``image_temperature`` 0) in so many lanes of the batch.

    Raises:
        GenerationError: a value outside its range; the message gives it.
    """

    mode: Mode = "interleaved"
    max_tokens: int = 400
    max_images: int = 4
    min_images: int = 0
    seed: int = 0
    text_temperature: float = 0.7
    text_top_p: float = 0.9
    image_temperature: float = 1.0
    image_top_p: float = 0.95
    image_top_k: int | None = None
    image_beams: int = 1
    guidance_scale: float = 3.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, (kinds, words) = getattr(self, field.name), _TYPES[field.type]
            _check(field.name, value, isinstance(value, kinds) and not isinstance(value, bool), words)
        # beyond these bounds float32 scores overflow to numbers that are none
        for name, value in (("text_temperature", self.text_temperature), ("image_temperature", self.image_temperature)):
            _check(name, value, value == 0 or 1e-4 <= value < math.inf, "0 (greedy), or a finite number from 0.0001")
        _check("guidance_scale", self.guidance_scale, 0 <= self.guidance_scale <= 1000, "a number from 0 to 1000")
        _check("text_top_p", self.text_top_p, 0 < self.text_top_p <= 1, "above 0 and at most 1")
        _check("image_top_p", self.image_top_p, 0 < self.image_top_p <= 1, "above 0 and at most 1")
        _check(
            "image_top_k", self.image_top_k, self.image_top_k is None or self.image_top_k >= 1, "at least 1, or none"
        )
        _check("image_beams", self.image_beams, 1 <= self.image_beams <= 64, "from 1 (no search) to 64")
        _check(
            "image_temperature",
            self.image_temperature,
            self.image_beams == 1 or self.image_temperature == 0,
            f"0 with image_beams {self.image_beams}, which search for the likeliest image and draw nothing by chance",
        )
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check("seed", self.seed, 0 <= self.seed <= sampling.MAX_SEED, f"from 0 to {sampling.MAX_SEED}")


def default_options(bundle: Bundle, **said: float | str | None) -> SamplingOptions:
    """The model's own defaults (``sampling`` in its jam.json) under what is said; None is not said.

    An image temperature without a word on beams turns the search off, and beams without a word on the temperature
    turn chance off: one of the two has to give way.

    Raises:
        GenerationError: a value out of its range, or a default that is no option.
    """
    said = {name: value for name, value in said.items() if value is not None}
    try:
        SamplingOptions(**bundle.sampling)
    except (TypeError, GenerationError) as error:
        known = ", ".join(field.name for field in fields(SamplingOptions))
        raise GenerationError(
            f"{bundle.path}: jam.json's sampling {bundle.sampling} does not hold ({error}); names are {known}, mend it"
        ) from None
    defaults = dict(bundle.sampling)
    if "image_temperature" in said and "image_beams" not in said:
        defaults.pop("image_beams", None)
    elif said.get("image_beams", 1) > 1 and "image_temperature" not in said:
        defaults["image_temperature"] = 0.0
    return SamplingOptions(**(defaults | said))


def _check(name: str, value: float | None, holds: bool, required: str) -> None:
    if not holds:
        raise GenerationError(f"{name} is {value!r}; required: {required}; change it")


@dataclass
class Job:
    """A prepared call: prompts as ids, the grammar state of each reply, and what sampling needs."""

    options: SamplingOptions
    rules: Rules
    prompts: list[list[int]]
    rows: list[Row]
    streams: list[int]
    prefix: list[int]
    context: int

    @property
    def guided(self) -> bool:
        """Whether any image may need the unconditional stream."""
        draws = self.rules.can_draw and self.rules.mode != "text" and self.rules.max_images > 0
        return draws and self.options.guidance_scale != 1

    def searches(self, index: int) -> bool:
        """Whether a row is inside an image that beams search for."""
        return self.options.image_beams > 1 and self.rows[index].phase is Phase.IMAGE

    def take(self, tokens: dict[int, int], position: int) -> list[Step]:
        """Advances the rows by their tokens."""
        steps = []
        for index, token in tokens.items():
            kind = self.rows[index].advance(token)
            steps.append(Step(index, position, token, kind, self.rows[index].stop))
        return steps

    def open_rows(self) -> list[int]:
        return [index for index, row in enumerate(self.rows) if row.phase is not Phase.DONE]


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


def prepare(
    bundle: Bundle, prompts: Sequence[Document], options: SamplingOptions, streams: Sequence[int] | None = None
) -> Job:
    """Prompts to ids, with every check that can be made before the first forward.

    Raises:
        GenerationError: a prompt longer than the context, or no room for what the options ask; with the numbers.
    """
    context = context_length(bundle)
    rules = Rules(bundle.vocabulary, options.mode, options.min_images, options.max_images)
    ids, rows = [], []
    for index, prompt in enumerate(prompts):
        tokens = render(prompt, bundle.vocabulary, bundle.text, complete=False).ids.tolist()
        where = f"prompt {index}: " if len(prompts) > 1 else ""
        left = context - len(tokens)
        if left < rules.needed_tokens:
            raise GenerationError(
                f"{where}the prompt has {len(tokens)} tokens and the model's context {context}; the reply needs room "
                f"for {rules.needed_tokens} more; shorten the prompt or leave turns out"
            )
        if options.max_tokens < rules.needed_tokens:
            raise GenerationError(
                f"max_tokens is {options.max_tokens}; a reply with {rules.needed_images} images needs "
                f"{rules.needed_tokens} ({rules.image_tokens} an image and 1 to end); raise max_tokens"
            )
        ids.append(tokens)
        rows.append(Row(rules, min(left, options.max_tokens)))
    job = Job(options, rules, ids, rows, list(range(len(ids)) if streams is None else streams), [], context)
    if job.guided:
        job.prefix = _unconditional_prefix(bundle)
        if len(job.prefix) + rules.image_tokens > context:
            raise GenerationError(
                f"the model's context is {context}; guidance needs {len(job.prefix) + rules.image_tokens} for one "
                "image; set guidance_scale to 1"
            )
    return job


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


def choose(
    job: Job, position: int, indices: Sequence[int], cond_NV: Tensor, uncond_NV: Tensor | None
) -> dict[int, int]:
    """The next token of some rows, at the ``position``-th token of their replies.

    Args:
        indices: N rows of the job.
        cond_NV: their restricted logits.
        uncond_NV: those of their unconditional streams, read for image codes alone; None without guidance.

    Returns:
        row index to token id.
    """
    options, rules = job.options, job.rules
    uniforms = torch.tensor([sampling.uniform(options.seed, job.streams[i], position) for i in indices])
    chosen: dict[int, int] = {}
    drawing = [n for n, i in enumerate(indices) if job.rows[i].phase is Phase.IMAGE]
    writing = [n for n, i in enumerate(indices) if job.rows[i].phase is not Phase.IMAGE]
    if drawing:
        span = rules.vocabulary.image_span
        logits = code_logits(job, cond_NV[drawing], None if uncond_NV is None else uncond_NV[drawing])
        logits = sampling.temperature(logits, options.image_temperature)
        logits = sampling.top_p(sampling.top_k(logits, options.image_top_k), options.image_top_p)
        tokens = sampling.sample(logits, uniforms[drawing].to(logits.device)) + span.start
        chosen |= dict(zip((indices[n] for n in drawing), tokens.tolist(), strict=True))
    if writing:
        legal = torch.stack([job.rows[indices[n]].legal() for n in writing]).to(cond_NV.device)
        logits = sampling.restrict(_wide(cond_NV[writing]), legal)
        logits = sampling.top_p(sampling.temperature(logits, options.text_temperature), options.text_top_p)
        tokens = sampling.sample(logits, uniforms[writing].to(logits.device))
        chosen |= dict(zip((indices[n] for n in writing), tokens.tolist(), strict=True))
    return {index: chosen[index] for index in indices}


def code_logits(job: Job, cond_NV: Tensor, uncond_NV: Tensor | None) -> Tensor:
    """Guided logits [N, K] of the codes alone."""
    span = job.rules.vocabulary.image_span
    logits = _wide(cond_NV[:, span.start : span.stop])
    if uncond_NV is None:
        return logits
    return sampling.cfg(logits, _wide(uncond_NV[:, span.start : span.stop]), job.options.guidance_scale)


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

    def extend(self, cond_WV: Tensor, uncond_WV: Tensor | None) -> list[int]:
        """Goes on by one code, the last one by the likeliest image alone; the beam that each new one continues."""
        row, rules = self.job.rows[self.index], self.job.rules
        last = row.codes + 1 == rules.vocabulary.codes_per_image
        logits = sampling.top_k(code_logits(self.job, cond_WV, uncond_WV), self.job.options.image_top_k).cpu()
        scores = self.scores.to(logits.dtype)
        self.scores, beams, codes = sampling.extend_beams(scores, logits, 1 if last else self.job.options.image_beams)
        self.ids = torch.cat([self.ids[beams], codes[:, None] + rules.vocabulary.image_span.start], dim=1)
        row.advance(int(self.ids[0, -1]))
        return beams.tolist()

    def steps(self) -> list[Step]:
        """The codes of the image, once the row has left it; else none."""
        if self.job.rows[self.index].phase is Phase.IMAGE:
            return []
        ids = enumerate(self.ids[0].tolist(), self.position)
        return [Step(self.index, position, token, Kind.CODE, None) for position, token in ids]


def _wide(logits: Tensor) -> Tensor:
    """Half precision to fp32: guidance subtracts nearly equal numbers, and softmax runs over thousands."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def generate(
    bundle: Bundle,
    prompts: Sequence[Document],
    options: SamplingOptions | None = None,
    streams: Sequence[int] | None = None,
) -> Iterator[Step]:
    """Replies to prompts, token by token; stop iterating to cancel.

    Args:
        prompts: images as codes (``encode_images``). A prompt that ends in a user turn is answered, any other
            continued.
        options: None takes the model's defaults.
        streams: the numbers of the rows' random streams, by default 0, 1, ...; a reply depends on its prompt, the
            options and its stream, not on its neighbours.

    Yields:
        Steps; within one position in the order of the rows. The codes of an image that beams search for come together,
        when it is found.

    Raises:
        GenerationError: at the call, not at the first step; see ``prepare``.
    """
    job = prepare(bundle, prompts, options or default_options(bundle), streams)
    return _run(bundle, job) if job.prompts else iter(())


def _run(bundle: Bundle, job: Job) -> Iterator[Step]:
    slots = Slots(bundle, job.prompts, job.prefix if job.guided else None, max(row.room for row in job.rows))
    cond_LV, uncond_LV = slots.prefill()
    lanes = {index: [lane] for lane, index in enumerate(job.open_rows())}
    searches: dict[int, Search] = {}
    position = 0
    while True:
        # each open row's next tokens, each with the lane that it goes on from
        found: dict[int, list[tuple[int, int, Kind]]] = {}
        plain = [index for index in lanes if not job.searches(index)]
        at = [lanes[index][0] for index in plain]
        chosen = choose(job, position, plain, cond_LV[at], None if uncond_LV is None else uncond_LV[at])
        for index in lanes:
            if index in chosen:
                steps = job.take({index: chosen[index]}, position)
                found[index] = [(lanes[index][0], steps[0].token, steps[0].kind)]
            else:
                search = searches.setdefault(index, Search.begin(job, index, position))
                own = lanes[index]
                beams = search.extend(cond_LV[own], None if uncond_LV is None else uncond_LV[own])
                tokens = search.ids[:, -1].tolist()
                found[index] = [(own[beam], token, Kind.CODE) for beam, token in zip(beams, tokens, strict=True)]
                if steps := search.steps():
                    del searches[index]
            yield from steps
        rows = job.open_rows()
        if not rows:
            return
        fed = [item for index in rows for item in found[index]]
        slots.select([lane for lane, _, _ in fed])
        cond_LV, uncond_LV = slots.feed([(token, kind) for _, token, kind in fed])
        owners = [index for index in rows for _ in found[index]]
        lanes = {index: [lane for lane, owner in enumerate(owners) if owner == index] for index in rows}
        position += 1
