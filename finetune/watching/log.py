"""``log.jsonl``: one line over the steps since the last one, appended; a resumed run drops what lies beyond it.

docs/training.md has every key. What a step measured comes from its report; what the run knows besides from the trainer.
"""

import json
import math
import resource
import sys
from pathlib import Path

import torch

from finetune.loop import StepReport, Trainer
from finetune.watching.flops import Work
from finetune.watching.measure import DOCUMENTS, TOKENS, shares
from jam.shards import sync_path

LOG = "log.jsonl"


def log_line(trainer: Trainer, reports: list[StepReport], work: Work, peak: float | None) -> dict:
    """One line of log.jsonl over the steps since the last one.

    Args:
        peak: TFLOP/s of one device, where it is known.
    """
    summed = torch.stack([report.sums for report in reports]).sum(0)
    counts = torch.tensor([report.counts for report in reports], dtype=torch.float64).sum(0).tolist()
    means = summed[:, 0] / summed[:, 1].clamp_min(1)
    last, seconds = reports[-1], sum(report.seconds for report in reports)
    line = {"step": last.step, "tokens": last.tokens, "loss": sum(r.loss for r in reports) / len(reports)}
    line |= {
        f"loss/{m}": float(mean) for m, mean, n in zip(("text", "image"), means[:2], summed[:2, 1], strict=True) if n
    }
    if trainer.recipe.loss.z:
        line["loss/z"] = sum(r.z for r in reports) / len(reports)
    names = [source.source.name for source in trainer.plan.sources]
    sources = zip(names, means[2:], summed[2:, 1], strict=True)  # apart: a source may well be named text or image
    line |= {f"loss/source/{name}": float(mean) for name, mean, n in sources if n}
    read, weights = trainer.read.tolist(), trainer.plan.weights
    line |= {f"share/{name}": round(n / sum(read), 4) for name, n in zip(names, read, strict=True)}
    line |= {f"target/{name}": round(w / sum(weights), 4) for name, w in zip(names, weights, strict=True)}
    line |= shares(counts) | {"lr": last.lr, "grad_norm": last.grad_norm, "seconds": round(seconds, 3)}
    flops = work.of(counts, summed)
    line["tokens_per_second"] = round((counts[TOKENS] - counts[DOCUMENTS]) / seconds, 1)
    line["tflops"] = float(f"{flops / seconds / 1e12:.4g}")
    if peak is not None:
        line["mfu"] = round(utilisation(trainer, flops, seconds, peak), 4)
    line["memory_gb"] = round(peak_memory(trainer.accelerator.device) / 1e9, 3)
    line["seconds_left"] = round((last.steps - last.step) * seconds / len(reports), 1)
    return line


def utilisation(trainer: Trainer, flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs of all devices over what they could have done in this time."""
    return flops / (seconds * peak * 1e12 * trainer.accelerator.num_processes)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors took on a GPU, else the most that this process took; of the first rank."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024  # bytes already, on a Mac


def append_log(run: Path, line: dict, name: str = LOG) -> None:
    with open(run / name, "a", encoding="utf-8") as log:
        log.write(json.dumps(line, ensure_ascii=False) + "\n")


def trim_log(run: Path, step: int, name: str = LOG) -> None:
    """Drops lines beyond the step that a run resumes from, so that no step is logged twice."""
    path = run / name
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True)
        kept = [line for line in lines if line.endswith("\n") and _logged_step(line) <= step]
        if kept != lines:
            temporary = path.with_name(f".{name}.tmp")  # a disk that is full must not cost the log that is there
            temporary.write_text("".join(kept), encoding="utf-8")
            sync_path(temporary)  # nor a power cut
            temporary.replace(path)


def read_lines(run: Path, name: str = LOG) -> list[dict]:
    """The whole lines of a log that was trimmed; none where there is no log."""
    path = run / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _logged_step(line: str) -> float:
    """The step of a line; infinity for one that does not parse, as a full disk or a power cut leaves it."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
