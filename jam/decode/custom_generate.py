"""jam's decoder under transformers' ``generate``.

    bundle = load_bundle(folder)
    ids = bundle.model.generate(input_ids, attention_mask=mask, custom_generate=custom_generate(bundle))

transformers hands over ids and its generation config; what comes back are the prompts with their replies, padded on the
right. Of its config only ``max_length`` (``max_new_tokens``) counts, as a bound: how to sample say
:class:`jam.decode.options.SamplingOptions`, by modality. transformers does not hand on a streamer; give it here.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from jam.decode.engine import run_job
from jam.decode.job import prepare_ids
from jam.decode.options import SamplingOptions, default_options
from jam.errors import GenerationError
from jam.models.heads import next_heads
from jam.models.load import Bundle
from jam.tokens.render import IMAGE_HEAD
from jam.tokens.vocabulary import Vocabulary


def custom_generate(
    bundle: Bundle, options: SamplingOptions | None = None, streamer: BaseStreamer | None = None
) -> Callable[..., Tensor]:
    """What ``model.generate`` takes as ``custom_generate``.

    Args:
        bundle: the model's folder as ``load_bundle`` reads it; where ``generate`` is another model's, that one runs.
        options: None takes the model's defaults.
        streamer: takes the prompt and then every id; for one prompt, as transformers' own.

    Raises:
        GenerationError: when called, as ``jam.decode.job.prepare``; a prompt that ends inside an image; a streamer
            and several prompts.
    """
    chosen = default_options(bundle) if options is None else options

    def generate(
        model: PreTrainedModel,
        input_ids: Tensor,
        generation_config: GenerationConfig | None = None,
        **given: Any,  # a parameter of another name than transformers' own loops have would be given twice
    ) -> Tensor:
        attention_mask = given.get("attention_mask")
        own = bundle if model is bundle.model else replace(bundle, model=model)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [ids[seen.bool()].tolist() for ids, seen in zip(input_ids.cpu(), real.cpu(), strict=True)]
        for index, ids in enumerate(prompts):
            fills = bool(ids) and ids[-1] == own.vocabulary.controls.get("infill")
            if not ids or (not fills and _within_image(ids, own.vocabulary)):
                state = "ends inside an image" if ids else "is empty"
                raise GenerationError(
                    f"prompt {index} {state}; required: ids that end outside one, as jam.tokens.render writes them; "
                    "leave the control that opens an image to mode image"
                )
        if streamer is not None and len(prompts) > 1:
            raise GenerationError(f"a streamer takes one prompt, there are {len(prompts)}; leave it out")
        bound = chosen
        if generation_config is not None and generation_config.max_length is not None:
            most = max(1, generation_config.max_length - input_ids.shape[1])
            bound = replace(chosen, max_tokens=most if chosen.max_tokens is None else min(most, chosen.max_tokens))
        job = prepare_ids(own, prompts, [bound] * len(prompts))
        if streamer is not None:
            streamer.put(input_ids)
        for step in run_job(own, job):
            if streamer is not None:
                streamer.put(torch.tensor([step.token]))
        if streamer is not None:
            streamer.end()
        pad = own.vocabulary.controls.get("pad", own.vocabulary.controls["eos"])
        longest = max(len(reply) for reply in job.replies)
        replies = [[*reply, *[pad] * (longest - len(reply))] for reply in job.replies]
        return torch.cat([input_ids, torch.tensor(replies, device=input_ids.device)], dim=1)

    return generate


def _within_image(ids: list[int], vocabulary: Vocabulary) -> bool:
    """Whether an image is open at the end; one with a size in text may be, and the text head speaks."""
    if not vocabulary.framed:
        return bool(next_heads(torch.tensor([ids]), vocabulary)[0, -1] == IMAGE_HEAD)
    ends = [index for index in ids if index in (vocabulary.controls["begin_image"], vocabulary.controls["end_image"])]
    return ends[-1:] == [vocabulary.controls["begin_image"]]
