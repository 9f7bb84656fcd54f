"""Merges against a file copy: wall time as a ratio, CPU seconds, peak anonymous memory, and the forecast's error.

Llama-shaped checkpoints of random bfloat16 are written once. Then, alternating, in processes of their own, the inputs
read once more before each so that the cache is warm for all: the baseline reads every input byte and writes as many
bytes as the merge will, in 8 MB pieces, and fsyncs; the merge is the ``jam`` command, imports included, with the same
fsync. ``--hash`` is also set against ``sha256sum`` over the same bytes.
Medians; memory is the greatest RssAnon of the process, sampled. With ``--mergekit`` (the command's path) its ``linear``
runs in the same rounds, and its output is compared with ours bit for bit.

    python benchmarks/merge.py            # two of 2.9 GB, and two of 1 and 8; needs about 40 GB of disk
    python benchmarks/merge.py --quick    # two of 0.25 GB, one round (under a minute)
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jam import assets
from jam.checkpoint import open_checkpoint, row_blocks
from jam.models.families import FAMILIES
from jam.shards import ShardWriter, TensorSpec
from jam.tokens.vocabulary import JamFile

CHUNK = 8 << 20
COPY = """
import os, sys
out, size, chunk, inputs = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
room = bytearray(chunk)
for path in inputs:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(room):
            pass
with open(out, "wb", buffering=0) as file:
    while size > 0:
        size -= file.write(memoryview(room)[: min(chunk, size)])
    os.fsync(file.fileno())
"""
TABLE = (
    "| | wall, s | baseline, s | ratio | CPU, s | baseline's | output, GB | peak RssAnon, MB |\n|---" + "|---" * 7 + "|"
)


def llama(layers: int, width: int, vocab: int, ffn: int | None = None) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": ffn or 4 * width,
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 256),
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def write_parent(folder: Path, source: Path, layers: int, width: int, seed: int, ffn: int | None = None) -> None:
    """A parent of a shipped one's vocabulary; random, or all holes where ``ffn`` is given (a header to plan from)."""
    record = JamFile.read(source)
    config, family = llama(layers, width, record.vocabulary.size, ffn), FAMILIES["llama"]
    sizes = family.sizes(config)
    specs = [TensorSpec(name, "BF16", family.shape(sizes, axes)) for name, axes in family.tensors(config).items()]
    random = np.random.default_rng(seed).standard_normal(CHUNK // 2, dtype=np.float32) * np.float32(0.02)
    bits = (random.view(np.uint32) >> 16).astype("<u2")
    with ShardWriter(folder, specs if ffn is None else specs[:0]) as writer:
        for spec in writer.specs:
            for block in row_blocks(spec.shape, len(bits)):
                shape = (block.stop - block.start, *spec.shape[1:])
                writer.append(spec.name, bits[: int(np.prod(shape))].reshape(shape))
        writer.finish()
    if ffn is not None:
        sparse(folder / "model.safetensors", specs)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("jam.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    if record.image_tokenizer is not None:
        shutil.copytree(source / record.image_tokenizer, folder / record.image_tokenizer)


def sparse(file: Path, specs: list[TensorSpec]) -> None:
    entries, at = {}, 0
    for spec in specs:
        entries[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [at, at + spec.bytes]}
        at += spec.bytes
    text = json.dumps(entries).encode()
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)


def write_pair(root: Path, layers: int, width: int, ffn: int | None = None) -> Path:
    for seed, side in enumerate(("text", "image")):  # one vocabulary, as mergekit requires
        write_parent(root / side, assets.IMAGE_PARENT, layers, width, seed, ffn)
    return root


@dataclass(frozen=True)
class Run:
    """Wall and CPU seconds of a process, and its greatest RssAnon in MB."""

    wall: float
    cpu: float
    peak: float
    printed: str


def timed(command: list[str]) -> Run:
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=said, stderr=errors)
        status, peak = Path(f"/proc/{process.pid}/status"), 0
        while True:
            pid, code, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
            peak = max([peak, *(int(line.split()[1]) for line in lines)])
            time.sleep(0.01)
        wall, process.returncode = time.perf_counter() - began, code
        said.seek(0), errors.seek(0)
        if code:
            raise SystemExit(f"{' '.join(command[:6])} ...: {errors.read()}")
        return Run(wall, usage.ru_utime + usage.ru_stime, peak / 1024, said.read())


def jam(method: str, root: Path, *more: str) -> list[str]:
    command = [sys.executable, "-m", "jam.cli", "merge", "--method", method, "--out", str(root / "out")]
    return [*command, "--text", str(root / "text"), "--image", str(root / "image"), *more]


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in weights(folder))


@dataclass
class Row:
    """One line of the table; its runs alternate with the baseline's."""

    name: str
    bar: str
    ours: list[Run] = field(default_factory=list)
    base: list[Run] = field(default_factory=list)
    written: int = 0

    def show(self) -> None:
        ours, base = (statistics.median(run.wall for run in runs) for runs in (self.ours, self.base))
        cpu, theirs = (statistics.median(run.cpu for run in runs) for runs in (self.ours, self.base))
        peak = max(run.peak for run in self.ours)
        cells = f"{ours:.2f} | {base:.2f} | {ours / base:.2f} (bar {self.bar}) | {cpu:.2f} | {theirs:.2f}"
        print(f"| {self.name} | {cells} | {self.written / 1e9:.2f} | {peak:.0f} |", flush=True)


def warm(root: Path) -> None:
    room = bytearray(CHUNK)
    for side in ("text", "image"):
        for path in weights(root / side):
            with path.open("rb", buffering=0) as file:
                while file.readinto(room):
                    pass


def merged(root: Path, method: str, *more: str, keep: bool = False) -> tuple[Run, int]:
    run = timed(jam(method, root, *more))
    written = size_of(root / "out")
    if not keep:
        shutil.rmtree(root / "out")
    return run, written


def copied(root: Path, written: int) -> Run:
    warm(root)
    inputs = [str(file) for side in ("text", "image") for file in weights(root / side)]
    run = timed([sys.executable, "-c", COPY, str(root / "copy"), str(written), str(CHUNK), *inputs])
    (root / "copy").unlink()
    return run


def speed(root: Path, rounds: int, mergekit: str | None) -> None:
    print(f"inputs: {size_of(root / 'text') / 1e9:.2f} + {size_of(root / 'image') / 1e9:.2f} GB; {rounds} rounds\n")
    print(TABLE)
    for method, bar in (("uniform", "1.3"), ("cross", "1.15"), ("width", "1.3")):
        row, peer = Row(f"`{method}`", bar), Row("mergekit 0.1.5 `linear`", "none")
        for _ in range(rounds):
            warm(root)
            run, row.written = merged(root, method, keep=mergekit is not None)
            row.ours.append(run)
            if mergekit is not None and method == "uniform":
                peer.ours.append(run_mergekit(mergekit, root))
                same_bits(root / "out", root / "theirs")
                shutil.rmtree(root / "theirs")
            shutil.rmtree(root / "out", ignore_errors=True)
            row.base.append(copied(root, row.written))
        row.show()
        if peer.ours:
            peer.base, peer.written = row.base, row.written
            peer.show()
            ratio = statistics.median(r.wall for r in peer.ours) / statistics.median(r.wall for r in row.ours)
            print(f"| mergekit's time over ours, every tensor bit-equal | {ratio:.1f} (bar 3) | | | | | | |")
    hashed = Row("`uniform --hash`, baseline copy", "1.3")
    summed = Row("`uniform --hash`, baseline `sha256sum`", "1.1")
    for _ in range(rounds):
        warm(root)
        run, written = merged(root, "uniform", "--hash", keep=True)
        files = [str(file) for side in ("text", "image", "out") for file in weights(root / side)]
        summed.base.append(timed(["sha256sum", *files]))
        shutil.rmtree(root / "out")
        hashed.base.append(copied(root, written))
        for row in (hashed, summed):
            row.ours.append(run)
            row.written = written
    hashed.show()
    summed.show()


def run_mergekit(command: str, root: Path) -> Run:
    warm(root)
    recipe = root / "mergekit.yaml"
    models = [{"model": str(root / side), "parameters": {"weight": 0.5}} for side in ("text", "image")]
    raw = {"merge_method": "linear", "models": models, "dtype": "float32", "out_dtype": "bfloat16"}
    recipe.write_text(json.dumps(raw))  # JSON is YAML
    return timed([command, str(recipe), str(root / "theirs")])


def same_bits(ours: Path, theirs: Path) -> None:
    """Every tensor of two merges, bit for bit."""
    first, second = open_checkpoint(ours), open_checkpoint(theirs)
    if first.tensors.keys() != second.tensors.keys():
        raise SystemExit(f"tensors differ: {sorted(first.tensors.keys() ^ second.tensors.keys())[:3]}")
    for name, info in first.tensors.items():
        for block in row_blocks(info.shape):
            if not np.array_equal(first.raw(name, block), second.raw(name, block)):
                raise SystemExit(f"{name}: ours and mergekit's differ in rows {block.start} to {block.stop}")


def planned(folder: Path, root: Path, rounds: int) -> None:
    """A plan of 26 billion parameters from two headers of 7; the forecast of the pair at hand against its merge."""
    pair = write_pair(folder / "headers", 32, 4096, ffn=11008)
    run = min((timed(jam("width", pair, "--dry-run")) for _ in range(rounds)), key=lambda run: run.wall)
    print(f"\nplan of two 7B headers, width (bar 2 s): {run.wall:.2f} s, CPU {run.cpu:.2f} s")
    for line in run.printed.splitlines()[:4]:
        print(f"    {line.replace(str(folder), '...')}")
    said, real = [], []
    for _ in range(rounds):
        warm(root)
        page = timed(jam("width", root, "--dry-run")).printed
        said.append(float(re.search(r"time: about ([\d.]+) s", page)[1]))
        real.append(merged(root, "width")[0].wall)
    guess, truth = statistics.median(said), statistics.median(real)
    memory = re.search(r"memory: about (\d+)", page)[1]
    print(
        f"forecast of width at hand: {guess:.1f} s and {memory} MB; merged in {truth:.1f} s ({guess / truth - 1:+.0%})"
    )


def memory(folder: Path, sizes: dict[int, tuple[str, ...]]) -> None:
    """Peak anonymous memory by layers of width 2048, from files of holes: what is read does not matter here."""
    print("\n| inputs, GB each | method | peak RssAnon, MB (bar 300) |\n|---|---|---|")
    for layers, methods in sizes.items():
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            root = write_pair(Path(tmp), layers, 2048, ffn=8192)
            for method in methods:
                run, _ = merged(root, method)
                print(f"| {size_of(root / 'text') / 1e9:.1f} | `{method}` | {run.peak:.0f} |", flush=True)


def many_tensors(folder: Path, rounds: int) -> None:
    root = write_pair(folder / "tiny", 1000, 64)
    runs = [merged(root, "uniform")[0] for _ in range(rounds)]
    count = len(open_checkpoint(root / "text").tensors)
    print(f"\n{count:,} tiny tensors, uniform (bar 3 s): {statistics.median(run.wall for run in runs):.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--mergekit", help="path of mergekit-yaml")
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    parser.add_argument("--only", default="speed,tiny,plan,memory", help="parts to run")
    options = parser.parse_args()
    layers, width = (8, 1024) if options.quick else (options.layers, 2048)
    rounds, parts = 1 if options.quick else options.rounds, options.only.split(",")
    with tempfile.TemporaryDirectory(dir=options.folder) as tmp:
        root = write_pair(Path(tmp) / "pair", layers, width) if {"speed", "plan"} & set(parts) else Path(tmp)
        if "speed" in parts:
            speed(root, rounds, options.mergekit)
        if "tiny" in parts:
            many_tensors(Path(tmp), rounds)
        if "plan" in parts:
            planned(Path(tmp), root, rounds)
        shutil.rmtree(root, ignore_errors=True)
        if "memory" in parts and not options.quick:
            every = ("uniform", "cross", "width")
            memory(Path(options.folder or tempfile.gettempdir()), {8: every, 24: every, 66: every})


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    main()
