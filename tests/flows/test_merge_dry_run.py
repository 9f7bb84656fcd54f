"""``jam merge --dry-run``: every tensor's fate, what is doubtful, and what it costs, with nothing left behind."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

from jam.checkpoint import WEIGHTS, open_checkpoint
from jam.cli import main
from merge.recipe import MergeRecipe
from merge.report import input_fates
from merge.run import METHODS, make_plan
from tests.tiny import edit_json, tiny_pair

OPT_FC1, LLAMA_NORM = "model.decoder.layers.0.fc1.weight", "model.norm.weight"


def page(pair: tuple[Path, Path], out: Path, method: str, capsys: pytest.CaptureFixture[str], *more: str) -> list[str]:
    parents = ["--text", str(pair[0]), "--image", str(pair[1])]
    assert main(["merge", "--method", method, *parents, "--out", str(out), "--dry-run", *more]) == 0
    return capsys.readouterr().out.splitlines()


def line(lines: list[str], start: str) -> str:
    found = [one for one in lines if one.startswith(start)]
    assert len(found) == 1, (start, found)
    return found[0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_says_the_bytes_that_the_merge_writes(tmp_path: Path, method: str, dtype: str, capsys):
    pair = tiny_pair(tmp_path / "parents")
    lines = page(pair, tmp_path / "out", method, capsys, f"dtype={dtype}")
    assert [entry.name for entry in tmp_path.iterdir()] == ["parents"]
    said = int(re.search(r"([\d,]+) bytes of", lines[0])[1].replace(",", ""))
    assert main(["merge", "--method", method, "--text", str(pair[0]), "--image", str(pair[1]), "--out",
                 str(tmp_path / "out"), f"dtype={dtype}"]) == 0  # fmt: skip
    infos = open_checkpoint(tmp_path / "out").tensors.values()
    assert said == sum(info.end - info.begin for info in infos)
    assert re.fullmatch(r"memory: about \d+ MB", line(lines, "memory: "))
    assert re.match(r"time: about \d+\.\d s to read [\d,]+ bytes", line(lines, "time: "))


def test_a_disk_that_is_too_small_is_said(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    lines = page(tiny_pair(tmp_path), tmp_path / "out", "uniform", capsys)
    assert "too few" in line(lines, "disk: ") and line(lines, "time: ").endswith("the disk is too small")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["opt", "llama", "qwen3"])
def test_every_tensor_of_the_inputs_has_one_fate(tmp_path: Path, method: str, family: str, capsys):
    pair = tiny_pair(tmp_path, family=family, tie_word_embeddings=False)
    lines = page(pair, tmp_path / "out", method, capsys, *["width.qk_norm=average"] * (method == "width"))
    for side, folder in zip(("text", "image"), pair, strict=True):
        start = next(at for at, one in enumerate(lines) if one.startswith(f"from the {side} parent"))
        listed = []
        for one in lines[start + 1 :]:
            if not one.startswith("  "):
                break
            name, fate = one.strip().split(" ", 1)
            assert re.match(r"\[[\d, ]+\]: (to |left out: )", fate), one
            listed.append(name)
        assert listed == list(load_file_names(folder))


def load_file_names(folder: Path) -> list[str]:
    return sorted(load_file(folder / WEIGHTS))


def test_no_fate_is_a_guess(tmp_path: Path):
    """Each fate other than "to ..." has its own reason, and together they cover what no job reads."""
    text, image = tiny_pair(tmp_path, family="llama")
    tensors = load_file(text / WEIGHTS)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors[LLAMA_NORM][:4].copy()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, text / WEIGHTS)
    plan, pair = make_plan(MergeRecipe(method="cross", text=text, image=image, out=tmp_path / "out"))
    left = {name: fate for name, fate in input_fates(plan, pair.text).items() if not fate.startswith("to ")}
    assert left == {
        "lm_head.weight": "left out: the configuration ties the head to the table, and transformers ignores this copy",
        "model.layers.0.self_attn.rotary_emb.inv_freq": "left out: a buffer that transformers computes anew",
    }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", [0, 1])
def test_a_tensor_that_nobody_claims_is_an_error(tmp_path: Path, method: str, side: int, capsys):
    pair = tiny_pair(tmp_path)
    tensors = load_file(pair[side] / WEIGHTS)
    tensors["model.decoder.adapter.weight"] = tensors[OPT_FC1].copy()
    save_file(tensors, pair[side] / WEIGHTS)
    parents = ["--text", str(pair[0]), "--image", str(pair[1])]
    for more in (["--dry-run"], []):
        assert main(["merge", "--method", method, *parents, "--out", str(tmp_path / "out"), *more]) == 2
        assert "tensor model.decoder.adapter.weight [64, 32] is no part of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_lineage_is_read_off_the_weights(tmp_path: Path, capsys):
    apart = tiny_pair(tmp_path / "apart")
    for method in ("uniform", "width"):
        lines = page(apart, tmp_path / "out", method, capsys)
        assert "the parents were trained apart" in line(lines, "check: lineage")
    assert not [one for one in page(apart, tmp_path / "out", "cross", capsys) if one.startswith("check: lineage")]
    child = tiny_pair(tmp_path / "child")
    tensors, tuned = load_file(child[0] / WEIGHTS), load_file(child[1] / WEIGHTS)
    for name, tensor in tensors.items():
        if tensor.shape == tuned[name].shape:
            tuned[name] = tensor + 0.1 * tuned[name]
    save_file(tuned, child[1] / WEIGHTS)
    lines = page(child, tmp_path / "out", "uniform", capsys)
    assert "the parents share an ancestor" in line(lines, "check: lineage")
    assert not [one for one in lines if one.startswith("check: norms")]
    save_file({name: tensor * 4 for name, tensor in tensors.items()}, child[0] / WEIGHTS)
    assert "matrices are 4" in line(page(child, tmp_path / "out", "uniform", capsys), "check: norms")


def test_the_report_has_what_the_page_checks(tmp_path: Path, capsys):
    pair = tiny_pair(tmp_path, image_max_position_embeddings=128, family="llama")
    tensors = {name: torch.from_numpy(tensor).half().numpy() for name, tensor in load_file(pair[0] / WEIGHTS).items()}
    save_file(tensors, pair[0] / WEIGHTS)
    lines = page(pair, tmp_path / "out", "uniform", capsys)
    assert "check: positions are 256 and 128: the result has 128" in lines
    assert "stored as F16 and F32" in line(lines, "check: stored")
    assert "hidden_act, rms_norm_eps, rope" in line(lines, "check: equal in both parents")
    main(
        ["merge", "--method", "uniform", "--text", str(pair[0]), "--image", str(pair[1]), "--out", str(tmp_path / "o")]
    )
    report = json.loads((tmp_path / "o/report.json").read_text())
    assert report["checks"] == [one.removeprefix("check: ") for one in lines if one.startswith("check: ")]
    assert {"jam", "python", "numpy"} <= report.keys()
    assert report["files"]["output"][WEIGHTS] == (tmp_path / "o" / WEIGHTS).stat().st_size


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 1e-3), ("rope_parameters", {"rope_theta": 5e5})])
@pytest.mark.parametrize("method", ["uniform", "width"])
def test_unequal_norms_and_rotary_settings_are_refused_or_said(
    tmp_path: Path, key: str, value: object, method: str, capsys
):
    pair = tiny_pair(tmp_path, family="llama")
    edit_json(pair[0] / "config.json", {key: value})
    name = {"rope_parameters": "rope"}.get(key, key)
    parents = ["--text", str(pair[0]), "--image", str(pair[1]), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(["merge", "--method", method, *parents]) == 2
    assert f"{name} is" in capsys.readouterr().err
    assert line(page(pair, tmp_path / "out", "cross", capsys), f"check: {name} is").endswith("each tower keeps its own")
