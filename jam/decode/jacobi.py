"""Several codes of one image from one forward, with the distribution of drawing them one by one.

Speculative Jacobi decoding (Teng et al., arXiv 2410.01699, section 4): the next codes are guessed, one forward scores
all guesses, those that stand are kept, and what it says about the places after them, whatever stands there, draws the
next guesses. A guess stands with probability p / q, of its probability now over that when it was drawn; the first one
that falls is replaced from what of p exceeds q (Leviathan et al., arXiv 2211.17192, appendix A.1: the outcome is
distributed as p).

A place that has never been scored is guessed to be as the code above it; such a guess was certain, q = 1.

Three numbers a place decide all: one draws its guesses, each time the same, one judges, one replaces. A place is judged
once and none of its numbers bears on the places before it, so that nothing is biased by drawing guesses from the same
number again; it keeps a guess that hardly changed what it was.

Shapes: T guesses, K codes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from jam.decode import sampling


@dataclass(frozen=True)
class Guesses:
    """Codes int64 [T] and the distributions [T, K] that they were drawn from."""

    codes: Tensor
    drawn_from: Tensor

    @classmethod
    def none(cls, size: int, device: torch.device) -> "Guesses":
        """No guesses over a codebook of ``size``."""
        empty = torch.zeros(0, size, dtype=torch.float64, device=device)
        return cls(torch.zeros(0, dtype=torch.int64, device=device), empty)

    def to(self, count: int, known: list[int], columns: int) -> "Guesses":
        """So many: fewer, or with more, each as the code ``columns`` before it, in the first row as the last one.

        Args:
            known: the codes of the image before the guesses, at least one.
        """
        missing = count - len(self.codes)
        if missing <= 0:
            return Guesses(self.codes[:count], self.drawn_from[:count])
        codes = [*known, *self.codes.tolist()]
        for _ in range(missing):
            codes.append(codes[-columns] if len(codes) >= columns else codes[-1])
        more = torch.tensor(codes[-missing:], device=self.codes.device)
        certain = torch.nn.functional.one_hot(more, self.drawn_from.shape[-1]).to(self.drawn_from)
        return Guesses(torch.cat([self.codes, more]), torch.cat([self.drawn_from, certain]))


def judge(guesses: Guesses, now: Tensor, draws: Tensor) -> tuple[int, int, Guesses]:
    """How many guesses stand, the code after them, and guesses for the places that follow as far as they are scored.

    Two certain guesses, of which the second has no probability any more:

    >>> guesses = Guesses(torch.tensor([1, 1]), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    >>> now = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.5, 0.5]])
    >>> stand, code, after = judge(guesses, now, torch.full((3, 3), 0.6))
    >>> stand, code, after.codes.tolist()
    (1, 0, [1])

    Args:
        now: [T + 1, K], the distributions of the guessed places, each given the guesses before it, and of one more.
        draws: [T + 1, 3] uniforms of these places: to guess by, to judge by, to replace by.
    """
    count = len(guesses.codes)
    at = guesses.codes[:, None]
    p, q = now[:count].gather(1, at)[:, 0], guesses.drawn_from.gather(1, at)[:, 0]
    stand = int((draws[:count, 1] * q < p).long().cumprod(0).sum())
    if stand == count:
        code = sampling.sample(now[count].log(), draws[count, 0])
    else:
        rest = (now[stand] - guesses.drawn_from[stand]).clamp_min(0)
        rest = rest if rest.sum() > 0 else now[stand]  # equal but for rounding
        code = sampling.sample(rest.log(), draws[stand, 2])
    after = now[stand + 1 :]
    return stand, int(code), Guesses(sampling.sample(after.log(), draws[stand + 1 :, 0]), after)
