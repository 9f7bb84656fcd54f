"""The demo's page: one HTML file that carries its style, pictures and curves, and asks nothing of a network.

Plain data in, a string out. What the figures mean is said where they stand; no figure is computed here, except the
change from one to another. Layout: a table of losses, the choice, curves, pictures beside the real ones, replies, and
how it was made.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

STYLE = Path(__file__).parent / "assets" / "report.css"


@dataclass(frozen=True)
class Losses:
    """Bits per byte of held-out text, nats per image code of held-out captions (None without an image head)."""

    text: float
    image: float | None


@dataclass(frozen=True)
class Row:
    """A model of the table. A parent has ``step0`` only; ``score`` is the choice rule's sum on the validation split."""

    name: str
    note: str
    parameters: int
    step0: Losses
    after: Losses | None = None
    score0: float | None = None
    score: float | None = None
    best: bool = False

    @property
    def improved(self) -> bool | None:
        """Whether training brought the rule's sum below its own step 0; None for a parent."""
        return None if self.score is None or self.score0 is None else self.score < self.score0


@dataclass(frozen=True)
class Picture:
    """A held-out caption with PNG bytes: the real image, and one generated image a model label."""

    caption: str
    split: str
    real: bytes
    generated: dict[str, bytes | None]


Piece = str | bytes  # a run of text, or an image's PNG bytes


@dataclass(frozen=True)
class Exchange:
    """A held-out question and each model's reply."""

    split: str
    question: tuple[Piece, ...]
    replies: dict[str, tuple[Piece, ...]]


@dataclass(frozen=True)
class Page:
    rows: Sequence[Row]
    rule: str
    budget: str
    curves_svg: str
    pictures: Sequence[Picture]
    exchanges: Sequence[Exchange]
    models: dict[str, str]  # label -> one sentence: what this model is
    splits: dict[str, str]  # split -> one sentence: what it holds
    times: Sequence[tuple[str, float]]  # step, seconds
    facts: Sequence[tuple[str, str]] = field(default=())


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def picture(png: bytes, alt: str) -> str:
    return f'<img src="{data_uri(png)}" alt="{escape(alt)}">'


def _figure(png: bytes | None, label: str, caption: str) -> str:
    image = picture(png, f"{label}: {caption}") if png else '<span class="none">no image</span>'
    return f"<figure>{image}<figcaption>{escape(label)}</figcaption></figure>"


def _change(before: float | None, after: float | None) -> str:
    """A relative change as a cell: good when the loss fell."""
    if before is None or after is None:
        return "<td></td>"
    percent = 100 * (after - before) / before
    kind = "good" if percent < -0.05 else "bad" if percent > 0.05 else "same"
    return f'<td class="{kind}">{percent:+.1f}&#8239;%</td>'.replace("-", "&minus;")


def _number(value: float | None) -> str:
    return "<td>&ndash;</td>" if value is None else f"<td>{value:.3f}</td>"


def _signed(value: float | None) -> str:
    return "<td></td>" if value is None else f"<td>{value:+.3f}</td>".replace("-", "&minus;")


def _table_row(row: Row) -> str:
    after = row.after or Losses(float("nan"), None)
    cells = [_number(row.step0.text)]
    cells += [_number(after.text), _change(row.step0.text, after.text)] if row.after else ["<td></td>"] * 2
    cells.append(_number(row.step0.image))
    cells += [_number(after.image), _change(row.step0.image, after.image)] if row.after else ["<td></td>"] * 2
    cells += [_signed(row.score0), _signed(row.score)]
    verdict = {None: "", True: '<span class="good">yes</span>', False: '<span class="bad">no</span>'}[row.improved]
    cells.append(f"<td>{verdict}</td>")
    badge = ' <span class="badge">best</span>' if row.best else ""
    head = (
        f'<th scope="row">{escape(row.name)}{badge}<small>{escape(row.note)}, '
        f"{row.parameters / 1e6:.1f} M parameters</small></th>"
    )
    kind = ' class="best"' if row.best else ""
    return f"<tr{kind}>{head}{''.join(cells)}</tr>"


def _table(page: Page) -> str:
    rows = "".join(_table_row(row) for row in page.rows)
    return f"""
<section><h2>What each fusion kept and gained</h2>
<p>Lower is better. <em>Bits per byte</em> on held-out text and <em>nats per image code</em> on held-out captions, test
split; every model is scored with the softmax of its modality's head. {escape(page.budget)}</p>
<div class="scroll"><table><thead>
<tr><th rowspan="2"></th><th colspan="3">text, bits per byte</th><th colspan="3">images, nats per code</th>
<th colspan="2">choice sum, validation</th><th rowspan="2">improved on<br>its own step 0</th></tr>
<tr><th>step 0</th><th>after</th><th>change</th><th>step 0</th><th>after</th><th>change</th>
<th>step 0</th><th>after</th></tr>
</thead><tbody>{rows}</tbody></table></div>
<p class="rule"><strong>The rule, fixed beforehand.</strong> {escape(page.rule)}</p></section>"""


def _curves(page: Page) -> str:
    if not page.curves_svg:
        return ""
    svg = page.curves_svg[page.curves_svg.index("<svg") :]
    return f"""
<section><h2>Training losses by modality</h2>
<p>Of the training mix, each fusion on the same documents in the same order; thin as logged, thick smoothed.</p>
<div class="scroll curves">{svg}</div></section>"""


def _models(page: Page) -> str:
    items = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in page.models.items())
    return f'<dl class="models">{items}</dl>'


def _pictures(page: Page) -> str:
    blocks = []
    for split, meaning in page.splits.items():
        chosen = [item for item in page.pictures if item.split == split]
        if not chosen:
            continue
        cards = "".join(
            f'<article class="card"><h4>{escape(item.caption)}</h4><div class="trio">'
            + _figure(item.real, "real", item.caption)
            + "".join(_figure(png, label, item.caption) for label, png in item.generated.items())
            + "</div></article>"
            for item in chosen
        )
        blocks.append(f'<h3>{escape(meaning)}</h3><div class="cards">{cards}</div>')
    if not blocks:
        return ""
    return f"""
<section><h2>Images for held-out captions</h2>
<p>First sample each, none picked. Neither model has trained on the real image that stands beside its own.</p>
{_models(page)}{"".join(blocks)}</section>"""


def _bubble(pieces: tuple[Piece, ...], kind: str, label: str) -> str:
    body = "".join(
        f"<p>{escape(piece.strip())}</p>" if isinstance(piece, str) else picture(piece, f"image by {label}")
        for piece in pieces
        if not isinstance(piece, str) or piece.strip()
    )
    return f'<div class="bubble {kind}">{body or "<p><em>(empty reply)</em></p>"}</div>'


def _exchanges(page: Page) -> str:
    blocks = []
    for split, meaning in page.splits.items():
        chosen = [item for item in page.exchanges if item.split == split]
        if not chosen:
            continue
        talks = "".join(
            '<article class="talk">'
            + _bubble(item.question, "user", "the user")
            + '<div class="pair">'
            + "".join(
                f"<div><h4>{escape(label)}</h4>{_bubble(pieces, 'model', label)}</div>"
                for label, pieces in item.replies.items()
            )
            + "</div></article>"
            for item in chosen
        )
        blocks.append(f"<h3>{escape(meaning)}</h3>{talks}")
    if not blocks:
        return ""
    return f"""
<section><h2>Replies to held-out questions</h2>
<p>Text and images as they came, one sample each, none picked.</p>{"".join(blocks)}</section>"""


def duration(seconds: float) -> str:
    """
    >>> duration(7.25), duration(187.0)
    ('7.2 s', '3 min 07 s')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60:02d} s"


def _foot(page: Page) -> str:
    rows = [(name, duration(seconds)) for name, seconds in page.times]
    times = "".join(f"<tr><th scope=row>{escape(name)}</th><td>{value}</td></tr>" for name, value in rows)
    total = duration(sum(seconds for _, seconds in page.times))
    facts = "".join(f"<tr><th scope=row>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in page.facts)
    return f"""
<footer><h2>How this page was made</h2><div class="foot">
<table><tbody>{facts}</tbody></table>
<table><tbody>{times}<tr class="best"><th scope=row>all steps</th><td>{total}</td></tr></tbody></table>
</div></footer>"""


def _headline(page: Page) -> str:
    best = next((row for row in page.rows if row.best), None)
    if best is None or best.after is None or best.after.image is None or best.step0.image is None:
        return "A text model and an image model, fused, trained on and asked."
    return (
        f"A text model and an image model, fused three ways and trained on. Best by the rule below: "
        f"{best.name}, at {best.after.text:.3f} bits per byte (from {best.step0.text:.3f}) and "
        f"{best.after.image:.3f} nats per image code (from {best.step0.image:.3f})."
    )


def render_page(page: Page) -> str:
    """The whole page as one HTML document without links to anything outside it."""
    style = STYLE.read_text(encoding="utf-8")
    body = "".join(part(page) for part in (_table, _curves, _pictures, _exchanges, _foot))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>jam demo</title><style>
{style}</style></head><body><main>
<header><h1>jam demo</h1><p class="lead">{escape(_headline(page))}</p></header>{body}
</main></body></html>
"""
