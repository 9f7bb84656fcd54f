"""The next token of some rows from their scores: guidance, then the shape of the distribution, then a draw.

Every function is one of device tensors and of settings; nothing is read back. The decoder and its oracle both choose
here, so that what they must agree on is the scores.

Shapes: N rows, K codes, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jam.decode import sampling
from jam.decode.options import SamplingOptions


@dataclass(frozen=True)
class Scores:
    """Raw scores [N, K] of the codes after each row in each of its streams; a stream that does not run is None."""

    full: Tensor
    nothing: Tensor | None = None
    images: Tensor | None = None


def guided(options: SamplingOptions, scores: Scores) -> Tensor:
    """[N, K]: the streams blended as the options say. Without streams the prompt's own scores."""
    full = wide(scores.full)
    if scores.nothing is None or not options.guided:
        return full
    nothing = wide(scores.nothing)
    if options.guidance == "cd_k":
        expert, amateur = (torch.softmax(stream, dim=-1) for stream in (full, nothing))
        return sampling.cd_k(expert, amateur, options.cd_alpha, min(options.cd_k, full.shape[-1]))
    if not options.keeps_images:
        return sampling.cfg(full, nothing, options.guidance_scale)
    assert scores.images is not None, "a third stream was asked for and did not run"
    return sampling.cfg3(
        full, wide(scores.images), nothing, options.guidance_scale, float(options.image_guidance_scale or 0)
    )


def choose_codes(options: SamplingOptions, scores: Scores, uniforms_N: Tensor, used_NK: Tensor | None) -> Tensor:
    """int64 [N]: the number of the next code of each row.

    Args:
        used_NK: bool, the codes that the image at hand has; None where repetition costs nothing.
    """
    logits = guided(options, scores)
    if used_NK is not None:
        logits = sampling.repetition_penalty(logits, used_NK, options.image_repetition_penalty)
    if options.image_temperature == 0:
        return logits.argmax(dim=-1)  # what the rest would come to
    return sampling.sample(_shaped(options, logits), uniforms_N)


def distribution(options: SamplingOptions, scores: Scores) -> Tensor:
    """float64 [N, K]: what ``choose_codes`` draws from."""
    return torch.softmax(_shaped(options, guided(options, scores)).double(), dim=-1)


def _shaped(options: SamplingOptions, logits: Tensor) -> Tensor:
    logits = sampling.temperature(logits, options.image_temperature)
    return sampling.top_p(sampling.top_k(logits, options.image_top_k), options.image_top_p)


def choose_text(
    options: SamplingOptions, logits_NV: Tensor, legal_NV: Tensor, uniforms_N: Tensor, used_NV: Tensor | None
) -> Tensor:
    """int64 [N]: the next id of each row that writes, one that the grammar allows (``legal_NV``, bool).

    Args:
        used_NV: bool, the ids that prompt and reply have; None where repetition costs nothing.
    """
    logits = wide(logits_NV)
    if used_NV is not None:
        logits = sampling.repetition_penalty(logits, used_NV, options.text_repetition_penalty)
    logits = sampling.restrict(logits, legal_NV)
    if options.text_temperature == 0:
        return logits.argmax(dim=-1)
    logits = sampling.temperature(logits, options.text_temperature)
    logits = sampling.top_p(sampling.top_k(logits, options.text_top_k), options.text_top_p)
    return sampling.sample(logits, uniforms_N)


def used(history: Sequence[Sequence[int]], size: int, device: torch.device) -> Tensor:
    """bool [N, size]: which ids each history holds."""
    flags = torch.zeros(len(history), size, dtype=torch.bool)
    for row, ids in enumerate(history):
        flags[row, list(ids)] = True
    return flags.to(device)


def wide(logits: Tensor) -> Tensor:
    """Half precision to fp32: guidance subtracts nearly equal numbers, and softmax runs over thousands."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
