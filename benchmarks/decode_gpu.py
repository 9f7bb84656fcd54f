"""How near decoding comes to what memory allows: one image, batch 1 with guidance, at the true shapes of 7B parents.

Each step of a small batch reads every weight once, so that the time of a code is at least their bytes over the
bandwidth of memory, which is measured here by copying. Steps are compiled (``jam.models.compiled``: on CUDA a graph).
Shapes, with random weights in bfloat16: a uniform 7B (32 layers, d 4096), a width merge of two (d 8192) and the cross
model of two, an exchange every second layer. Beside the first stands transformers' ``generate`` with its own guidance.

    python -m benchmarks.decode_gpu              # a CUDA device; 1,024 codes
    python -m benchmarks.decode_gpu --quick      # small shapes and 16 codes on what is there: the script, not a figure
"""

import argparse
import gc
import time

import torch
from transformers import LlamaConfig, PreTrainedModel

from benchmarks.decode import CODES, IDS, Case, medians, network
from jam.memory import keep_freed_memory
from jam.models.cross import JamCrossForCausalLM
from jam.models.cross_config import JamCrossConfig
from jam.models.load import quiet_transformers

COPIED = 1 << 30  # bytes


def cross(layers: int, width: int, device: str, plain: LlamaConfig) -> JamCrossForCausalLM:
    """Two towers of one shape, an exchange every second layer."""
    tower, spans = plain.to_dict(), [["control", 0, 8], ["text", 8, IDS - CODES], ["image", IDS - CODES, IDS]]
    controls = {"bos": 0, "pad": 1, "eos": 2, "mask": 3, "begin_image": 4, "end_image": 4}
    config = JamCrossConfig(
        text_config=tower,
        image_config=tower,
        exchanges=[[layer, layer] for layer in range(2, layers + 1, 2)],
        vocabulary={"spans": spans, "controls": controls, "codes_per_image": 1},
        vocab_size=IDS,
    )
    with torch.device(device):
        return JamCrossForCausalLM(config).to(torch.bfloat16).eval()


def copy_bandwidth(device: torch.device, size: int) -> float:
    """Bytes a second, read and written, of the best of ten copies."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * size / best


def read_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that a code reads: all but tables, and of the heads the rows of the codes."""
    total = 0
    for name, weight in model.named_parameters():
        if "embed_tokens" in name or name == "text.lm_head.weight":
            continue
        total += weight.nbytes * CODES // IDS if "lm_head" in name else weight.nbytes
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--codes", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", help="of torch.compile, or none; default: inductor, on a CPU none")
    given = parser.parse_args()
    if not given.quick and not torch.cuda.is_available():
        parser.error("no CUDA device here: not measured; --quick runs small shapes on a CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend = given.backend or ("inductor" if device == "cuda" else "none")
    layers, width, codes, rounds = (2, 128, 16, 1) if given.quick else (32, 4096, given.codes, given.rounds)
    keep_freed_memory()
    bandwidth = copy_bandwidth(torch.device(device), COPIED >> (4 if given.quick else 0))
    print(f"{device}, memory copied at {bandwidth / 1e9:,.0f} GB/s; {codes} codes with guidance, bfloat16\n")
    print("| shape | s an image | read, GB a code | of the bandwidth | eight over one | transformers over it |")
    print("|---|---|---|---|---|---|")
    for name in ("uniform", "width", "cross"):
        with quiet_transformers():
            model = network(layers, 2 * width if name == "width" else width, device)
            if name == "cross":
                model = cross(layers, width, device, model.config)
        case = Case(model, codes)
        sides = {"one": case.ours, "eight": lambda case=case: case.ours(rows=8)}
        if name == "uniform":
            with quiet_transformers():
                theirs = medians({"theirs": case.theirs}, rounds, case.device)["theirs"]
        case.bundle.backend = None if backend == "none" else backend
        for side in sides.values():
            side()  # compiles
        took = medians(sides, rounds, case.device)
        size = read_bytes(model)
        share = size * codes / took["one"] / bandwidth
        beside = f"{theirs / took['one']:.2f} (bar 5)" if name == "uniform" else "-"
        print(
            f"| {name} | {took['one']:.2f} | {size / 1e9:.2f} | {100 * share:.0f} % (bar 70) "
            f"| {took['eight'] / took['one']:.2f} (bar 1.5) | {beside} |",
            flush=True,
        )
        del model, case, sides
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
