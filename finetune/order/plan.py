"""The order of training data, as arithmetic: (seed, number of the sequence) -> sequence.

Stages: sequence number t -> block and slot -> source, by exact quotas -> the source's n-th packed sequence -> epoch and
window -> documents in the order of a keyed bijection -> CM3 -> noise on codes -> best-fit packing inside the window.
Nothing is drawn from a stream, so the resume state is one integer, whatever the number of workers or ranks.

Walking to a far sequence packs the windows before it (0.1 to 0.4 ms a document); a checkpoint says how far a run had
walked (``PackedSource.walked``), which is arithmetic too, so that it need not be walked again.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from finetune.data.sources import Source, cut, keyed
from finetune.order.bijection import bijection
from finetune.order.cm3 import caption_span, draw_instance, growth, infilled
from finetune.order.pack import Placed, Sequence, best_fit, noisy_codes
from finetune.recipe import FinetuneRecipe
from jam.errors import DataError
from jam.models.load import Bundle
from jam.tokens.render import Tokens

ORDER = "feistel, cut for CM3, joined by choice, shares as asked"  # what a checkpoint says its step counts in
BLOCK = 100  # sequences over which the shares of the mix are exact
WINDOW = 1024  # documents packed together


def quotas(weights: list[float], total: int) -> list[int]:
    """Whole numbers in proportion to ``weights`` that sum to ``total`` (largest remainders).

    >>> quotas([0.5, 0.3, 0.2], 10)
    [5, 3, 2]
    """
    exact = [weight / sum(weights) * total for weight in weights]
    counts = [int(x) for x in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


@dataclass
class PackedSource:
    """A source as an endless list of packed sequences."""

    source: Source
    number: int
    bundle: Bundle
    recipe: FinetuneRecipe
    context: int
    _first: int = 0  # window that the walk began with
    _starts: list[int] = field(default_factory=lambda: [0])  # first sequence of each window walked since
    _current: tuple[int, list[Sequence]] = (-1, [])

    def _windows_per_epoch(self) -> int:
        return -(-self.source.size // WINDOW)

    def _documents(self, window: int) -> list[Placed]:
        epoch, part = divmod(window, self._windows_per_epoch())
        recipe, seed = self.recipe, self.recipe.data.seed
        places = np.arange(part * WINDOW, min((part + 1) * WINDOW, self.source.size))
        placed = []
        for index in bijection(places, self.source.size, seed, self.number, epoch).tolist():
            if index in self.source.skip:
                continue
            generator = keyed(seed, self.number, epoch, index)
            for tokens in self._instances(index, generator):
                room = self.context - len(tokens)
                offset = int(generator.integers(room + 1)) if recipe.train.random_offset and room > 0 else 0
                noise = recipe.objective.code_noise
                inputs = noisy_codes(tokens, generator, self.bundle.vocabulary, noise) if noise else None
                placed.append(Placed(tokens, offset, inputs, index))
        return placed

    def _instances(self, index: int, generator: np.random.Generator) -> Iterator[Tokens]:
        """Document ``index`` in pieces that fit, masked as the objective says; what is drawn depends on the generator
        alone."""
        objective, length = self.recipe.objective, self.recipe.data.seq_len
        draw, instance, captioned = generator.random(), 0, None

        def next_growth(document: Tokens) -> int:
            nonlocal instance, captioned
            if self.source.conditioned:
                captioned = bool(caption_span(document)) if captioned is None else captioned
                instance = draw_instance(generator, objective, captioned)
            return growth(instance)

        for tokens in cut(self.source, self.bundle, index, draw, length, next_growth):
            yield infilled(tokens, instance, generator, self.bundle.vocabulary, length)

    def _pack(self, window: int) -> list[Sequence]:
        if self._current[0] != window:
            documents = self._documents(window)
            bins = best_fit([len(d.tokens) for d in documents], self.recipe.data.seq_len)
            shuffled = keyed(self.recipe.data.seed, self.number, window, 1).permutation(len(bins))
            self._current = (window, [[documents[i] for i in bins[b]] for b in shuffled])
        return self._current[1]

    def window(self, number: int) -> list[Sequence]:
        """The sequences of one window, in order."""
        return self._pack(number)

    @property
    def walked(self) -> tuple[int, int]:
        """The last window that is known to begin somewhere, and its first sequence."""
        return self._first + len(self._starts) - 1, self._starts[-1]

    def walk_from(self, window: int, start: int) -> None:
        """Goes on where :attr:`walked` was, of the same source under the same settings."""
        self._first, self._starts = window, [start]

    def sequence(self, number: int) -> Sequence:
        if number < self._starts[0]:
            self.walk_from(0, 0)
        at = int(np.searchsorted(self._starts, number, side="right")) - 1
        while at == len(self._starts) - 1:  # the last known window may or may not reach far enough
            end = self._starts[at] + len(self._pack(self._first + at))
            if number < end:
                break
            self._starts.append(end)
            at += 1
        return self._pack(self._first + at)[number - self._starts[at]]


@dataclass
class Plan:
    """The whole mix: ``sequence(t)`` for any t, in any order of asking.

    Raises:
        DataError: a source whose weight is too small to get one sequence of a block.
    """

    sources: list[PackedSource]
    weights: list[float]
    seed: int

    def __post_init__(self) -> None:
        self.quota = quotas(self.weights, BLOCK)
        unused = [s.source.name for s, count in zip(self.sources, self.quota, strict=True) if not count]
        if unused:
            raise DataError(
                f"data.mix.{unused[0]}: its share of the mix rounds to 0 of {BLOCK} sequences and it would never be "
                "read; raise its weight or remove it"
            )

    def owner(self, t: int) -> tuple[int, int]:
        """Source of sequence t and its number within that source."""
        block, slot = divmod(t, BLOCK)
        layout = np.repeat(np.arange(len(self.quota)), self.quota)
        layout = layout[keyed(self.seed, block, 2).permutation(BLOCK)]
        source = int(layout[slot])
        return source, block * self.quota[source] + int((layout[:slot] == source).sum())

    def sequence(self, t: int) -> tuple[int, Sequence]:
        source, number = self.owner(t)
        return source, self.sources[source].sequence(number)
