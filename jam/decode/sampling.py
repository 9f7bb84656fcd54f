"""Next-token sampling as pure functions of logits.

The order in which the decoder applies them, and why:

1. ``cfg``, ``cfg3`` or ``cd_k`` blends streams. Blending comes first because it subtracts: a masked ``-inf`` minus
   ``-inf`` is not a number.
2. ``restrict`` leaves what the grammar allows.
3. ``repetition_penalty``, ``temperature``, ``top_k``, then ``top_p`` shape what is left.
4. ``sample`` inverts the distribution function at given uniforms; ``uniforms`` makes those from (seed, row, position)
   alone, so that a row's tokens do not depend on its neighbours in the batch.

Removed ids get ``-inf``. There is no state here and no draw from a global generator.

Shapes: any leading dimensions, V vocabulary (or a slice of it) last.
"""

import math

import numpy as np
import torch
from torch import Tensor

from jam.errors import GenerationError

MAX_SEED = 2**63 - 1


def restrict(logits: Tensor, legal: Tensor) -> Tensor:
    """``-inf`` where ``legal`` (bool, same shape or one that broadcasts) is False.

    >>> restrict(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True]))
    tensor([1., -inf, 3.])
    """
    return logits.masked_fill(~legal, -math.inf)


def temperature(logits: Tensor, value: float) -> Tensor:
    """Logits divided by ``value``; 0 leaves the largest logit alone (the first of equals), which makes sampling argmax.

    >>> temperature(torch.tensor([1.0, 2.0, 4.0]), 2.0)
    tensor([0.5000, 1.0000, 2.0000])
    >>> temperature(torch.tensor([1.0, 4.0, 4.0]), 0.0)
    tensor([-inf, 4., -inf])

    Raises:
        GenerationError: a negative or non-finite value.
    """
    _require(math.isfinite(value) and value >= 0, "temperature", value, "a finite number of at least 0", "0 is greedy")
    if value == 0:
        best = logits.argmax(dim=-1, keepdim=True)
        return restrict(logits, torch.zeros_like(logits, dtype=torch.bool).scatter(-1, best, True))
    return logits / value


def top_k(logits: Tensor, k: int | None) -> Tensor:
    """Keeps the ``k`` largest logits and what equals the k-th; None, or more than there are, keeps all.

    >>> top_k(torch.tensor([3.0, 1.0, 2.0, 2.0]), 2)
    tensor([3., -inf, 2., 2.])

    Raises:
        GenerationError: k below 1.
    """
    if k is None:
        return logits
    _require(k >= 1, "top_k", k, "at least 1", "leave it out to keep every id")
    if k >= logits.shape[-1]:
        return logits
    return restrict(logits, logits >= logits.topk(k, dim=-1).values[..., -1:])


def top_p(logits: Tensor, p: float) -> Tensor:
    """Nucleus (Holtzman et al., arXiv 1904.09751): the fewest most probable ids whose probabilities reach ``p``.

    Probabilities 0.5, 0.3, 0.15, 0.05 at p = 0.7: an id stays while the mass *before* it is below p, that is 0, 0.5,
    0.8, 0.95, so the first two stay. p = 1 keeps all.

    >>> top_p(torch.tensor([0.15, 0.5, 0.05, 0.3]).log(), 0.7).exp()
    tensor([0.0000, 0.5000, 0.0000, 0.3000])

    Raises:
        GenerationError: p outside (0, 1].
    """
    _require(0 < p <= 1, "top_p", p, "above 0 and at most 1", "1 keeps every id")
    if p == 1:  # an exact no-op: the running sum rounds, and may reach 1 before the last id
        return logits
    ordered, order = torch.softmax(logits.double(), dim=-1).sort(dim=-1, descending=True, stable=True)
    kept = ordered.cumsum(dim=-1) - ordered < p
    return restrict(logits, torch.zeros_like(kept).scatter(-1, order, kept))


def cfg(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: ``uncond + scale * (cond - uncond)`` (CM3Leon, arXiv 2309.02591, section 3.1).

    Scale 1 is the conditional stream itself, bit for bit; 0 is the unconditional one.

    >>> cfg(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]), 3.0)
    tensor([-1.,  5.])

    Raises:
        GenerationError: a negative or non-finite scale.
    """
    _require(math.isfinite(scale) and scale >= 0, "guidance_scale", scale, "a finite number of at least 0", "1 is off")
    return cond if scale == 1 else uncond + scale * (cond - uncond)


def cfg3(full: Tensor, images: Tensor, nothing: Tensor, text_scale: float, image_scale: float) -> Tensor:
    """Guidance by text and by images apart: ``nothing + s_i (images - nothing) + s_t (full - images)``.

    InstructPix2Pix, arXiv 2211.09800, section 3.2.1; CM3Leon edits with s_i 1.5 and s_t 7.5 (arXiv 2309.02591).

    Scales 1 and 1 are the full stream up to rounding, 0 and 1 the one that saw the images alone.

    >>> full, images, nothing = torch.tensor([3.0]), torch.tensor([2.0]), torch.tensor([1.0])
    >>> cfg3(full, images, nothing, 7.5, 1.5)
    tensor([10.])

    Raises:
        GenerationError: a negative or non-finite scale.
    """
    for name, scale in (("guidance_scale", text_scale), ("image_guidance_scale", image_scale)):
        _require(math.isfinite(scale) and scale >= 0, name, scale, "a finite number of at least 0", "1 is off")
    return nothing + image_scale * (images - nothing) + text_scale * (full - images)


def repetition_penalty(logits: Tensor, used: Tensor, penalty: float) -> Tensor:
    """Logits of ids that were used divided by ``penalty`` where positive, times it where negative (CTRL, arXiv
    1909.05858, as transformers applies it).

    >>> repetition_penalty(torch.tensor([2.0, -2.0, 1.0]), torch.tensor([True, True, False]), 2.0)
    tensor([ 1., -4.,  1.])

    Args:
        used: bool, the shape of ``logits``.

    Raises:
        GenerationError: a penalty that is not a positive finite number.
    """
    _require(0 < penalty < math.inf, "repetition_penalty", penalty, "a positive number", "1 is off")
    if penalty == 1:
        return logits
    return torch.where(used, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def cd_k(p_exp: Tensor, p_ama: Tensor, alpha: float, k: int) -> Tensor:
    """Contrastive decoding with a k-th-best threshold, CD-K (CM3Leon, arXiv 2309.02591, section 3.1).

    ``log(p_exp / p_ama)`` on the ids whose expert probability reaches ``alpha`` times the k-th largest, ``-inf``
    elsewhere. k = 1 is contrastive decoding (Li et al., arXiv 2210.15097). The result is a row of logits.

    Expert 0.6, 0.3, 0.1 and alpha 0.6: with k = 1 the threshold is 0.36 and one id is left, with k = 2 it is 0.18
    and two are: one dominant id no longer makes the choice greedy.

    >>> expert, amateur = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    >>> cd_k(expert, amateur, 0.6, 1)
    tensor([0.6931,   -inf,   -inf])
    >>> cd_k(expert, amateur, 0.6, 2)
    tensor([0.6931, 0.0000,   -inf])

    Args:
        p_exp: probabilities of the conditional stream.
        p_ama: probabilities of the unconditional stream; a zero that underflowed counts as the smallest normal number.
        alpha: in [0, 1]; 0 keeps every id that the expert gives any probability.

    Raises:
        GenerationError: alpha outside [0, 1], k below 1 or above the number of ids.
    """
    _require(0 <= alpha <= 1, "alpha", alpha, "in [0, 1]", "0 keeps every id")
    _require(1 <= k <= p_exp.shape[-1], "k", k, f"from 1 to {p_exp.shape[-1]}", "1 is plain contrastive decoding")
    threshold = alpha * p_exp.topk(k, dim=-1).values[..., -1:]
    scores = p_exp.log() - p_ama.clamp_min(torch.finfo(p_ama.dtype).tiny).log()
    return restrict(scores, (p_exp >= threshold) & (p_exp > 0))


def extend_beams(scores: Tensor, logits: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """One step of beam search: the ``width`` likeliest continuations of all beams together.

    Two beams of log probability -1 and -2 over three ids; the likeliest three continuations are two of the first
    beam and one of the second:

    >>> logits = torch.tensor([[0.5, 0.4, 0.1], [0.9, 0.05, 0.05]]).log()
    >>> scores, beams, ids = extend_beams(torch.tensor([-1.0, -2.0]), logits, 3)
    >>> beams.tolist(), ids.tolist()
    ([0, 0, 1], [0, 1, 0])

    Args:
        scores: [W] log probabilities of the beams.
        logits: [W, V] of their next ids; they are normalised here.

    Returns:
        scores [M], likeliest first; int64 [M], the beam each goes on from; int64 [M], its id; M = min(width, W V).
    """
    totals = (scores[:, None] + torch.log_softmax(logits, dim=-1)).flatten()
    best, at = totals.topk(min(width, totals.numel()))
    return best, at // logits.shape[-1], at % logits.shape[-1]


def uniform(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) from Philox (Salmon et al., SC 2011) with key (seed, row) and counter ``position``.

    >>> uniform(0, 0, 0) == uniform(0, 0, 0), uniform(0, 0, 0) == uniform(0, 1, 0), uniform(0, 0, 0) == uniform(0, 0, 1)
    (True, False, False)

    Raises:
        GenerationError: a seed outside [0, 2**63).
    """
    _require(0 <= seed <= MAX_SEED, "seed", seed, f"from 0 to {MAX_SEED}", "choose another")
    key = np.array([seed, row], dtype=np.uint64)
    counter = np.array([position, 0, 0, 0], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=counter)).random())


def uniforms(seed: int, row: int, count: int, word: int = 0) -> np.ndarray:
    """``uniform`` at positions 0 to ``count`` - 1: float64 [count]. Of a block's four words the first is used; the
    others are numbers of the same positions for other ends.

    >>> bool(uniforms(3, 1, 4)[2] == uniform(3, 1, 2))
    True
    """
    _require(0 <= seed <= MAX_SEED, "seed", seed, f"from 0 to {MAX_SEED}", "choose another")
    key = np.array([seed, row], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random(4 * count)[word::4].copy()


def sample(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Ids by the inverse of the distribution function: the first id whose cumulated probability exceeds its uniform.

    Probabilities 0.25, 0.25, 0.5 cut [0, 1) at 0.25 and 0.5:

    >>> logits = torch.tensor([0.25, 0.25, 0.5]).log().expand(4, 3)
    >>> sample(logits, torch.tensor([0.0, 0.2, 0.3, 0.9]))
    tensor([0, 0, 1, 2])

    Args:
        logits: [..., V], at least one finite value a row; ``-inf`` is never drawn.
        uniforms: [...] in [0, 1).

    Returns:
        int64 [...].
    """
    probabilities = torch.softmax(logits.double(), dim=-1)
    cumulated = probabilities.cumsum(dim=-1)
    target = uniforms.to(cumulated).unsqueeze(-1) * cumulated[..., -1:]
    chosen = (cumulated <= target).sum(dim=-1)
    # u * total may round up to the total itself; the last id with any probability is then the one meant
    index = torch.arange(logits.shape[-1], device=logits.device)
    last = torch.where(probabilities > 0, index, torch.zeros_like(index)).amax(dim=-1)
    return torch.minimum(chosen, last)


def _require(holds: bool, name: str, value: float, required: str, advice: str) -> None:
    if not holds:
        raise GenerationError(f"{name} is {value}; required: {required} ({advice})")
