"""SHA-256 of files and of streams; the interpreter is let go of while a piece is hashed."""

import hashlib
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

PIECE = 1 << 20  # bytes that a file is read in
BEHIND = 16  # pieces that wait for the hash at most: bounds the memory


@dataclass
class StreamHash:
    """SHA-256 of a stream on a thread of its own, a few pieces behind it."""

    _sum: Any = field(default_factory=hashlib.sha256)
    _pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _waiting: deque[Future] = field(default_factory=deque)

    def update(self, data: bytes | memoryview) -> None:
        """Take a piece, which must not change afterwards."""
        self._waiting.append(self._pool.submit(self._sum.update, data))
        while len(self._waiting) > BEHIND:
            self._waiting.popleft().result()

    def finish(self) -> str:
        """Hexadecimal."""
        while self._waiting:
            self._waiting.popleft().result()
        self._pool.shutdown()
        return self._sum.hexdigest()

    def drop(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def sha256_of(file: Path, stop: Event | None = None) -> str:
    """SHA-256 of a file, hexadecimal; once ``stop`` is set the rest is not read, and the result stands for nothing."""
    total = hashlib.sha256()
    room = memoryview(bytearray(PIECE))
    with file.open("rb", buffering=0) as stream:
        while (count := stream.readinto(room)) and not (stop is not None and stop.is_set()):
            total.update(room[:count])
    return total.hexdigest()


def sha256_rate() -> float:
    """Bytes that one thread hashes in a second, from a hundredth of one."""
    data, began = bytes(PIECE), time.perf_counter()
    count = 0
    while (passed := time.perf_counter() - began) < 0.01:
        hashlib.sha256(data).digest()
        count += 1
    return count * PIECE / passed
