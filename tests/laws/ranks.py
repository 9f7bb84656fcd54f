"""Several processes for a test: a function of a module runs on each, under a hard limit of time.

``launch`` starts them; run as a script, this file is one of them.
"""

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 150  # seconds; a rank that waits for another forever fails the test instead of hanging it


def launch(count: int, function: str, *arguments: object, launcher: list[str] | None = None) -> None:
    """Runs ``module:function`` with string arguments on ``count`` processes and fails with their words if one fails."""
    start = launcher or [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    done = finished([*start, "-m", "tests.laws.ranks", function, *map(str, arguments)])
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def finished(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    """The end of a command in a process group of its own, which is killed whole when the time is over."""
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "CUDA_VISIBLE_DEVICES": ""}
    environment = os.environ | own | variables
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # the launcher then ends its ranks, which have groups of their own
        try:
            output, errors = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
        raise AssertionError(f"hung for {LIMIT} s: {(output + errors)[-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


if __name__ == "__main__":
    module, name = sys.argv[1].split(":")
    getattr(importlib.import_module(module), name)(*sys.argv[2:])
