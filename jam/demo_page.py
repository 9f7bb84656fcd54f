"""From the demo's results to its page: reads what the steps left, computes nothing new.

The one place that gives results their words (names of models, splits, facts at the foot).
"""

import os
import platform
from importlib.metadata import version
from pathlib import Path

from jam import __version__
from jam.demo_bench import METHODS, RULE, Workbench, read_json
from jam.plot import loss_curves, read_log
from jam.report import Exchange, Losses, Page, Picture, Piece, Row, render_page

NOTES = {
    "text parent": "trained on text alone",
    "image parent": "trained on captioned images",
    "uniform": "the mean of both parents' weights",
    "width": "both parents side by side in one wide model",
    "cross": "two towers with gated cross-attention",
}
SPLITS = {
    "combination": "Held-out combinations: a label seen in training, in a style it was never seen in",
    "label": "Held-out labels: a subject never seen in training",
    "wording": "Unseen wordings about subjects seen in training",
    "subject": "Unseen subjects",
}
LABELS = {"this run's": "this run's model", "shipped": "shipped model"}


def _losses(measured: dict) -> Losses:
    return Losses(measured["test"]["text"], measured["test"]["image"])


def table_rows(measured: dict) -> list[Row]:
    choice = measured["choice"]
    rows = [Row(name, NOTES[name], m["parameters"], _losses(m)) for name, m in measured["parents"].items()]
    for method in METHODS:
        start, after = measured["start"][method], measured["after"][method]
        sums = choice["sums0"][method], choice["sums"][method]
        rows.append(
            Row(
                method,
                NOTES[method],
                start["parameters"],
                _losses(start),
                _losses(after),
                *sums,
                best=method == choice["best"],
            )
        )
    return rows


def _bytes(folder: Path, name: str | None) -> bytes | None:
    return (folder / name).read_bytes() if name else None


def pictures(bench: Workbench, samples: dict) -> list[Picture]:
    result = []
    for rows in zip(*(samples[label]["pictures"] for label in LABELS), strict=True):
        generated = {
            LABELS[label]: _bytes(bench.path("samples", label), row["image"])
            for label, row in zip(LABELS, rows, strict=True)
        }
        real = bench.path("samples", next(iter(LABELS)), rows[0]["real"]).read_bytes()
        result.append(Picture(rows[0]["caption"], rows[0]["split"], real, generated))
    return result


def _pieces(folder: Path, blocks: list[dict]) -> tuple[Piece, ...]:
    return tuple(b["text"] if b["type"] == "text" else (folder / b["path"]).read_bytes() for b in blocks)


def exchanges(bench: Workbench, samples: dict) -> list[Exchange]:
    result = []
    for rows in zip(*(samples[label]["replies"] for label in LABELS), strict=True):
        folders = [bench.path("samples", label) for label in LABELS]
        replies = {
            LABELS[label]: _pieces(folder, row["reply"])
            for label, folder, row in zip(LABELS, folders, rows, strict=True)
        }
        result.append(Exchange(rows[0]["split"], _pieces(folders[0], rows[0]["question"]), replies))
    return result


def facts(bench: Workbench, measured: dict) -> list[tuple[str, str]]:
    settings, split = bench.settings, measured["parents"]["image parent"]["test"]
    packages = ("torch", "transformers", "accelerate", "tokenizers", "numpy")
    versions = [("jam", __version__), ("python", platform.python_version())]
    versions += [(name, version(name)) for name in packages]
    return [
        (
            "continued pretraining",
            f"{settings.pretrain_tokens:,} tokens each fusion, half text, half captioned images and scenes",
        ),
        ("instruction tuning", f"{settings.tune_tokens:,} tokens, best fusion only"),
        ("sequences", f"{settings.seq_len} tokens, {settings.batch} a step, in {settings.precision}"),
        ("held out, each split", f"{split['text_bytes']:,} bytes of text, {split['captions']} captioned images"),
        ("seed", str(settings.seed)),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions)),
        ("machine", f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"),
    ]


def write_page(bench: Workbench, measured: dict, samples: dict) -> Path:
    """Writes ``report.html`` and returns its path."""
    settings, best = bench.settings, measured["choice"]["best"]
    logs = {method: read_log(bench.path("train", method, "log.jsonl")) for method in METHODS}
    page = Page(
        rows=table_rows(measured),
        rule=RULE,
        budget=f"Every fusion was trained on the same budget of {settings.pretrain_tokens:,} tokens.",
        curves_svg=loss_curves(logs, "svg").decode("utf-8"),
        pictures=pictures(bench, samples),
        exchanges=exchanges(bench, samples),
        models={
            LABELS["this run's"]: (
                f"{best}, after {settings.pretrain_tokens:,} tokens of continued pretraining and "
                f"{settings.tune_tokens:,} of instruction tuning, minutes ago on this machine"
            ),
            LABELS["shipped"]: "the default of jam chat, fused from the same parents and tuned for longer",
        },
        splits=SPLITS,
        times=list(read_json(bench.path("times.json")).items()),
        facts=facts(bench, measured),
    )
    path = bench.path("report.html")
    temporary = path.with_name(f".report.html.tmp-{os.getpid()}")
    temporary.write_text(render_page(page), encoding="utf-8")
    temporary.replace(path)
    return path
