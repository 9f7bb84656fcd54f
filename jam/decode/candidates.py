"""Several images for one prompt, in one batch, best first.

Half are drawn under guidance with a nucleus, half by contrastive decoding: the two err differently, and CM3Leon's best
results come from both (arXiv 2309.02591, section 3.1 and figure 4). A judge ranks them where one is given (a CLIP,
``jam.evaluate.clip``). Else the model does, from scores that it has computed anyway: by how likely its prompt makes the
codes, or by the ratio of that to how likely nothing makes them. The ratio is what contrastive decoding maximises, and
on the shipped model it puts the worst pictures first (docs/log.md).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from PIL.Image import Image

from jam.decode.engine import run_job
from jam.decode.job import prepare
from jam.decode.options import SamplingOptions
from jam.decode.stream import Reply, ReplyStream
from jam.document import Document
from jam.errors import GenerationError
from jam.models.load import Bundle

MOST = 64  # lanes that one prompt may take
Judge = Callable[[Sequence[Image]], Sequence[float]]
Rank = Literal["likelihood", "ratio"]


@dataclass(frozen=True)
class Candidate:
    """One image: a reply of mode ``image``, how it was drawn, and its score (higher is better; nats where the model
    judged)."""

    reply: Reply
    guidance: str
    score: float


def draw_candidates(
    bundle: Bundle,
    prompt: Document,
    count: int,
    options: SamplingOptions,
    rank: Rank = "likelihood",
    judge: Judge | None = None,
) -> list[Candidate]:
    """``count`` replies of one image each, best first.

    Args:
        options: of the nucleus half, in mode ``image``; the other half differs in ``guidance``. ``image_beams`` 1.
        rank: what the model goes by without a judge: the log probability of the codes under the prompt, or what is left
            of it when that under nothing is taken off.
        judge: scores of images.

    Raises:
        GenerationError: a number out of range, beams, a greedy temperature, or more images than one a reply.
    """
    if not 1 <= count <= MOST:
        raise GenerationError(f"candidates is {count}; required: from 1 to {MOST}; change it")
    if options.image_beams > 1 or (count > 1 and options.image_temperature == 0):
        raise GenerationError(
            f"image_beams is {options.image_beams} and image_temperature {options.image_temperature}; candidates are "
            "drawn by chance, use image_beams 1 and an image_temperature above 0"
        )
    if options.mode != "image" or options.max_images != 1:
        raise GenerationError(
            f"candidates are replies of one image, the mode is {options.mode} and max_images {options.max_images}; use "
            "mode image and max_images 1"
        )
    if rank not in get_args(Rank):
        raise GenerationError(f"rank is {rank!r}; required: {' or '.join(get_args(Rank))}; change it")
    if judge is not None and (bundle.image is None or not bundle.image.makes_images):
        raise GenerationError(f"{bundle.path}: no image tokenizer to make pixels for a judge; leave the judge out")
    contrastive = replace(options, guidance="cd_k", image_guidance_scale=None)
    each = [options if number % 2 == 0 else contrastive for number in range(count)]
    prompts = [prompt] * count
    job = prepare(bundle, prompts, each)
    if judge is None and rank == "ratio" and job.prefix is None:
        raise GenerationError("rank is ratio and nothing guides the image; use rank likelihood, or a guidance_scale")
    job.weigh = judge is None
    stream = ReplyStream(bundle, prompts, each)
    for step in run_job(bundle, job):
        stream.push(step)
    replies = [stream.reply(index) for index in range(count)]
    if judge is not None:
        scores = judge([reply.images[0] for reply in replies])
    else:
        scores = [full - nothing if rank == "ratio" else full for full, nothing in job.likelihoods]
    found = [Candidate(*parts) for parts in zip(replies, (own.guidance for own in each), scores, strict=True)]
    return sorted(found, key=lambda candidate: -candidate.score)
