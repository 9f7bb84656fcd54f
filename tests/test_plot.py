"""Loss curves from logs as runs leave them."""

import io
import json

import pytest
from PIL import Image

from jam.plot import loss_curves, read_log

ROWS = [{"step": s, "tokens": s * 64, "loss/text": 3.0 / s, "loss/image": 4.0 / s} for s in (1, 2, 3)]


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return path


def test_a_step_logged_twice_counts_as_last_written(tmp_path):
    again = {**ROWS[1], "loss/text": 9.0}
    rows = read_log(write(tmp_path / "log.jsonl", [*ROWS, again]))
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[1]["loss/text"] == 9.0


def test_the_half_line_of_a_killed_run_is_dropped_and_no_other(tmp_path):
    assert read_log(write(tmp_path / "log.jsonl", ROWS, '{"step": 4, "lo')) == ROWS
    with pytest.raises(ValueError):
        read_log(write(tmp_path / "bad.jsonl", [], '{"step": 4, "lo\n{"step": 5}\n'))


def test_png_of_one_run(tmp_path):
    image = Image.open(io.BytesIO(loss_curves(write(tmp_path / "log.jsonl", ROWS))))
    assert image.format == "PNG"
    colours = image.convert("RGB").getcolors(1 << 20)
    assert len(colours) > 20  # not blank


def test_svg_takes_the_pages_colour_and_is_the_same_each_time():
    svg = loss_curves({"a": ROWS, "b": ROWS}, "svg")
    assert svg == loss_curves({"a": ROWS, "b": ROWS}, "svg")
    assert b"currentColor" in svg and b"#010203" not in svg
    assert b"text, nats per token" in svg


def test_a_run_without_images_has_no_curve_there():
    text_only = [{key: value for key, value in row.items() if key != "loss/image"} for row in ROWS]
    assert loss_curves({"a": text_only}, "svg") != loss_curves({"a": ROWS}, "svg")
