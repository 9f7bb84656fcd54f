"""Peak memory and CPU seconds of head and loss of one training step, in chunks against scores that stand whole.

Each row is a process of its own, so that the kernel's high-water mark (VmHWM) is that row's alone: what it grows by
from before the head to after the backward pass, states and weights counted out, gradients counted in. bf16 under
autocast, as training has it, on one thread. ratio = the row over that of the plain loss.

    python -m benchmarks.head_loss            # 8,192 positions of a 65,536-row head (about eight minutes)
    python -m benchmarks.head_loss --quick    # 3,072 positions, narrower, the default chunk alone (under a minute)
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

VOCABULARY = 65_536
CHUNKS = (None, 256, 512, 1024, 2048)
QUICK = 3072, 128, (None, 1024), 1  # positions, width, chunks, steps


def high_water() -> int:
    """Bytes that this process has held at most."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def measure(rows: int, width: int, chunk: int | None, steps: int) -> dict:
    """Runs in the child: growth of the high-water mark in the first step, the least CPU seconds of a step."""
    import torch

    from finetune.chunked import chunked_nats, plain_nats
    from jam.models.span_head import span_scores

    torch.set_num_threads(1)
    torch.manual_seed(0)
    x_ND = torch.randn(rows, width, requires_grad=True)
    weight_VD = (torch.randn(VOCABULARY, width) / width**0.5).requires_grad_()
    targets_N, slices = torch.randint(VOCABULARY, (rows,)), [slice(0, VOCABULARY)]
    before, seconds, grown = high_water(), [], 0
    for _ in range(steps):
        x_ND.grad = weight_VD.grad = None
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            if chunk is None:
                nats_N, _ = plain_nats(span_scores(x_ND, weight_VD, slices), targets_N)
            else:
                nats_N, _ = chunked_nats(x_ND, weight_VD, slices, targets_N, None, chunk)
        nats_N.mean().backward()
        seconds.append(time.process_time() - began)
        grown = grown or high_water() - before
    return {"seconds": min(seconds), "bytes": grown, "loss": float(nats_N.mean())}


def table(rows: int, width: int, chunks: tuple[int | None, ...], steps: int) -> None:
    """Prints a row for each chunk; None, the plain loss, comes first and is what the others are divided by."""
    base = None
    print(f"{rows} positions, {VOCABULARY} rows of width {width}")
    print(f"{'chunk':>6} {'peak MB':>8} {'ratio':>6} {'CPU s':>7} {'ratio':>6} {'loss':>8}")
    for chunk in chunks:
        command = [sys.executable, "-m", "benchmarks.head_loss", "--child", *map(str, (rows, width, chunk, steps))]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
        out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        row = json.loads(out.splitlines()[-1])
        base = base or row
        memory, seconds = (row[key] / base[key] for key in ("bytes", "seconds"))
        print(
            f"{chunk or 'plain':>6} {row['bytes'] / 1e6:8.0f} {memory:6.3f} {row['seconds']:7.2f} {seconds:6.2f} "
            f"{row['loss']:8.5f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer positions, the default chunk alone")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        rows, width, chunk, steps = args.child
        print(json.dumps(measure(int(rows), int(width), None if chunk == "None" else int(chunk), int(steps))))
        return
    table(*QUICK if args.quick else (8192, 512, CHUNKS, 2))


if __name__ == "__main__":
    main()
