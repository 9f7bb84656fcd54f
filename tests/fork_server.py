"""Runs of ``jam`` in forked children of a process that has everything imported, each killed where it is told to.

A fresh interpreter takes seconds to import torch, and a kill needs a process of its own. The server computes nothing,
so it has no threads and a fork of it is whole. A child counts what it does to files under one folder (Python's audit
events); at the chosen one it says so, and the server sends SIGKILL: at once, the child waiting in front of the event,
or after a delay, the child running on into whatever comes next.

    with ForkServer() as server:
        done = server.run(["finetune", "r.yaml"], watched=folder, kill=Kill("saving", 3, 0.01))
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PHASES = ("starting", "training", "saving", "final")
EVENTS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.symlink", "os.chmod", "shutil.rmtree"}


@dataclass(frozen=True)
class Kill:
    """At the ``event``-th event (from 1) of a phase; ``delay`` in seconds, 0 is before the event takes place."""

    phase: str
    event: int
    delay: float


@dataclass(frozen=True)
class Done:
    """``code`` is None of a child that was killed; ``events`` and ``output`` are what it did and said until then."""

    code: int | None
    events: dict[str, int]
    output: str


class ForkServer:
    """A context manager; its process dies with the standard input that it reads."""

    def __enter__(self) -> "ForkServer":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "PYTHONPATH": str(ROOT)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, env=environment, **pipes)
        return self

    def __exit__(self, *unused: object) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()

    def run(self, arguments: list[str], watched: Path, kill: Kill | None = None, timeout: float = 120) -> Done:
        """Raises AssertionError when the child hangs or the server is gone."""
        watched.parent.mkdir(parents=True, exist_ok=True)
        job = {"arguments": arguments, "watched": str(watched), "kill": kill and asdict(kill), "timeout": timeout}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the server is gone"
        return Done(**json.loads(line))


def phase_of(path: str, watched: str) -> str | None:
    """What a run is doing when it touches a file of its folder."""
    if not path.startswith(watched + "/"):
        return None
    name = path[len(watched) + 1 :].split("/")[0].lstrip(".")
    if name.startswith(("checkpoint-", "last")):
        return "saving"
    if name.startswith(("final", "plots")):
        return "final"
    return "training" if name.startswith("log.jsonl") else "starting"


def _child(job: dict, report: int, hold: int) -> None:
    """Runs the command; never returns."""
    seen: Counter[str] = Counter()
    kill, code = job["kill"], 70

    def hook(event: str, values: tuple) -> None:
        if event not in EVENTS or not values or not isinstance(values[0], (str, os.PathLike)):
            return
        phase = phase_of(os.path.abspath(os.fspath(values[0])), job["watched"])
        if phase is None:
            return
        seen[phase] += 1
        if kill and phase == kill["phase"] and seen[phase] == kill["event"]:
            os.write(report, (json.dumps({"events": seen}) + "\n").encode())
            if kill["delay"] == 0:
                os.read(hold, 1)  # killed here

    sys.addaudithook(hook)
    try:
        from jam.cli import main

        code = main(job["arguments"])
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        modules = sorted(name for name in sys.modules if not name.startswith("_"))
        os.write(report, (json.dumps({"events": seen, "modules": modules}) + "\n").encode())
        os._exit(code)


def _read_line(pipe: int, until: float) -> dict | None:
    data = b""
    while not data.endswith(b"\n"):
        if not select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
            return None
        piece = os.read(pipe, 1 << 16)
        if not piece:
            return None
        data += piece
    return json.loads(data.splitlines()[-1])


def _serve(job: dict, output: Path) -> dict:
    """One child from its fork to its end."""
    (report, report_in), (hold, hold_in) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        said = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(said, number)
        os.close(report)
        os.close(hold_in)
        _child(job, report_in, hold)
    os.close(report_in)
    os.close(hold)
    told = _read_line(report, time.monotonic() + job["timeout"]) or {"events": {}}
    killed = False
    if "modules" not in told:
        time.sleep(job["kill"]["delay"] if job["kill"] else 0)
        finished, status = os.waitpid(child, os.WNOHANG)
        if not finished:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            killed = os.WIFSIGNALED(status)
    else:
        status = os.waitpid(child, 0)[1]
    os.close(report)
    os.close(hold_in)
    for name in told.get("modules", ()):  # so that the next child need not
        if name not in sys.modules:
            with suppress(Exception):
                importlib.import_module(name)
    code = None if killed else os.waitstatus_to_exitcode(status)
    return {"code": code, "events": dict(told["events"]), "output": output.read_text(errors="replace")}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an import prints is no answer
    sys.path.insert(0, str(ROOT))
    for name in ("jam.cli", "jam.training_bar", "finetune.run"):
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        result = _serve(job, Path(job["watched"]).with_name("said.txt"))
        answers.write(json.dumps(result) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
