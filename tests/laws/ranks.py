"""Several processes for a test, under a hard limit of time: a rank that waits forever fails the test.

``launch`` runs a function on ranks that are forked from a server which has imported everything once; ``finished`` runs
a command as users do.
"""

import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
LIMIT = 300  # seconds
OWN = {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "CUDA_VISIBLE_DEVICES": ""}
WORKERS = multiprocessing.get_context("forkserver")
WORKERS.set_forkserver_preload(["tests.laws.scale_cases", "tests.laws.scale_runs"])


def _rank(variables: dict[str, str], log: str, function: str, arguments: tuple[str, ...]) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)  # the server loaded torch before
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    module, name = function.split(":")
    try:
        getattr(importlib.import_module(module), name)(*arguments)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # at once: what a group's destructor waits for may be gone
    dist.barrier()
    dist.destroy_process_group()


def launch(count: int, folder: Path, function: str, *arguments: object) -> None:
    """Runs ``module:function`` with string arguments on ``count`` ranks; fails with their words if one does."""
    folder.mkdir(exist_ok=True)
    shared = OWN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(count)}
    processes = []
    for rank in range(count):
        own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
        given = (own, str(folder / f"rank-{rank}.log"), function, tuple(map(str, arguments)))
        processes.append(WORKERS.Process(target=_rank, args=given, daemon=True))
        processes[-1].start()
    end = time.monotonic() + LIMIT
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    said = "\n".join(f"{log.name}:\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("rank-*.log")))
    assert codes == [0] * count, f"exit codes {codes} (None: hung for {LIMIT} s)\n{said}"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def finished(command: list[str], **variables: str) -> subprocess.CompletedProcess:
    """The end of a command; when the time is over it and all its children are ended."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | OWN | {"PYTHONPATH": str(ROOT)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # a launcher then ends its ranks, which have groups of their own
        try:
            output, errors = process.communicate(timeout=40)
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
        raise AssertionError(f"hung for {LIMIT} s: {(output + errors)[-3000:]}") from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
