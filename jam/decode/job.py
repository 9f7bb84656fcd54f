"""A call before it runs: prompts as ids, what each row may say and how it is drawn, and every check that can be made.

Nothing here runs a network. Shapes: N rows, V vocabulary, K codes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from jam.decode import sampling
from jam.decode.choose import used
from jam.decode.grammar import Kind, Phase, Row, Rules, Step
from jam.decode.options import SamplingOptions, default_options
from jam.decode.stop import StopText
from jam.document import CodesPart, Document, Hole
from jam.errors import DataError, GenerationError
from jam.models.heads import next_heads
from jam.models.load import Bundle
from jam.tokens.frame import frame_of
from jam.tokens.render import IMAGE_HEAD, NO_HOLES, render
from jam.tokens.text import TextStream, TextTokenizer
from jam.tokens.vocabulary import Vocabulary

TEXT_TOKENS = 400  # of a reply whose length nobody says
MANY_IMAGES = 4  # in such a reply, where their number is left to the model
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
        return self.options[index].image_beams > 1 and self.rows[index].drawing

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
            inside = _inside(self.prompts[index], self.rows[index].rules)
            self._texts[index] = TextStream(self.tokenizer, inside), StopText(self.options[index].stop)
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

    def draws(self, index: int) -> Tensor:
        """float64 [tokens possible, 3]: a row's numbers for speculative decoding, the first those of ``uniforms``."""
        seed, room = self.options[index].seed, self.rows[index].room
        words = [sampling.uniforms(seed, self.streams[index], room, word) for word in range(3)]
        return torch.from_numpy(np.stack(words, axis=-1))

    def used_codes(self, indices: Sequence[int], device: torch.device) -> Tensor | None:
        """bool [N, K]: the codes that each row's image at hand has; None where no row minds."""
        if all(self.options[index].image_repetition_penalty == 1 for index in indices):
            return None
        vocabulary = self.rows[indices[0]].rules.vocabulary
        start, stop = vocabulary.image_span.start, vocabulary.image_span.stop
        last = [self.replies[index][len(self.replies[index]) - self.rows[index].place :] for index in indices]
        codes = [[token - start for token in ids if start <= token < stop] for ids in last]
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

    def encode(images: list) -> list[CodesPart]:
        if bundle.image is None:
            raise GenerationError(
                f"{bundle.path}: the prompt holds {len(images)} images and this model has no image tokenizer; "
                "leave the images out or use a model that reads images"
            )
        if not bundle.vocabulary.framed:
            return [CodesPart(tuple(row)) for row in bundle.image.encode(images).tolist()]
        found = (bundle.image.read(image, bundle.vocabulary) for image in images)
        return [CodesPart(codes, grid=grid) for codes, grid in found]

    return document.with_codes(encode)


def rules_of(bundle: Bundle, options: SamplingOptions, hole: Hole | None = None) -> Rules:
    """What a reply may hold by the options, and the frame of its images; ``hole``: what it fills.

    Raises:
        GenerationError: as :class:`Rules`; a size of images that this model does not make.
    """
    bounds = (hole or options.mode, options.min_images, options.max_images, hole)
    vocabulary = bundle.vocabulary
    if bounds[0] == "text" or not vocabulary.codes_per_image:
        return Rules(vocabulary, *bounds)
    if hole == "image" and vocabulary.framed:
        raise GenerationError(f"{bundle.path}: {NO_HOLES}")
    try:
        return Rules(vocabulary, *bounds, frame_of(vocabulary, bundle.text, _grid(bundle, options)))
    except DataError as error:
        raise GenerationError(f"{bundle.path}: {error}") from None


def _grid(bundle: Bundle, options: SamplingOptions) -> tuple[int, int] | None:
    """Rows and columns of the size that was asked for; None is the model's own."""
    if options.image_sides is None:
        return None
    asked, image, (width, height) = f"image_size is {options.image_size}", bundle.image, options.image_sides
    if image is None:
        raise GenerationError(f"{bundle.path}: {asked} and there is no image tokenizer to count pixels; leave it out")
    if not bundle.vocabulary.framed:
        if (width, height) != (image.resolution, image.resolution):
            own = f"{image.resolution}x{image.resolution}"
            raise GenerationError(f"{bundle.path}: {asked}, this model's images are all {own}; leave it out")
        return None
    if width % image.factor or height % image.factor:
        raise GenerationError(
            f"{bundle.path}: {asked}; both sides must be multiples of {image.factor} px, the size of a code: change it"
        )
    rows, columns = height // image.factor, width // image.factor
    if rows * columns > context_length(bundle):
        raise GenerationError(
            f"{bundle.path}: {asked}, {rows * columns} codes, and the model's context is {context_length(bundle)}; "
            "choose a smaller one"
        )
    return rows, columns


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


def budget(rules: Rules, options: SamplingOptions) -> int:
    """Tokens that a reply may have, the context aside."""
    if options.max_tokens is not None:
        return options.max_tokens
    if not rules.may_draw:
        return TEXT_TOKENS
    images = MANY_IMAGES if rules.most_images == math.inf else int(rules.most_images)
    return TEXT_TOKENS + images * rules.image_tokens


def prepare_ids(
    bundle: Bundle,
    prompts: Sequence[list[int]],
    options: Sequence[SamplingOptions],
    streams: Sequence[int] | None = None,
) -> Job:
    """As ``prepare``, from ids that stand outside an image, or end in ``<infill>``, and one set of options a prompt."""
    context, rows = context_length(bundle), []
    for index, (tokens, own) in enumerate(zip(prompts, options, strict=True)):
        where = f"prompt {index}: " if len(prompts) > 1 else ""
        hole = _hole_of(tokens, bundle.vocabulary)
        if hole is not None and own.mode in ("text", "image") and own.mode != hole:
            raise GenerationError(
                f"{where}the hole in the prompt takes {hole} and mode is {own.mode}; required: mode {hole}, change it "
                "or the hole"
            )
        rules = rules_of(bundle, own, hole)
        left = context - len(tokens)
        if left < rules.needed_tokens:
            drawn = 0 if bundle.vocabulary.image_span is None else len(_images_of(bundle, tokens))
            in_images, what = (f", {drawn} of them in images,", "images") if drawn else ("", "turns")
            raise GenerationError(
                f"{where}the prompt has {len(tokens)} tokens{in_images} and the model's context {context}; the reply "
                f"needs room for {rules.needed_tokens} more; shorten the prompt or leave {what} out"
            )
        most = budget(rules, own)
        if most < rules.needed_tokens:
            raise GenerationError(
                f"max_tokens is {most}; a reply with {rules.needed_images} images needs "
                f"{rules.needed_tokens} ({rules.image_tokens} an image and 1 to end); raise max_tokens"
            )
        rows.append(Row(rules, min(left, most)))
    _check_guessing(bundle, options)
    numbers = list(range(len(rows)) if streams is None else streams)
    if len(numbers) != len(rows) or not all(type(number) is int and 0 <= number < 1 << 64 for number in numbers):
        raise GenerationError(
            f"streams are {numbers!r:.100} for {len(rows)} prompts; required: one whole number from 0 to 2**64 - 1 each"
        )
    job = Job(list(options), list(prompts), rows, numbers, tokenizer=bundle.text)
    # where no whole image fits none is opened, and nothing needs guidance
    drawers = [index for index, row in enumerate(rows) if row.rules.may_draw and row.room > row.rules.image_tokens]
    guided_rows = [index for index in drawers if options[index].guided]
    if guided_rows:
        job.prefix = _unconditional_prefix(bundle)
        needed = len(job.prefix) + max(rows[index].rules.image_tokens for index in drawers)
        if needed > context:
            raise GenerationError(
                f"the model's context is {context}; guidance needs {needed} for one image; set guidance_scale to 1"
            )
    if any(options[index].keeps_images for index in guided_rows):
        job.kept = [[*job.prefix, *_images_of(bundle, tokens)] for tokens in prompts]
        for index in range(len(rows)):  # it runs under all
            rules, most = rows[index].rules, rows[index].room
            size = rules.image_tokens
            drawn = int(min(rules.most_images, most // size)) * size if rules.may_draw else 0
            if len(job.kept[index]) + drawn > context:
                raise GenerationError(
                    f"the model's context is {context}; the stream that keeps images needs "
                    f"{len(job.kept[index]) + drawn}; set max_images lower, or leave image_guidance_scale out"
                )
    return job


def _check_guessing(bundle: Bundle, options: Sequence[SamplingOptions]) -> None:
    window = max((own.jacobi_window for own in options), default=1)
    if window > 1 and len(options) > 1:
        raise GenerationError(
            f"jacobi_window is {window} and there are {len(options)} replies; required: one reply, whose codes are "
            "guessed ahead; set jacobi_window to 1"
        )
    if window > 1 and bundle.backend is not None:
        raise GenerationError(
            f"jacobi_window is {window} and the model is compiled for one token at a time; use one of the two"
        )


def _hole_of(tokens: Sequence[int], vocabulary: Vocabulary) -> Hole | None:
    """What a prompt that ends in ``<infill>`` wants, as the head rule reads it."""
    if not tokens or tokens[-1] != vocabulary.controls.get("infill"):
        return None
    return "image" if next_heads(torch.tensor([tokens]), vocabulary)[0, -1] == IMAGE_HEAD else "text"


def _inside(prompt: Sequence[int], rules: Rules) -> bool:
    """Whether the reply's text goes on from text: what stands before a hole that it fills."""
    if rules.hole != "text":
        return False
    before = prompt.index(rules.vocabulary.controls["mask"]) - 1
    return before >= 0 and bool(rules.is_text[prompt[before]])


def _images_of(bundle: Bundle, tokens: Sequence[int]) -> list[int]:
    """The ids of a prompt's images alone, each between its controls."""
    controls, span = bundle.vocabulary.controls, bundle.vocabulary.image_span
    found: list[int] = []
    if bundle.vocabulary.framed:  # opens and closes with two ids
        within = False
        for token in tokens:
            within = within or token == controls["begin_image"]
            found += [token] if within else []
            within = within and token != controls["end_image"]
        return found
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
