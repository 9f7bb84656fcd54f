"""``log.jsonl``: one line over the steps since the last one, appended; a resumed run drops what lies beyond it."""

import json
import math
from pathlib import Path

import torch

from finetune.loop import StepReport, Trainer


def log_line(trainer: Trainer, reports: list[StepReport], totals: torch.Tensor) -> dict:
    """One line of log.jsonl over the steps since the last one."""
    summed = torch.stack([report.sums for report in reports]).sum(0)
    means = summed[:, 0] / summed[:, 1].clamp_min(1)
    names = [source.source.name for source in trainer.plan.sources]
    last, seconds = reports[-1], sum(report.seconds for report in reports)
    line = {"step": last.step, "tokens": last.tokens, "loss": sum(r.loss for r in reports) / len(reports)}
    line |= {
        f"loss/{m}": float(mean) for m, mean, n in zip(("text", "image"), means[:2], summed[:2, 1], strict=True) if n
    }
    if trainer.recipe.loss.z:
        line["loss/z"] = sum(r.z for r in reports) / len(reports)
    sources = zip(names, means[2:], summed[2:, 1], strict=True)  # apart: a source may well be named text or image
    line |= {f"loss/source/{name}": float(mean) for name, mean, n in sources if n}
    shares = totals[2:, 1] / totals[2:, 1].sum().clamp_min(1)
    line |= {f"share/{name}": round(float(share), 4) for name, share in zip(names, shares, strict=True)}
    line |= {"lr": last.lr, "grad_norm": last.grad_norm, "seconds": round(seconds, 3)}
    return line


def append_log(run: Path, line: dict) -> None:
    with open(run / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")


def trim_log(run: Path, step: int) -> None:
    """Drops lines beyond the step that a run resumes from, so that no step is logged twice."""
    path = run / "log.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(True)
        kept = [line for line in lines if line.endswith("\n") and _logged_step(line) <= step]
        if kept != lines:
            temporary = path.with_name(".log.jsonl.tmp")  # a disk that is full must not cost the log that is there
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(path)


def _logged_step(line: str) -> float:
    """The step of a line; infinity for one that does not parse, as a full disk or a power cut leaves it."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
