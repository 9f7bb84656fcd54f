"""Peak memory of a decode call: what ``jam.decode.memory`` says against the kernel's figure.

Each case is a process of its own. The shipped model draws first, so that libraries and their first allocations count as
the process; then a Llama shape with random weights is made and packed (bfloat16; attention and cache in float32), the
kernel's mark of the peak is set back, and images are drawn to the last code. The prompts are equal, as candidates' are.

glibc keeps freed blocks in the process or gives them back, as they happen to lie. What is said is held against a run in
which it gives back every block above 128 KiB; beside it stands one with malloc as it is, which may hold the prefill's
cache once more.

    python -m benchmarks.decode_memory            # three sizes and the shipped model (five minutes)
    python -m benchmarks.decode_memory --quick    # the smallest and the shipped model
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

CODES = 64
CASES = {  # layers, width, images, tokens of the prompt
    "4 layers, d 512, one image, prompt of 64": (4, 512, 1, 64),
    "8 layers, d 1024, 8 candidates, prompt of 512": (8, 1024, 8, 512),
    "12 layers, d 1024, 8 candidates, prompt of 1,024": (12, 1024, 8, 1024),
}
SHIPPED = "the shipped model, 8 candidates, prompt of 512"


def status(name: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def draw(bundle, images: int, prompt: int) -> tuple[int, int]:
    """Draws so many images with guidance; rows, and room of each."""
    import torch

    from jam.decode.engine import run_job
    from jam.decode.job import prepare_ids
    from jam.decode.options import SamplingOptions

    ids = [0, *torch.randint(8, 2048, (prompt - 1,), generator=torch.Generator().manual_seed(1)).tolist()]
    codes = bundle.vocabulary.codes_per_image
    options = SamplingOptions(mode="image", max_images=1, max_tokens=codes + 3)
    job = prepare_ids(bundle, [ids] * images, [options] * images)
    list(run_job(bundle, job))
    return 2 * images, options.max_tokens


def child(layers: int, width: int, images: int, prompt: int) -> None:
    import torch

    from benchmarks.decode import bundle_of, network
    from jam.decode.memory import decode_memory
    from jam.models.load import load_bundle, quiet_transformers
    from jam.shipped import model_folder

    torch.set_num_threads(1)
    trim = ctypes.CDLL(None).malloc_trim
    with quiet_transformers():
        small = load_bundle(model_folder(None), torch.bfloat16)
        small.pack()
        draw(small, 1, 8)
        del small
        trim(0)
        base = status("VmRSS")
        if layers:
            bundle = bundle_of(network(layers, width, "cpu"), CODES)
        else:
            bundle = load_bundle(model_folder(None), torch.bfloat16)
        bundle.pack()
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the mark of the peak starts anew, proc(5)
    rows, room = draw(bundle, images, prompt)
    measured = status("VmHWM")
    said = decode_memory(bundle, rows, prompt, room)
    print(json.dumps({"base": base, "measured": measured, "peak": said.peak, **asdict(said)}))


def measure(case: tuple[int, ...], settings: dict[str, str]) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.decode_memory", "--case", *map(str, case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=os.environ | settings)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--case", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        child(*options.case)
        return
    cases = dict(list(CASES.items())[:1] if options.quick else CASES.items()) | {SHIPPED: (0, 0, 8, 512)}
    print("| MB | process | weights | heads | cache | step | said | measured | error | prefill's | as malloc is |")
    print("|---" * 11 + "|")
    for title, case in cases.items():
        found, loose = measure(case, {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}), measure(case, {})
        said = found["base"] + found["peak"]
        parts = [found[name] for name in ("base", "weights", "heads", "cache", "step")]
        cells = [f"{part / 1e6:,.0f}" for part in (*parts, said, found["measured"])]
        cells.append(f"{100 * (said / found['measured'] - 1):+.1f} %")
        cells += [f"{found['started'] / 1e6:,.0f}", f"{loose['measured'] / 1e6:,.0f}"]
        print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
