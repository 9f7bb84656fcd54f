"""The page: whole, escaped, and without a link to anything outside it."""

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from PIL import Image

from jam.plot import loss_curves
from jam.report import Exchange, Losses, Page, Picture, Row, render_page

VOID = {"meta", "img", "br", "link", "input", "hr"}
RUN, SHIPPED = "this run's model", "shipped model"


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


class Reader(HTMLParser):
    """Checks that tags close in order; keeps attributes, images and text."""

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes out of order"

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def page() -> Page:
    logs = {
        name: [{"step": s, "tokens": s * 64, "loss/text": 3.0 - s / 9, "loss/image": 4.0 - s / 9} for s in range(1, 6)]
        for name in ("uniform", "cross")
    }
    return Page(
        rows=[
            Row("text parent", "text alone", 7_600_000, Losses(2.213, None)),
            Row("uniform", "the mean", 7_900_000, Losses(6.2, 6.5), Losses(6.3, 5.6), 2.1, 2.2),
            Row("cross", "two towers", 21_000_000, Losses(2.213, 4.12), Losses(2.16, 4.01), 0.0, -0.052, best=True),
        ],
        rule="lowest <sum>",
        budget="1,024 tokens each",
        curves_svg=loss_curves(logs, "svg").decode(),
        pictures=[Picture("a flat drawing of AT&T", "label", png("red"), {RUN: None, SHIPPED: png("blue")})],
        exchanges=[
            Exchange(
                "subject", ("What is <script>?", png("green")), {RUN: (), SHIPPED: ("This: ", png("navy"), "End.")}
            )
        ],
        models={RUN: "cross", SHIPPED: "the default"},
        splits={"label": "Held-out labels", "subject": "Unseen subjects"},
        times=[("merge", 2.5), ("train", 130.0)],
        facts=[("seed", "0")],
    )


@pytest.fixture(scope="module")
def read(page) -> tuple[str, Reader]:
    html, reader = render_page(page), Reader()
    reader.feed(html)
    assert reader.open == []
    return html, reader


def test_nothing_is_loaded_from_anywhere(read):
    html, reader = read
    loaded = [(tag, value) for tag, name, value in reader.attributes if name in ("src", "href", "xlink:href", "srcset")]
    assert len([tag for tag, _ in loaded if tag == "img"]) == 4
    outside = [item for item in loaded if not item[1].startswith(("data:image/png;base64,", "#"))]
    assert outside == []
    tags = {tag for tag, _, _ in reader.attributes} | set(re.findall(r"<(\w+)", html))
    assert not tags & {"script", "link", "iframe", "object"}
    assert "@import" not in html and not re.search(r"url\((?!#)", html)


def test_user_text_is_escaped(read):
    html, reader = read
    assert "What is &lt;script&gt;?" in html
    assert any("AT&T" in text for text in reader.texts)
    assert any("lowest <sum>" in text for text in reader.texts)


def test_the_table_says_honestly_who_improved(read):
    """uniform got worse by the rule's sum although one of its losses fell; cross got better."""
    html, _ = read
    verdicts = {}
    for row in html.split('<th scope="row">')[1:4]:
        name, cells = re.split(r"<small>| <span", row)[0], row.split("</tr>")[0]
        verdicts[name] = re.findall(r">(yes|no)</span></td>$", cells)
    assert verdicts == {"text parent": [], "uniform": ["no"], "cross": ["yes"]}
    assert html.count('<span class="badge">best</span>') == 1
    assert '<td class="bad">+1.6' in html and '<td class="good">&minus;13.8' in html


def test_missing_pictures_and_replies_are_shown_as_missing(read):
    html, _ = read
    assert html.count('<span class="none">no image</span>') == 1
    assert "(empty reply)" in html


def test_both_models_are_labelled_in_both_sections(read):
    html, _ = read
    assert html.count("<figcaption>this run&#x27;s model</figcaption>") == 1
    assert html.count("<figcaption>shipped model</figcaption>") == 1
    assert "<h4>this run&#x27;s model</h4>" in html and "<h4>shipped model</h4>" in html


def test_a_page_without_samples_or_curves_still_stands(page):
    reader = Reader()
    reader.feed(render_page(replace(page, pictures=[], exchanges=[], curves_svg="", rows=page.rows[:1])))
    assert reader.open == []
    assert not any(tag == "img" for tag, _, _ in reader.attributes)
