"""A bundle as transformers' any-to-any pipeline.

    pipe = any_to_any(load_bundle(folder))
    pipe(text="a red circle", generation_mode="image")[0]["generated_image"]
    pipe([{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "and?"}]}])

The pipeline asks for a model that says its modalities, generates one of them and decodes image tokens, and for a
processor from prompts to ids and from what was generated to text or pictures. Both stand here, around a bundle whose
network stays as it is: prompts go through ``jam.tokens.render``, replies come from ``jam.decode.custom_generate``.
They serve ``transformers.pipeline("any-to-any", model=..., processor=...)`` too.

Shapes: B prompts, T tokens, R their replies, N codes of an image, S pixels a side.
"""

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image as Pil
from torch import Tensor
from transformers import AnyToAnyPipeline, BatchFeature, GenerationConfig, PreTrainedConfig
from transformers.generation.streamers import BaseStreamer

from jam.decode.custom_generate import custom_generate
from jam.decode.job import TEXT_TOKENS, encode_images, rules_of
from jam.decode.options import SamplingOptions, default_options
from jam.document import Document, TextPart, from_messages, user_turn
from jam.errors import DataError, GenerationError
from jam.models.load import Bundle
from jam.tokens.frame import read_grid
from jam.tokens.image import opaque, open_image
from jam.tokens.render import parse, render

Picture = Pil.Image | str | Path
_TRANSFORMERS_OWN = {"transformers_version", "pad_token_id", "bos_token_id", "eos_token_id", "tokenizer"}


def any_to_any(bundle: Bundle, options: SamplingOptions | None = None) -> AnyToAnyPipeline:
    """The pipeline, on the device where the model is.

    Args:
        options: how to reply, but for the mode; None takes the model's defaults. A call changes them by name:
            ``generate_kwargs={"seed": 3}``.
    """
    model = AnyToAnyModel(bundle, options)
    return JamPipeline(model, processor=AnyToAnyProcessor(bundle), task="any-to-any", device=model.device)


class JamPipeline(AnyToAnyPipeline):
    """transformers' own, but that it calls a class an error which is not in transformers."""

    def check_model_type(self, supported_models: list[str] | dict) -> None:
        pass


class AnyToAnyModel:
    """The model's side: a bundle that generates text or an image by jam's decoder."""

    def __init__(self, bundle: Bundle, options: SamplingOptions | None = None):
        self.bundle, self.options = bundle, options
        # the pipeline would ask for 256 tokens where this said nothing
        self.generation_config = GenerationConfig(max_new_tokens=self._options({}).max_tokens or TEXT_TOKENS)

    @property
    def config(self) -> PreTrainedConfig:
        return self.bundle.model.config

    @property
    def device(self) -> torch.device:
        return self.bundle.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.bundle.model.dtype

    @property
    def input_modalities(self) -> tuple[str, ...]:
        return ("text",) if self.bundle.image is None else ("image", "text")

    @property
    def output_modalities(self) -> tuple[str, ...]:
        """With "image" only where codes can be drawn and made pixels."""
        image = self.bundle.image
        draws = image is not None and image.makes_images and rules_of(self.bundle, self._options({})).can_draw
        return ("image", "text") if draws else ("text",)

    def to(self, device: torch.device) -> "AnyToAnyModel":
        self.bundle.model.to(device)
        return self

    def can_generate(self) -> bool:
        return True

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        generation_mode: str = "text",
        generation_config: GenerationConfig | None = None,
        streamer: BaseStreamer | None = None,
        num_return_sequences: int = 1,
        **said: Any,
    ) -> Tensor:
        """Mode "text": the prompts with their replies, int64 [B, T + R], padded on the right; mode "image": the ids of
        one image's codes, int64 [B, N], with its size and row ends where it carries them.

        Args:
            said: fields of :class:`SamplingOptions`; ``max_new_tokens`` and ``stop_strings`` are transformers' names of
                ``max_tokens`` and ``stop``. An image has its exact length, whatever the first says.

        Raises:
            GenerationError: another mode, a setting that jam's decoder does not have, or one that cannot be served.
        """
        if generation_config is not None:
            said = generation_config.to_diff_dict() | said
        count = said.pop("num_return_sequences", num_return_sequences)
        options = self._options(said)
        vocabulary = self.bundle.vocabulary
        if generation_mode == "image":
            options = replace(options, mode="image", min_images=0, max_images=1)
            rules = rules_of(self.bundle, options)
            options = replace(options, max_tokens=rules.needed_tokens)
        elif generation_mode == "text":
            options = replace(options, mode="text", min_images=0)
        else:
            raise GenerationError(f"generation_mode is {generation_mode!r}; required: text or image; choose one")
        if type(count) is not int or count < 1:
            raise GenerationError(f"num_return_sequences is {count!r}; required: a whole number from 1; change it")
        input_ids = input_ids.repeat_interleave(count, 0)
        mask = None if attention_mask is None else attention_mask.repeat_interleave(count, 0)
        run = custom_generate(self.bundle, options, streamer)
        found = run(self.bundle.model, input_ids, attention_mask=mask)
        if generation_mode == "text":
            return found
        first = input_ids.shape[1] + 1  # after the control that opens the image
        return found[:, first : first + (len(rules.image) if vocabulary.framed else rules.image.codes)]

    def decode_image_tokens(self, image_tokens: Tensor) -> Tensor:
        """Ids of codes, int64 [B, N], as ``generate`` gives them, to pixels, uint8 [B, H, W, 3].

        Raises:
            JamError: no image tokenizer with a decoder, ids that are not those of whole images, or several sizes.
        """
        image, span = self.bundle.image, self.bundle.vocabulary.image_span
        if image is None or span is None:
            raise GenerationError(f"{self.bundle.path}: no image tokenizer to decode images with; use a model with one")
        ids, vocabulary = image_tokens.cpu().numpy(), self.bundle.vocabulary
        grids = [read_grid(row.tolist(), 0, vocabulary, self.bundle.text) for row in ids]
        if len(set(grids)) > 1:
            raise GenerationError(f"images of {len(set(grids))} sizes, which no one tensor holds; decode each alone")
        if vocabulary.framed:
            ids = [row[(row >= span.start) & (row < span.stop)] for row in ids]
        # alone, as a stream does: a batch may round otherwise
        decoded = [image.decode(row[None] - span.start, grid)[0] for row, grid in zip(ids, grids, strict=True)]
        return torch.from_numpy(np.stack([np.asarray(picture) for picture in decoded]))

    def _options(self, said: dict[str, Any]) -> SamplingOptions:
        said = {name: value for name, value in said.items() if name not in _TRANSFORMERS_OWN and value is not None}
        for theirs, ours in (("max_new_tokens", "max_tokens"), ("stop_strings", "stop")):
            if theirs in said:
                said[ours] = said.pop(theirs)
        known = {field.name for field in fields(SamplingOptions)} - {"mode", "min_images", "max_images"}
        if unknown := sorted(said.keys() - known):
            raise GenerationError(
                f"{', '.join(unknown)}: no setting of jam's decoder; known are {', '.join(sorted(known))}; use these"
            )
        if isinstance(said.get("stop"), str):
            said["stop"] = (said["stop"],)
        return default_options(self.bundle, **said) if self.options is None else replace(self.options, **said)


class AnyToAnyProcessor:
    """The processor's side: prompts to ids, text alone or with images, and what was generated to text or pictures."""

    def __init__(self, bundle: Bundle):
        controls, self.bundle = bundle.vocabulary.controls, bundle
        # how to pad is all that the pipeline asks of it; one that reads text would read a typed control as one
        self.tokenizer = SimpleNamespace(pad_token_id=controls.get("pad", controls["eos"]), padding_side="left")

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]] | None = None,
        **given: Any,
    ) -> BatchFeature:
        """What ``jam generate`` takes to int64 ``input_ids`` and ``attention_mask`` [B, T], padded on the left.

        Args:
            text: each ``<image>`` in it stands for one of its images, without any they come first.
            images: those of the text; of several texts one each, or a list each.

        Raises:
            JamError: no text, markers and images of other numbers, an image that cannot be read, other modalities.
        """
        _refuse(given, "return_tensors", "padding")
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts:
            raise GenerationError("there is no text; give some, beside images too")
        shown = _listed(images)
        each = [shown] if isinstance(text, str) else [_listed(own) for own in shown] or [[]] * len(texts)
        if len(each) != len(texts):
            raise GenerationError(
                f"there are {len(texts)} texts and images for {len(each)}; give each its image, or a list each"
            )
        role = "user" if self.bundle.vocabulary.converses else "document"
        turns = [user_turn(said, [_opened(one) for one in own]) for said, own in zip(texts, each, strict=True)]
        return self._ids([Document(tuple(replace(part, role=role) for part in turn)) for turn in turns])

    def apply_chat_template(
        self,
        messages: Sequence[dict],
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
        processor_kwargs: dict | None = None,
        **given: Any,
    ) -> BatchFeature:
        """One conversation as ``__call__`` gives prompts. Its images stand under ``image`` (PIL), ``path`` or ``url``
        (a path): nothing is fetched.

        Raises:
            JamError: messages that are not such, a model that cannot converse, or a reply asked of the wrong speaker.
        """
        _refuse(given | (processor_kwargs or {}), "return_tensors", "padding", "tokenize", "return_dict")
        images: list[Any] = []

        def numbered(block: object) -> object:
            if not (isinstance(block, dict) and block.get("type") == "image"):
                return block
            images.append(next((block[key] for key in ("image", "path", "url") if key in block), None))
            return {"type": "image", "path": str(len(images) - 1)}

        def plain(message: object) -> object:
            if not (isinstance(message, dict) and isinstance(message.get("content"), list)):
                return message
            return message | {"content": [numbered(block) for block in message["content"]]}

        document = from_messages([plain(message) for message in messages], lambda at: _opened(images[int(at)]))
        goes_on = document.parts[-1].role == "assistant"
        if goes_on != continue_final_message or add_generation_prompt == continue_final_message:
            raise GenerationError(
                f"the last message is the {document.parts[-1].role}'s and continue_final_message is "
                f"{continue_final_message}; jam answers a user and goes on with an assistant, leave it out"
            )
        if goes_on and not (isinstance(messages[-1]["content"], list) and isinstance(document.parts[-1], TextPart)):
            raise GenerationError(  # the pipeline lays the reply onto that part
                "the last message is the assistant's and does not end in a part of text; required: content "
                "[..., {type: text, text: ...}]; write it so"
            )
        return self._ids([document])

    def post_process_multimodal_output(
        self, generated: Tensor, skip_special_tokens: bool = True, generation_mode: str | None = None, **given: Any
    ) -> list[str] | list[Pil.Image]:
        """int64 [B, T] to texts without controls and images, or pixels uint8 [B, S, S, 3] to pictures.

        Raises:
            GenerationError: controls asked for as text.
        """
        if generation_mode == "image":
            return [Pil.fromarray(pixels) for pixels in generated.cpu().numpy()]
        if not skip_special_tokens or given.get("clean_up_tokenization_spaces"):
            raise GenerationError(
                "skip_special_tokens False or clean_up_tokenization_spaces True; jam gives text as the tokenizer reads "
                "it, without controls; leave both out"
            )
        return [self._text(ids) for ids in generated.tolist()]

    def _ids(self, prompts: list[Document]) -> BatchFeature:
        vocabulary, text, pad = self.bundle.vocabulary, self.bundle.text, self.tokenizer.pad_token_id
        coded = [encode_images(self.bundle, prompt) for prompt in prompts]
        rows = [render(prompt, vocabulary, text, complete=False).ids.tolist() for prompt in coded]
        spare = [max(map(len, rows)) - len(row) for row in rows]
        ids = torch.tensor([[pad] * empty + row for empty, row in zip(spare, rows, strict=True)])
        mask = torch.tensor([[0] * empty + [1] * len(row) for empty, row in zip(spare, rows, strict=True)])
        return BatchFeature({"input_ids": ids, "attention_mask": mask})

    def _text(self, ids: list[int]) -> str:
        pad, turns = self.tokenizer.pad_token_id, self.bundle.vocabulary.turns
        own = len(list(takewhile(pad.__eq__, turns.opening if turns else ())))  # eos may pad, and open a conversation
        ids = ids[max(0, len(list(takewhile(pad.__eq__, ids))) - own) :]
        ids = ids[: len(ids) - len(list(takewhile(pad.__eq__, reversed(ids))))]
        document = parse(ids, self.bundle.vocabulary, self.bundle.text)
        return "".join(part.text for part in document.parts if isinstance(part, TextPart))


def _listed(images: Any) -> list:
    """One picture, several or none, as a list."""
    return [images] if isinstance(images, Picture) else list(() if images is None else images)


def _opened(image: object) -> Pil.Image:
    """RGB. Raises DataError for what is no image, and as ``open_image``."""
    if isinstance(image, Pil.Image):
        return opaque(image)
    if not isinstance(image, str | Path):
        raise DataError(f"an image is a {type(image).__name__}; a PIL image or the path of a file is required")
    return open_image(Path(image))


def _refuse(given: dict[str, Any], *served: str) -> None:
    """Raises GenerationError for a setting that is neither served by name nor empty."""
    if unknown := sorted(name for name, value in given.items() if name not in served and value is not None):
        raise GenerationError(
            f"{', '.join(unknown)}: nothing that jam's processor takes; give text and images, and how to reply as "
            "generate_kwargs"
        )
