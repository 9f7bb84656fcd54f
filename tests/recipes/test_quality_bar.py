"""The quality bar's arithmetic, without its feature network."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finetune.data import mini_data

SCRIPT = Path(__file__).parents[2] / "recipes" / "mini" / "quality_bar.py"


@pytest.fixture(scope="module")
def bar():
    spec = importlib.util.spec_from_file_location("quality_bar", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rows_are_of_different_labels_fixed_by_the_seed(bar):
    for kind in bar.KINDS:
        rows = bar.choose(kind, 150, 0)
        assert len({row["label"] for row in rows}) == len(rows) == 150
        assert {row["split"] for row in rows} == {kind}
        assert rows == bar.choose(kind, 150, 0) != bar.choose(kind, 150, 1)


def test_a_hit_needs_the_label_among_the_five_nearest(bar):
    """Real features are points on a circle: the five nearest of row i are i - 2 to i + 2."""
    rows = mini_data.image_rows()
    angles = np.linspace(0, np.pi / 2, len(rows))
    real = np.stack([np.cos(angles), np.sin(angles)], 1)
    hits = bar.hit_maker(real)
    at = 1000
    near = {rows[i]["label"] for i in range(at - 2, at + 3)}
    far = next(row for row in rows if row["label"] not in near)
    asked = [rows[at], rows[at - 2], rows[at + 2], far]
    assert hits(np.repeat(real[at : at + 1], 4, 0), asked).tolist() == [True, True, True, False]
    assert rows[at + 3]["label"] not in near  # or the next line would prove nothing
    assert hits(real[at : at + 1], [rows[at + 3]]).tolist() == [False]


def test_the_sheet_has_a_place_for_every_pair(bar):
    rows = bar.choose("label", 7, 0)
    pairs = [(Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue"))] * 7
    sheet = bar.contact_sheet(pairs, rows, np.array([True] * 7))
    counts = {colour: count for count, colour in sheet.getcolors(1 << 20)}
    assert counts[(255, 0, 0)] == counts[(0, 0, 255)] == 7 * 96 * 96
