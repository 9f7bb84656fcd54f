"""The decoder as one would first write it: the oracle of ``jam.decode.engine``.

One row at a time, a full forward of everything at each step, no cache, no padding, no mask; the unconditional stream
of an image is a sequence of its own, ``<s><mask><break>`` and the codes so far. Heads come from the ids
(``jam.models.heads.next_heads``), not from the grammar's state. What it shares with the engine is the choice of a token
from given logits. Far too slow for use: a reply of n tokens costs n forwards of up to n tokens.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from jam.decode.engine import Job, SamplingOptions, Search, choose, default_options, prepare
from jam.decode.grammar import Phase, Step
from jam.document import Document
from jam.models.heads import next_heads
from jam.models.load import Bundle


def generate_naive(
    bundle: Bundle,
    prompts: Sequence[Document],
    options: SamplingOptions | None = None,
    streams: Sequence[int] | None = None,
) -> Iterator[Step]:
    """Same arguments, steps and errors as ``jam.decode.engine.generate``; the rows come one after the other."""
    job = prepare(bundle, prompts, options or default_options(bundle), streams)
    return (step for index in range(len(job.prompts)) for step in _run_row(bundle, job, index))


def _run_row(bundle: Bundle, job: Job, index: int) -> Iterator[Step]:
    row, begin = job.rows[index], bundle.vocabulary.controls.get("begin_image")
    ids = list(job.prompts[index])
    position = 0
    while row.phase is not Phase.DONE:
        if job.searches(index):
            steps = _search(bundle, job, index, ids, position)
            yield from steps
            ids += [step.token for step in steps]
            position += len(steps)
            continue
        cond = _last_logits(bundle, ids)
        uncond = None
        if job.guided and row.phase is Phase.IMAGE:
            codes = ids[len(ids) - row.codes :]
            uncond = _last_logits(bundle, [*job.prefix, begin, *codes])
        (step,) = job.take(choose(job, position, [index], cond, uncond), position)
        yield step
        ids.append(step.token)
        position += 1


def _search(bundle: Bundle, job: Job, index: int, ids: list[int], position: int) -> list[Step]:
    """The codes of an image that beams search for, every beam from its beginning at every step."""
    search, begin = Search.begin(job, index, position), bundle.vocabulary.controls["begin_image"]
    while job.searches(index):
        beams = search.ids.tolist()
        cond = torch.cat([_last_logits(bundle, [*ids, *codes]) for codes in beams])
        uncond = None
        if job.guided:
            uncond = torch.cat([_last_logits(bundle, [*job.prefix, begin, *codes]) for codes in beams])
        search.extend(cond, uncond)
    return search.steps()


@torch.inference_mode()
def _last_logits(bundle: Bundle, ids: list[int]) -> Tensor:
    """Logits [1, V] after a sequence."""
    ids_1T = torch.tensor([ids], device=bundle.model.device)
    positions_1T = torch.arange(len(ids), device=bundle.model.device)[None]
    heads_1T = next_heads(ids_1T, bundle.vocabulary)
    return bundle.logits(ids_1T, heads_1T, position_ids=positions_1T)[0][:, -1]
