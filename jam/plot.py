"""Loss curves per modality from a run's ``log.jsonl``, as PNG for the run folder or SVG for a page.

The figures are drawn without pyplot: no global state, no display. The SVG takes the text colour of the page around it
(``currentColor``), so that it can stand inline in a light or a dark one.
"""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = ("#3b82f6", "#f59e0b", "#10b981", "#ec4899", "#8b5cf6", "#64748b")  # readable on white and on near-black
MODALITIES = {"loss/text": "text, nats per token", "loss/image": "image, nats per code"}
_INK = "#010203"  # stands for the page's text colour until the SVG is written


def read_log(path: Path) -> list[dict]:
    """The lines of a log by step; a step logged twice (a resumed run) counts as last written.

    A last line without an end is what a killed run leaves; it is dropped. Any other bad line raises ValueError.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines[:-1] if line.strip()]
    return sorted({row["step"]: row for row in rows if "step" in row}.values(), key=lambda row: row["step"])


def smooth(values: list[float], window: int) -> list[float]:
    """Trailing mean over at most ``window`` values.

    >>> smooth([4.0, 2.0, 0.0], 2)
    [4.0, 3.0, 1.0]
    """
    return [sum(values[max(0, at + 1 - window) : at + 1]) / min(at + 1, window) for at in range(len(values))]


def _panel(axes, logs: Mapping[str, list[dict]], key: str, title: str) -> None:
    for (name, rows), colour in zip(logs.items(), COLOURS * (1 + len(logs) // len(COLOURS)), strict=False):
        points = [(row.get("tokens", row["step"]), row[key]) for row in rows if row.get(key) is not None]
        if not points:
            continue
        tokens, values = ([point[i] for point in points] for i in (0, 1))
        marker = "o" if len(points) == 1 else None  # a line through one point shows nothing
        axes.plot(tokens, values, color=colour, alpha=0.25, linewidth=0.8, marker=marker)
        axes.plot(tokens, smooth(values, max(1, len(values) // 20)), color=colour, linewidth=1.8, label=name)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=_INK)
    axes.set_xlabel("tokens", fontsize=9, color=_INK)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value else "0")
    axes.tick_params(colors=_INK, labelsize=8, length=0)
    axes.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#888888")
    if len(logs) > 1 and axes.lines:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)


def loss_curves(logs: Mapping[str, list[dict]] | Path, form: Literal["png", "svg"] = "png") -> bytes:
    """One panel a modality, one curve a run: thin as logged, thick smoothed over a twentieth of the run.

    Args:
        logs: rows of ``log.jsonl`` by the name of their run (:func:`read_log`), or one run's ``log.jsonl``; keys
            ``tokens`` or ``step`` and ``loss/text``, ``loss/image``. A run that lacks a modality has no curve there.
    """
    if isinstance(logs, Path):
        logs = {"loss": read_log(logs)}
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    figure.patch.set_alpha(1.0 if form == "png" else 0.0)
    for axes, (key, title) in zip(figure.subplots(1, len(MODALITIES)), MODALITIES.items(), strict=True):
        axes.set_facecolor("none")
        _panel(axes, logs, key, title)
    buffer = io.BytesIO()
    if form == "png":
        FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
        return buffer.getvalue()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "jam", "font.family": "sans-serif"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None})
    return buffer.getvalue().replace(_INK.encode(), b"currentColor")
