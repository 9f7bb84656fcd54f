"""The decoder loop: text, images and text again in one cached stream, many rows at once.

Stages:
1. ``prepare`` renders the prompts, checks that they fit, and sets one grammar a row.
2. Prefill: conditional rows and, under them in the same batch, one guidance row each. Prompts are left-padded.
3. Loop: guide, restrict to the grammar, sample, yield, feed one slot.

Guidance (classifier-free) needs the same image without its text. A guidance row holds the unconditional prefix
(``<s><mask>``) in its last prefill slots. While its row writes text it is fed padding that nobody sees. At each
``<break>`` its mask is set back to the prefix and the slot of the ``<break>``, and its positions go on from the prefix,
so an image costs no second prefill:

    slot        0      1      2       3     4     5        6      7      8
    row         <s>    a      cat     is    red   <break>  c      c      <break>
    guidance    .      <s>    <mask>  .     .     <break>  c      c      .
    position           0      1                   2        3      4

Masks are explicit, 4D, over cache slots, and so are positions: learned positions would otherwise count the gaps.
The loop without a cache, in ``jam.decode.naive``, is the oracle of this one.

Shapes: R replies, B batch rows (R, or 2R with guidance), P prompt slots, S slots, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jam.decode import sampling
from jam.decode.grammar import Kind, Mode, Phase, Row, Rules, StopReason
from jam.document import Document
from jam.errors import GenerationError
from jam.models.heads import next_heads
from jam.models.load import Bundle
from jam.tokens.render import TEXT_HEAD, render


@dataclass(frozen=True)
class SamplingOptions:
    """How to reply. ``max_tokens`` counts every token of the reply, image codes and controls included.

    Mode ``image`` makes at least one image and no text. Guidance scale 1 is off and costs nothing.

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
    guidance_scale: float = 3.0

    def __post_init__(self) -> None:
        _at_least_zero("text_temperature", self.text_temperature)
        _at_least_zero("image_temperature", self.image_temperature)
        _at_least_zero("guidance_scale", self.guidance_scale)
        _check("text_top_p", self.text_top_p, 0 < self.text_top_p <= 1, "above 0 and at most 1")
        _check("image_top_p", self.image_top_p, 0 < self.image_top_p <= 1, "above 0 and at most 1")
        _check(
            "image_top_k", self.image_top_k, self.image_top_k is None or self.image_top_k >= 1, "at least 1, or none"
        )
        _check("max_tokens", self.max_tokens, self.max_tokens >= 1, "at least 1")
        _check("seed", self.seed, 0 <= self.seed <= sampling.MAX_SEED, f"from 0 to {sampling.MAX_SEED}")


def _check(name: str, value: float | None, holds: bool, required: str) -> None:
    if not holds:
        raise GenerationError(f"{name} is {value}; required: {required}; change it")


def _at_least_zero(name: str, value: float) -> None:
    _check(name, value, 0 <= value < math.inf, "a finite number of at least 0")


@dataclass(frozen=True)
class Step:
    """One token of one reply. ``stop`` is set on the last one."""

    row: int
    position: int
    token: int
    kind: Kind
    stop: StopReason | None


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
        logits = _wide(cond_NV[drawing, span.start : span.stop])
        if uncond_NV is not None:
            logits = sampling.cfg(logits, _wide(uncond_NV[drawing, span.start : span.stop]), options.guidance_scale)
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


def _wide(logits: Tensor) -> Tensor:
    """Half precision to fp32: guidance subtracts nearly equal numbers, and softmax runs over thousands."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


class _Slots:
    """The cache and, for every batch row, which slots it sees and at which position it stands."""

    def __init__(self, bundle: Bundle, job: Job):
        self.bundle, self.job = bundle, job
        self.device = bundle.model.device
        self.replies = len(job.prompts)
        starts = list(job.prompts) + ([job.prefix] * self.replies if job.guided else [])
        self.width = max(len(ids) for ids in starts)
        self.pad = bundle.vocabulary.controls.get("pad", bundle.vocabulary.controls["eos"])
        slots = self.width + max(row.room for row in job.rows)
        self.starts = starts
        self.seen_BS = torch.zeros(len(starts), slots, dtype=torch.bool)
        self.next_B = torch.tensor([len(ids) for ids in starts])
        for row, ids in enumerate(starts):
            self.seen_BS[row, self.width - len(ids) : self.width] = True
        self.filled = self.width
        self.cache = None

    def prefill(self) -> Tensor:
        """Logits [B, V] after the prompts."""
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

    def feed(self, steps: Sequence[Step]) -> Tensor:
        """Puts one token into every row and returns the logits [B, V] after it."""
        batch, slot = len(self.starts), self.filled
        ids_B = torch.full((batch,), self.pad)
        positions_B = torch.zeros(batch, dtype=torch.int64)
        heads_B = torch.full((batch,), TEXT_HEAD)
        for step in steps:
            live = [step.row]
            if self.job.guided and step.kind in (Kind.BEGIN, Kind.CODE):
                guidance = self.replies + step.row
                live.append(guidance)
                if step.kind is Kind.BEGIN:  # back to the prefix: earlier images and the text between stay hidden
                    self.seen_BS[guidance] = False
                    self.seen_BS[guidance, self.width - len(self.job.prefix) : self.width] = True
                    self.next_B[guidance] = len(self.job.prefix)
            for row in live:
                ids_B[row], positions_B[row] = step.token, self.next_B[row]
                heads_B[row] = self.job.rows[step.row].head
                self.next_B[row] += 1
                self.seen_BS[row, slot] = True
        self.filled += 1
        mask_B1S = self.seen_BS[:, None, : self.filled].clone()
        mask_B1S[:, :, slot] = True  # rows that wait see their padding now and hide it later
        return self._forward(ids_B[:, None], heads_B[:, None], mask_B1S, positions_B[:, None])

    @torch.inference_mode()
    def _forward(self, ids_BT: Tensor, heads_BT: Tensor, mask_BTS: Tensor, positions_BT: Tensor) -> Tensor:
        logits_BTV, self.cache = self.bundle.logits(
            ids_BT.to(self.device),
            heads_BT.to(self.device),
            attention_mask=mask_BTS[:, None].to(self.device),
            position_ids=positions_BT.to(self.device),
            past_key_values=self.cache,
            use_cache=True,
        )
        return logits_BTV[:, -1]


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
        options: None takes the defaults.
        streams: the numbers of the rows' random streams, by default 0, 1, ...; a reply depends on its prompt, the
            options and its stream, not on its neighbours.

    Yields:
        Steps; within one position in the order of the rows.

    Raises:
        GenerationError: at the call, not at the first step; see ``prepare``.
    """
    job = prepare(bundle, prompts, options or SamplingOptions(), streams)
    return _run(bundle, job) if job.prompts else iter(())


def _run(bundle: Bundle, job: Job) -> Iterator[Step]:
    slots = _Slots(bundle, job)
    logits_BV = slots.prefill()
    position = 0
    while True:
        rows = job.open_rows()
        uncond_NV = logits_BV[[slots.replies + row for row in rows]] if job.guided else None
        steps = job.take(choose(job, position, rows, logits_BV[rows], uncond_NV), position)
        yield from steps
        if not job.open_rows():
            return
        logits_BV = slots.feed(steps)
        position += 1
