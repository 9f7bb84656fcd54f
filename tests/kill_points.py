"""kill -9 at random points of a merge and of training; nothing half-made may look whole.

    python tests/kill_points.py --points 300       # 300 of each on tiny models; prints one line a kind
    python tests/kill_points.py --points 300 --kind training --seed 7

After every kill: a merge's output folder is either absent or equal to an uninterrupted merge's; every folder named
``checkpoint-<step>`` verifies against its manifest, and the newest is never older than before. Training, killed while
it starts, trains, saves or writes ``final/``, goes on from the newest whole checkpoint under the same command, and ends
with weights, average, optimizer and log of an uninterrupted run, bit for bit but for times.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from finetune.saving import checkpoint  # noqa: E402
from tests.fork_server import PHASES, ForkServer, Kill  # noqa: E402
from tests.tiny import tiny_pair  # noqa: E402

MERGE_WIDTH = 512  # wide enough that writing takes longer than the poll
TIMED = ("seconds", "tokens_per_second", "tflops", "mfu", "memory_gb", "seconds_left")  # of a line of the log
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "jam.cli", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> None:
    _, errors = process.communicate(timeout=300)
    if process.returncode != 0:
        raise AssertionError(f"exit code {process.returncode}: {errors.decode()[-800:]}")


def kill_after(process: subprocess.Popen, seconds: float) -> bool:
    """Kills; True if the process was still running."""
    time.sleep(seconds)
    running = process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return running


def kill_in_write(process: subprocess.Popen, folder: Path, pattern: str, delay: float, skip: int) -> bool:
    """Kills ``delay`` seconds after the (skip + 1)-th temporary folder appears; True if that happened in time."""
    seen: set[str] = set()
    while process.poll() is None:
        seen |= {path.name for path in folder.glob(pattern)}
        if len(seen) > skip:
            return kill_after(process, delay)
        time.sleep(0.0005)
    process.communicate()
    return False


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def merge_kills(tmp: Path, points: int, seed: int) -> dict:
    """Kills merges while they write, each going on where the last was killed; counts kills that hit, outputs found
    absent, and runs that went on after whole shards."""
    text, image = tiny_pair(tmp / "parents", hidden_size=MERGE_WIDTH, ffn_dim=4 * MERGE_WIDTH, num_hidden_layers=4)
    arguments = (
        "merge",
        "--method",
        "cross",
        "shard_bytes=4000000",
        "--text",
        str(text),
        "--image",
        str(image),
        "--out",
    )
    out = tmp / "out" / "fused"
    began = time.time()
    finish(start(*arguments, str(out)))
    whole, wanted = time.time() - began, digests(out)
    out.rename(tmp / "reference")  # the record names the output folder, so the same one is used throughout
    draw, hits, absent, resumed = random.Random(seed), 0, 0, 0
    for _ in range(points):
        resumed += sum(1 for _ in out.parent.glob(".fused.partial/*.safetensors")) > 1
        process = start(*arguments, str(out))
        if draw.random() < 0.5:
            hits += kill_after(process, draw.uniform(0.2, 1.0) * whole)
        else:
            hits += kill_in_write(process, out.parent, ".fused.partial", draw.uniform(0, 0.1), 0)
        if out.exists():
            assert digests(out) == wanted, "a killed merge left a folder that looks whole and is not"
            subprocess.run(["rm", "-rf", str(out)], check=True)
        else:
            absent += 1
    finish(start(*arguments, str(out)))
    assert digests(out) == wanted
    left = [path.name for path in (tmp / "out").glob(".*")]
    assert not left, f"a later merge did not clear {left}"
    return {"kills": points, "hit a running merge": hits, "output absent": absent, "went on": resumed}


def training_recipe(tmp: Path, steps: int) -> Path:
    """Two sources, an average of the weights, and lines of the log that lie across checkpoints."""
    mix = {}
    for name, count in (("a", 60), ("b", 7)):
        lines = [json.dumps({"text": f"line {number} of the {name} and the end"}) for number in range(count)]
        (tmp / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        mix[name] = {"kind": "text", "path": str(tmp / f"{name}.jsonl"), "weight": 0.5}
    recipe = {
        "kind": "finetune",
        "model": str(tmp / "parents" / "image"),
        "output_dir": str(tmp / "placeholder"),
        "data": {"seq_len": 64, "mix": mix},
        "objective": {"cm3": 0.5},
        "train": {"steps": steps, "micro_batch_size": 2, "global_batch_size": 4, "threads": 1, "ema": 0.9},
        "save": {"every": 3, "keep": 2},
        "log": {"every": 2},
    }
    path = tmp / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def outcome(run: Path) -> dict[str, object]:
    """All of a finished run that must not depend on kills: tensors by their bytes, the log and the state of its last
    checkpoint but for times."""
    last = checkpoint.listed(run)[0]
    files = [run / "final/model.safetensors", last / "model.safetensors", *sorted(last.glob("train/*"))]
    assert len(files) == 4, files  # optimizer and average
    found: dict[str, object] = {
        str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    state = json.loads((last / "state.json").read_text())
    settings = {key: value for key, value in state["settings"].items() if key != "output_dir"}
    found["state"] = {"step": state["step"], "tokens": state["tokens"], "settings": settings}
    found["read"] = state["read"]
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    found["log"] = [{key: value for key, value in line.items() if key not in TIMED} for line in lines]
    return found


def draw_kill(draw: random.Random, events: dict[str, int]) -> Kill:
    """Before an event on a file, in front of it or up to 30 ms after it: in a step, in a write, between both."""
    phase = draw.choice(PHASES)
    return Kill(phase, draw.randint(1, events[phase]), draw.choice((0.0, draw.uniform(0.0, 0.03))))


def training_kills(tmp: Path, points: int, seed: int, steps: int = 12) -> dict:
    """Kills training ``points`` times, each time followed by the same command; where a run gets to its end it is
    compared with one that was never killed, and the next one begins."""
    tiny_pair(tmp / "parents")
    recipe = str(training_recipe(tmp, steps))
    draw, hits, verified, resumed, runs = random.Random(seed), Counter(), 0, 0, 0
    with ForkServer() as server:
        straight = server.run(["finetune", recipe, f"output_dir={tmp / 'straight'}"], tmp / "straight")
        assert straight.code == 0, straight.output[-800:]
        wanted = outcome(tmp / "straight")
        run, best = tmp / "broken", 0
        while sum(hits.values()) < points or (run / "run.lock").exists():
            kill = draw_kill(draw, straight.events) if sum(hits.values()) < points else None
            done = server.run(["finetune", recipe, f"output_dir={run}"], run, kill)
            told = f"seed {seed}, {dict(hits)}, {kill}: {done.output[-800:]}"
            from_step = re.search(r"resuming from \S+ \(step (\d+) of", done.output)
            if from_step or done.code == 0:
                assert int(from_step.group(1) if from_step else 0) == best, told
                resumed += from_step is not None
            assert "WARNING" not in done.output, told  # nothing that looked whole was skipped
            whole = checkpoint.listed(run)
            for folder in whole:
                assert checkpoint.verify(folder) is None, f"{folder}: {checkpoint.verify(folder)}; {told}"
                verified += 1
            newest = int(whole[0].name.removeprefix("checkpoint-")) if whole else 0
            assert newest >= best, f"step {best} was whole and is gone; {told}"
            best = newest
            if done.code is None:
                hits[kill.phase] += 1
                continue
            assert done.code == 0, told
            assert outcome(run) == wanted, told
            left = [path.name for path in run.glob(".*")]
            assert not left, f"{left} stayed; {told}"
            shutil.rmtree(run)
            runs, best = runs + 1, 0
    return {"kills": sum(hits.values()), **hits, "checkpoints verified": verified, "resumed": resumed, "ended": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20, help="kills of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=("merge", "training"), help="default: both")
    args = parser.parse_args()
    kinds = {
        "merge": lambda tmp: merge_kills(tmp, args.points, args.seed),
        "training": lambda tmp: training_kills(tmp, args.points, args.seed),
    }
    for name, kind in kinds.items():
        if args.kind not in (None, name):
            continue
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {kind(Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
