"""CPU seconds of one training step: what attention, malloc settings and the narrow loss are worth.

Each row is a process of its own (malloc settings last as long as a process): forward and backward of 16 packed rows
of 256 tokens in bf16 on one thread, the least of a few steps, in CPU seconds so that other jobs on the machine count
little. The baseline is the sdpa kernel under glibc's defaults with scores of every id at every position, which is what
``transformers.Trainer`` computes; ratio = baseline / row. The last row is what ``jam finetune`` runs on a CPU.

    python benchmarks/train_step.py            # the shipped image parent and the default chat model (about two minutes)
    python benchmarks/train_step.py --quick    # the image parent alone, fewer steps (under a minute)
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

DOCUMENTS = "jam_documents"  # jam.models.packed, which a process imports after its settings
# attention kernel, freed memory kept, scores of a head's own ids at learnt positions alone
ROWS = (
    ("sdpa", False, False),
    ("sdpa", True, False),
    ("eager", False, False),
    ("eager", True, False),
    (DOCUMENTS, True, False),
    (DOCUMENTS, True, True),
)


def measure(folder: str, kernel: str, keep: bool, narrow: bool, steps: int) -> dict:
    """Runs in the child: the least CPU seconds of a step, and the process's peak memory."""
    import torch

    from finetune.loss import TokenLoss, cross_entropy
    from finetune.order.pack import Batch
    from finetune.recipe import LossSection
    from jam.memory import keep_freed_memory
    from jam.models.heads import allowed_ids
    from jam.models.load import load_bundle

    if keep:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bundle = load_bundle(Path(folder))
    bundle.model.train()
    bundle.model.set_attn_implementation(kernel)
    rows, length = 16, 256
    ids = torch.randint(8, bundle.vocabulary.size, (rows, length))
    heads = (torch.rand(rows, length) < 0.7).long()  # seven tenths of a captioned image are codes
    labels = torch.multinomial(allowed_ids(bundle.vocabulary).float()[heads].flatten(0, 1), 1).view(rows, length)
    batch = Batch(
        ids,
        torch.arange(length).expand(rows, length),
        labels,
        heads,
        torch.ones(rows, length),
        (torch.arange(length) // 90).expand(rows, length),
        torch.zeros(rows, dtype=torch.long),
    )
    network = TokenLoss(bundle, LossSection())

    def wide() -> torch.Tensor:
        logits, _ = bundle.logits(ids, heads, **network.seen(batch))
        return cross_entropy(logits, batch)

    seconds = []
    for _ in range(steps + 1):
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            nats = network(batch)[0] if narrow else wide()
        nats.mean().backward()
        bundle.model.zero_grad()
        seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": min(seconds[1:]), "peak_mb": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the image parent alone")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, kernel, keep, narrow, steps = args.child
        print(json.dumps(measure(folder, kernel, keep == "True", narrow == "True", int(steps))))
        return

    from jam.assets import IMAGE_PARENT
    from jam.shipped import shipped_model

    models = {"image parent": IMAGE_PARENT} | ({} if args.quick else {"chat model": shipped_model()})
    print(f"{'model':14} {'attention':10} {'keep memory':12} {'loss':7} {'CPU s/step':>10} {'peak MB':>8} {'ratio':>6}")
    for name, folder in models.items():
        base = None
        for kernel, keep, narrow in ROWS:
            settings = [kernel, str(keep), str(narrow), "2" if args.quick else "5"]
            command = [sys.executable, __file__, "--child", str(folder), *settings]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0"}
            out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
            row = json.loads(out.splitlines()[-1])
            base = base or row["seconds"]
            ratio = base / row["seconds"]
            print(
                f"{name:14} {kernel:10} {keep!s:12} {'narrow' if narrow else 'wide':7} {row['seconds']:10.3f} "
                f"{row['peak_mb']:8} {ratio:5.2f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
