"""A tuned model as base + difference: near the tuned one, never over another base, whole or absent."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jam.checkpoint import WEIGHTS, read_header
from jam.difference import ROWS, SCALE, apply_difference, write_difference
from jam.errors import CheckpointError


def checkpoint(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    (folder / "image_tokenizer").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "image_tokenizer" / "config.json").write_text('{"side": 8}')
    save_file(tensors, folder / WEIGHTS)
    return folder


def pair(tmp: Path) -> tuple[Path, Path, dict[str, np.ndarray]]:
    generator = np.random.default_rng(0)
    base = {name: generator.standard_normal((40, 8), dtype=np.float32) for name in ("same", "changed")}
    base |= {"gate": np.zeros(1, np.float32), "scalar": np.array(1.5, np.float32)}
    tuned = dict(base)
    tuned["changed"] = base["changed"] + 0.01 * generator.standard_normal((40, 8), dtype=np.float32)
    tuned["changed"][7] = base["changed"][7]  # a row that did not move: its 8-bit scale is zero
    tuned["gate"], tuned["scalar"] = np.float32([0.25]), np.array(1.75, np.float32)
    return checkpoint(tmp / "base", base), checkpoint(tmp / "tuned", tuned), tuned


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 2**-8), ("int8", 1 / 127)])
def test_base_plus_difference_is_the_tuned_model(tmp_path: Path, precision: str, tolerance: float):
    base, tuned, expected = pair(tmp_path)
    figures = write_difference(base, tuned, tmp_path / "d.safetensors", precision)
    assert (figures["tensors"], figures["changed"]) == (4, 3) and 0 < figures["relative_error"] < tolerance
    stored = load_file(tmp_path / "d.safetensors") if precision == "int8" else {}
    assert precision != "int8" or stored.keys() == {n + s for n in ("changed", "gate", "scalar") for s in ("", SCALE)}
    out = apply_difference(base, tmp_path / "d.safetensors", tmp_path / "out")
    found = load_file(out / WEIGHTS)
    before = load_file(base / WEIGHTS)
    assert np.array_equal(found["same"], before["same"]) and np.array_equal(found["changed"][7], before["changed"][7])
    for name in expected:
        change = np.abs(expected[name] - before[name]).max()
        assert np.abs(found[name] - expected[name]).max() <= tolerance * change + 1e-7, name
    assert not np.array_equal(found["changed"], before["changed"])
    assert (out / "image_tokenizer" / "config.json").read_text() == '{"side": 8}' and (out / "config.json").is_file()


def test_refuses_another_base(tmp_path: Path):
    base, tuned, _ = pair(tmp_path)
    write_difference(base, tuned, tmp_path / "d.safetensors")
    with pytest.raises(CheckpointError, match="the very same base is required"):
        apply_difference(tuned, tmp_path / "d.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refuses_unequal_models(tmp_path: Path):
    base, _, tensors = pair(tmp_path)
    fewer = checkpoint(tmp_path / "fewer", {name: tensors[name] for name in ("same", "gate", "scalar")})
    other = checkpoint(tmp_path / "other", {**tensors, "same": tensors["same"][:, :4].copy()})
    for folder, message in ((fewer, "no tensor changed"), (other, r"tensor same is \[40, 4\]")):
        with pytest.raises(CheckpointError, match=message):
            write_difference(base, folder, tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()


def test_refuses_a_truncated_or_foreign_file(tmp_path: Path):
    base, tuned, _ = pair(tmp_path)
    file = tmp_path / "d.safetensors"
    write_difference(base, tuned, file)
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="truncated"):
        apply_difference(base, file, tmp_path / "out")
    with pytest.raises(CheckpointError, match="jam-difference-1 is required"):
        apply_difference(base, base / WEIGHTS, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such difference file"):
        apply_difference(base, tmp_path / "nowhere", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path):
    base, tuned, _ = pair(tmp_path)
    for name in ("one", "two"):
        write_difference(base, tuned, tmp_path / name, "int8")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_of_a_table_with_few_new_rows_those_are_stored(tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("jam.checkpoint.BLOCK", 64)
    monkeypatch.setattr("jam.checkpoint.row_blocks.__defaults__", (64,))  # eight rows a block
    table = np.random.default_rng(1).standard_normal((40, 8), dtype=np.float32)
    changed, rows = table.copy(), [0, 7, 8, 39]
    changed[rows] += 1
    base, tuned = (checkpoint(tmp_path / name, {"table": t}) for name, t in (("base", table), ("tuned", changed)))
    write_difference(base, tuned, tmp_path / "d.safetensors", precision)
    stored = {info.name: info.shape for info in read_header(tmp_path / "d.safetensors")}
    assert stored["table" + ROWS] == (4,) and stored["table"] == (4, 8)
    found = load_file(apply_difference(base, tmp_path / "d.safetensors", tmp_path / "out") / WEIGHTS)["table"]
    assert np.array_equal(found == table, changed == table) and np.abs(found - changed).max() < 0.01
