"""What the processes of one run agree on: who goes first, what failed, when to stop, and who tells the user.

All of it goes over a gloo group of its own. Beside a GPU's group that costs no synchronisation of the device, and it
waits as long as preparing data takes, where the other one gives up after minutes. A rank that fails between two
agreements ends alone; the launcher then ends the others.
"""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from jam.errors import JamError, RunError

WAIT = timedelta(days=7)
_VOICE, _SAID = "jam/voice", "jam/said"
_LEAVE_AFTER = timedelta(seconds=10)  # for the one that speaks

T = TypeVar("T")


class Ranks:
    """The processes of this run; one alone agrees with itself. Made by every rank at the same time."""

    def __init__(self) -> None:
        self.many = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.number = dist.get_rank() if self.many else 0
        self.count = dist.get_world_size() if self.many else 1
        self.on_machine = int(os.environ.get("LOCAL_RANK", "0")) if self.many else 0
        self._group = dist.new_group(backend="gloo", timeout=WAIT) if self.many else None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.number == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """What every rank does here it has done when one goes on; where it fails on one, all leave.

        Raises:
            RunError: on the others, with the message of the one that failed.
        """
        failed = None
        try:
            yield
        except Exception as error:  # raised again below
            failed = error
        self.agree_on(failed)

    def agree_on(self, failed: Exception | None) -> None:
        """Raises what failed here, or :class:`RunError` for what failed elsewhere."""
        if self.any(failed is not None) and self.many:
            said = None if failed is None else self._words(failed)
            found = [said] * self.count
            dist.all_gather_object(found, said, group=self._group)
            if failed is None and (messages := [words for words in found if words is not None]):
                raise RunError(messages[0])
        if failed is not None:
            raise failed

    def _words(self, error: Exception) -> str:
        if isinstance(error, JamError):
            return str(error)
        return f"rank {self.number} failed ({type(error).__name__}: {error}); its traceback says where"

    def in_turn(self, work: Callable[[], T]) -> T:
        """What the first rank of each machine may leave for the others of it: a cache of codes is made once."""
        done: list[T] = []
        for turn in (True, False):
            with self.together():
                if (self.on_machine == 0) == turn:
                    done.append(work())
        return done[0]

    def told(self, value: T) -> T:
        """The first rank's value, on all of them."""
        if not self.many:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def any(self, own: bool) -> bool:
        """Whether it holds on any rank."""
        return self.greatest(own)[0] > 0

    def greatest(self, *numbers: int) -> list[int]:
        """The greatest that any rank has, of each number."""
        if not self.many:
            return list(numbers)
        found = torch.tensor(numbers)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
        return found.tolist()


@contextmanager
def one_voice() -> Iterator[None]:
    """Of the ranks that end in an error, one tells the user: the first to get here.

    The others leave after it, as a launcher ends a rank that is still speaking when another one has left.
    """
    try:
        yield
    except JamError as error:
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            store = dist.distributed_c10d._get_default_store()  # nothing public gives the launcher's
            if store.add(_VOICE, 1) == 1:
                atexit.register(store.set, _SAID, "1")
            else:
                error.told_elsewhere = True
                _wait(store)
        raise


def _wait(store: dist.Store) -> None:
    try:
        store.wait([_SAID], _LEAVE_AFTER)
    except dist.DistError:  # the one that spoke was slow to leave, or took the store along: it has spoken
        return
