"""Keys and values of a whole reply in buffers that are allocated once.

transformers' growing cache copies everything at each token; its static one shows the attention every slot, filled or
not. Here a forward writes into the slots that ``at`` names and attends to the filled ones, which are views. The same
buffers serve text, images and text again.

A ``fixed`` cache is of the second kind: every step has the same shapes and the slot is a number on the device, which is
what compiled code and CUDA graphs need (``jam.models.compiled``).

Shapes: B rows, H heads of keys, S slots, D head width, T tokens of a forward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin


@dataclass
class Window:
    """Where the next forward writes and looks: ``rows`` of the batch, slots ``start`` to ``stop`` to write, from
    ``first`` on to see. With ``slot`` (int64 [1]) it writes there, in all rows, and looks at ``first`` to ``stop``."""

    rows: slice
    first: int
    start: int
    stop: int
    slot: Tensor | None = None


class SlotLayer(CacheLayerMixin):
    """The keys and values of one attention layer, [B, H, S, D]."""

    is_sliding = False

    def __init__(self, cache: "SlotCache"):
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # zeros: a slot that nobody filled is hidden by a weight of zero, and zero times NaN is NaN
        shape, dtype = (self.cache.rows, key_states.shape[1], self.cache.slots), self.cache.dtype
        self.keys = key_states.new_zeros((*shape, key_states.shape[-1]), dtype=dtype)
        self.values = value_states.new_zeros((*shape, value_states.shape[-1]), dtype=dtype)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Takes [B, H, T, D]; all that the forward may see."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at = self.cache.window
        if at.slot is not None:
            self.keys.index_copy_(2, at.slot, key_states.to(self.keys.dtype))
            self.values.index_copy_(2, at.slot, value_states.to(self.values.dtype))
            return self.keys, self.values
        self.keys[at.rows, :, at.start : at.stop] = key_states
        self.values[at.rows, :, at.start : at.stop] = value_states
        return self.keys[at.rows, :, at.first : at.stop], self.values[at.rows, :, at.first : at.stop]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.window.stop - self.cache.window.first, 0

    def get_seq_length(self) -> int:
        return self.cache.window.start - self.cache.window.first

    def get_max_length(self) -> int:
        return self.cache.slots

    def take(self, rows: Tensor, filled: int) -> None:
        """These rows from now on, with room for ``cache.slots``; the first ``filled`` slots are kept."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros((len(rows), old.shape[1], self.cache.slots, old.shape[3]))
            new[:, :, :filled] = old[rows, :, :filled]
            setattr(self, name, new)


class SlotCache(Cache):
    """The cache of a batch of ``rows`` with ``slots`` each; a layer's buffers are made when it first writes.

    ``dtype``: what they are kept in; None is what the network gives.
    """

    def __init__(self, rows: int, slots: int, dtype: torch.dtype | None = None):
        super().__init__(layer_class_to_replicate=lambda: SlotLayer(self))
        self.rows, self.slots, self.dtype = rows, slots, dtype
        self.window = Window(slice(0, rows), 0, 0, 0)

    def at(self, start: int, stop: int, rows: slice | None = None, first: int = 0) -> "SlotCache":
        """The next forward writes slots ``start`` to ``stop`` of some rows, all of them by default."""
        assert stop <= self.slots, (stop, self.slots)
        if self.fixed:
            assert stop - start == 1 and rows is None, (start, stop, rows)
            self.window.slot.fill_(start)
            return self
        self.window = Window(slice(0, self.rows) if rows is None else rows, first, start, stop)
        return self

    def take(self, rows: Tensor, filled: int, slots: int | None = None) -> None:
        """Copies, reorders and drops rows: row n is what row ``rows[n]`` was, the first ``filled`` slots of it; with
        ``slots`` the room changes too. The cache is no longer fixed then."""
        self.rows, self.slots = len(rows), self.slots if slots is None else slots
        for layer in self.layers:
            layer.take(rows.to(layer.keys.device), filled)
        self.window = Window(slice(0, self.rows), 0, 0, 0)

    @property
    def fixed(self) -> bool:
        return self.window.slot is not None

    def fix(self, device: torch.device) -> None:
        """From now on every forward is of one token, writes all rows and sees every slot."""
        slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.window = Window(slice(0, self.rows), 0, 0, self.slots, slot)

    def copy(self, other: "SlotCache", rows: Tensor, filled: int) -> None:
        """Takes into its own buffers what some rows of another cache hold in their first ``filled`` slots."""
        for own, found in zip(self.layers, other.layers, strict=True):
            at = rows.to(found.keys.device)
            own.keys[:, :, :filled] = found.keys[at, :, :filled]
            own.values[:, :, :filled] = found.values[at, :, :filled]

    @property
    def bytes(self) -> int:
        return sum(side.nbytes for layer in self.layers for side in (layer.keys, layer.values))
