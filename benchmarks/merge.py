"""A merge against a file copy: wall time as a ratio, and peak anonymous memory.

Two Llama-shaped checkpoints of random bfloat16 are written once. Then, alternating, in processes of their own: the
baseline reads every input byte and writes as many bytes as the merge will, in 8 MB pieces, and fsyncs; the merge is the
``jam`` command, imports included, with the same fsync. The table has the median of each and their ratio; memory is the
greatest RssAnon of the process, sampled. With ``--mergekit`` (the command's path) its ``linear`` runs in the same
rounds.

    python benchmarks/merge.py            # two of 2.7 GB; needs about 22 GB of disk
    python benchmarks/merge.py --quick    # two of 0.25 GB, one round (under a minute)
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from jam import assets
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


def llama(layers: int, width: int, vocab: int) -> dict:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_attention_heads": width // 64,
        "num_key_value_heads": width // 256,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def write_parent(folder: Path, source: Path, layers: int, width: int) -> None:
    """A parent of the shipped one's vocabulary."""
    record = JamFile.read(source)
    config, family = llama(layers, width, record.vocabulary.size), FAMILIES["llama"]
    sizes = family.sizes(config)
    specs = [TensorSpec(name, "BF16", family.shape(sizes, axes)) for name, axes in family.tensors(config).items()]
    random = np.random.default_rng(0).standard_normal(CHUNK // 2, dtype=np.float32) * np.float32(0.02)
    bits = (random.view(np.uint32) >> 16).astype("<u2")
    with ShardWriter(folder, specs) as writer:
        for spec in specs:
            rows, inner = spec.shape[0], spec.bytes // 2 // spec.shape[0]
            step = max(1, len(bits) // inner)
            for at in range(0, rows, step):
                count = min(step, rows - at)
                writer.append(spec.name, bits[: count * inner].reshape(count, *spec.shape[1:]))
        writer.finish()
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("jam.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    if record.image_tokenizer is not None:
        shutil.copytree(source / record.image_tokenizer, folder / record.image_tokenizer)


def timed(command: list[str]) -> tuple[float, float]:
    """Wall seconds, and the greatest RssAnon in MB."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.poll() is None:
        try:
            lines = [line for line in status.read_text().splitlines() if line.startswith("RssAnon")]
        except OSError:
            break
        peak = max([peak, *(int(line.split()[1]) for line in lines)])
        time.sleep(0.01)
    error = process.communicate()[1].decode()
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:6])} ...: {error}")
    return time.perf_counter() - began, peak / 1024


def weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in weights(folder))


def compare(root: Path, rounds: int, mergekit: str | None) -> None:
    text, image, out = root / "text", root / "image", root / "out"
    inputs = [str(file) for folder in (text, image) for file in weights(folder)]
    print(f"inputs: {size_of(text) / 1e9:.2f} + {size_of(image) / 1e9:.2f} GB; median of {rounds} rounds\n")
    print("| | wall, s | baseline, s | ratio | output, GB | peak RssAnon, MB |\n|---|---|---|---|---|---|")
    for method in ("uniform", "cross", "width"):
        command = [sys.executable, "-m", "jam.cli", "merge", "--method", method]
        command += ["--text", str(text), "--image", str(image), "--out", str(out)]
        ours, base, peaks, peer = [], [], [], []
        for _ in range(rounds):
            seconds, peak = timed(command)
            ours.append(seconds)
            peaks.append(peak)
            written = size_of(out)
            shutil.rmtree(out)
            copied = root / "copy"
            base.append(timed([sys.executable, "-c", COPY, str(copied), str(written), str(CHUNK), *inputs])[0])
            copied.unlink()
            if mergekit is not None and method == "uniform":
                peer.append(run_mergekit(mergekit, text, image, out))
                shutil.rmtree(out)
        median, baseline = statistics.median(ours), statistics.median(base)
        row = f"{median:.2f} | {baseline:.2f} | {median / baseline:.2f} | {written / 1e9:.2f} | {max(peaks):.0f}"
        print(f"| `{method}` | {row} |", flush=True)
        if peer:
            seconds = statistics.median(item[0] for item in peer)
            row = f"{seconds:.2f} | {baseline:.2f} | {seconds / baseline:.2f} | | {max(item[1] for item in peer):.0f}"
            print(f"| mergekit `linear` ({seconds / median:.1f} x ours) | {row} |", flush=True)


def run_mergekit(command: str, text: Path, image: Path, out: Path) -> tuple[float, float]:
    recipe = out.with_suffix(".yaml")
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in (text, image)]
    raw = {"merge_method": "linear", "models": models, "dtype": "float32", "out_dtype": "bfloat16"}
    recipe.write_text(json.dumps(raw))  # JSON is YAML
    return timed([command, str(recipe), str(out)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--mergekit", help="path of mergekit-yaml")
    parser.add_argument("--folder", type=Path, help="where to work (default: the temporary folder)")
    options = parser.parse_args()
    layers, width = (8, 1024) if options.quick else (options.layers, 2048)
    with tempfile.TemporaryDirectory(dir=options.folder) as tmp:
        root = Path(tmp)
        write_parent(root / "text", assets.TEXT_PARENT, layers, width)
        write_parent(root / "image", assets.IMAGE_PARENT, layers, width)
        compare(root, 1 if options.quick else options.rounds, options.mergekit)


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    main()
