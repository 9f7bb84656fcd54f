"""Keep freed memory in the process.

glibc returns large freed blocks to the kernel at once, so that a training step page-faults hundreds of megabytes in
anew every time: on the mini models a quarter of the step (docs/log.md, training on a CPU).
"""

import ctypes
import platform
from pathlib import Path

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # mallopt(3)


def keep_freed_memory() -> bool:
    """Tells glibc's malloc to reuse large blocks instead of unmapping them; False on another C library.

    The process then holds its peak until it ends. For a process that trains or decodes in a loop; a library's import is
    not the place to call it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 * 2**20}
    return all([mallopt(option, value) == 1 for option, value in settings.items()])


def anonymous_bytes() -> int | None:
    """Memory of this process that no file backs, now; None where the kernel does not say (not Linux)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")]
    return found[0] if found else None
