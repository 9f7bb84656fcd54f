"""kill -9 at random points of a merge, of training and of writing a checkpoint; nothing half-made may look whole.

    python tests/kill_points.py --points 20        # 20 of each on tiny models, a few minutes; prints one line a kind

After every kill: a merge's output folder is either absent or equal to an uninterrupted merge's; every folder named
``checkpoint-<step>`` verifies against its manifest; and training, restarted after each kill, ends with the weights of
an uninterrupted run, bit for bit.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from finetune import checkpoint  # noqa: E402
from tests.tiny import tiny_pair  # noqa: E402

MERGE_WIDTH = 512  # wide enough that writing takes longer than the poll
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
    lines = [json.dumps({"text": f"line {number} of the cat and the end"}) for number in range(60)]
    (tmp / "text.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {
        "kind": "finetune",
        "model": str(tmp / "parents" / "image"),
        "output_dir": str(tmp / "placeholder"),
        "data": {"seq_len": 64, "mix": {"t": {"kind": "text", "path": str(tmp / "text.jsonl"), "weight": 1.0}}},
        "objective": {"cm3": 0.5},
        "train": {"steps": steps, "micro_batch_size": 2, "global_batch_size": 2, "threads": 1, "ema": 0.9},
        "save": {"every": 2, "keep": 2},
        "log": {"every": 1},
    }
    path = tmp / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    return path


def training_kills(tmp: Path, points: int, seed: int, in_write: bool, steps: int = 40) -> dict:
    """Kills training at random times, or while it writes a checkpoint; then lets it finish."""
    tiny_pair(tmp / "parents")
    recipe = str(training_recipe(tmp, steps))
    began = time.time()
    finish(start("finetune", recipe, f"output_dir={tmp / 'straight'}"))
    whole = time.time() - began
    run, draw, hits, verified = tmp / "broken", random.Random(seed), 0, 0
    for _ in range(points):
        process = start("finetune", recipe, f"output_dir={run}")
        if in_write:
            hits += kill_in_write(process, run, ".checkpoint-*.tmp-*", draw.uniform(0, 0.02), draw.randint(0, 2))
        else:
            hits += kill_after(process, draw.uniform(0.3, 1.0) * whole)
        for folder in checkpoint.listed(run):
            assert checkpoint.verify(folder) is None, f"{folder}: {checkpoint.verify(folder)}"
            verified += 1
        if (run / "final").exists():
            assert digests(run / "final")["model.safetensors"] == digests(tmp / "straight/final")["model.safetensors"]
            subprocess.run(["rm", "-rf", str(run)], check=True)
    finish(start("finetune", recipe, f"output_dir={run}"))
    assert digests(run / "final")["model.safetensors"] == digests(tmp / "straight/final")["model.safetensors"]
    steps_logged = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    assert steps_logged == list(range(1, steps + 1))
    return {"kills": points, "hit a running process": hits, "checkpoints verified": verified}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--points", type=int, default=20, help="kills of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    kinds = {
        "merge": lambda tmp: merge_kills(tmp, args.points, args.seed),
        "training": lambda tmp: training_kills(tmp, args.points, args.seed, in_write=False),
        "checkpointing": lambda tmp: training_kills(tmp, args.points, args.seed, in_write=True),
    }
    for name, kind in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {kind(Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
