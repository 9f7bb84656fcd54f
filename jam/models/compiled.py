"""Decoding steps through ``torch.compile``: one token a row, every shape and buffer the same from step to step.

On CUDA the compiled step is replayed as a CUDA graph, which is where it pays: a step of a 7B is some 800 kernels that
take less time than their launches. On a CPU it gains what packed weights gain (docs/log.md), after compiling for a
minute, and excludes them. Prompts of any length run uncompiled.

A graph reads and writes where it was recorded. Buffers are therefore kept from call to call and used again where the
next call has their shape; the number of slots is rounded up so that it often has.

Shapes: B rows, T tokens, S slots.
"""

from typing import Any

import torch
from torch import Tensor

from jam.models.readout import Readout, States
from jam.models.slot_cache import SlotCache

SLOTS = 128  # the number of slots is a multiple of this
SHAPES = 64  # batch and cache shapes that a process holds compiled code for; one more, and it compiles anew


class Compiled:
    """A readout whose steps on a ``fixed`` cache are compiled; scores and prompts are the plain one's.

    Args:
        backend: of ``torch.compile``.
    """

    def __init__(self, plain: Readout, backend: str = "inductor"):
        self.plain, self.model, self.backend = plain, plain.model, backend
        self.codes, self.text = plain.codes, plain.text
        on_cuda = self.model.device.type == "cuda" and backend == "inductor"
        self._run = torch.compile(
            plain.run, fullgraph=True, dynamic=False, backend=backend, mode="reduce-overhead" if on_cuda else None
        )
        self._on_cuda = on_cuda
        self._spare: SlotCache | None = None

    def states(self, ids_BT: Tensor, mask_B1TS: Tensor, positions_BT: Tensor, cache: SlotCache) -> States:
        given: dict[str, Any] = self.plain.inputs(ids_BT, mask_B1TS, positions_BT, cache)
        if not cache.fixed:
            return self.plain.run(**given)
        with torch._dynamo.config.patch(recompile_limit=SHAPES):
            if self._on_cuda:
                torch.compiler.cudagraph_mark_step_begin()
            try:
                return self._run(**given)
            except torch._dynamo.exc.FailOnRecompileLimitHit:  # nothing has run; the code of all shapes makes room
                torch._dynamo.eval_frame.reset_code(self.plain.run.__code__)
                return self._run(**given)

    def start(self, prompts: SlotCache, rows: Tensor, filled: int, slots: int) -> SlotCache:
        """A fixed cache."""
        slots = -(-slots // SLOTS) * SLOTS
        cache, self._spare = self._spare, None
        if cache is None or (cache.rows, cache.slots, cache.dtype) != (len(rows), slots, prompts.dtype):
            cache = prompts
            cache.take(rows, filled, slots)
            for layer in cache.layers if self._on_cuda else ():
                torch._dynamo.mark_static_address(layer.keys)
                torch._dynamo.mark_static_address(layer.values)
        else:
            cache.copy(prompts, rows, filled)
        cache.fix(self.model.device)
        return cache

    def finish(self, cache: SlotCache) -> None:
        if cache.fixed:
            self._spare = cache
