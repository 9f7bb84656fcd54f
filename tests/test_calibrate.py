"""``jam calibrate`` and what a width merge makes of it, on tiny parents."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

import merge.run
from jam.checkpoint import WEIGHTS
from jam.cli import main
from jam.digest import sha256_of
from jam.errors import MergeError
from jam.models.families import FAMILIES
from jam.models.heads import next_heads
from jam.models.load import load_bundle
from jam.shards import ShardWriter
from merge.plan import Plan
from merge.recipe import MergeRecipe
from merge.run import run_merge
from tests.tiny import edit_json, tiny_pair, tiny_parent

IDS = torch.tensor([[0, 20, 33, 5, 290, 291, 292, 293, 5, 40, 2]])


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Options of ``jam calibrate``: 12 texts and 6 captioned images."""
    random = np.random.default_rng(0)
    texts, captions = [], []
    for number in range(12):
        texts.append(json.dumps({"text": f"the cat number {number} and the other one in the rain"}))
    for number in range(6):
        Image.fromarray(random.integers(0, 255, (8, 8, 3), np.uint8)).save(tmp_path / f"{number}.png")
        captions.append(json.dumps({"image": f"{number}.png", "caption": f"a red cat {number}"}))
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    (tmp_path / "captions.jsonl").write_text("\n".join(captions))
    return ["--texts", str(tmp_path / "texts.jsonl"), "--captions", str(tmp_path / "captions.jsonl"), "--tokens", "400"]


def calibrate(text: Path, image: Path, out: Path, data: list[str]) -> dict:
    assert main(["calibrate", "--text", str(text), "--image", str(image), "--out", str(out), *data]) == 0
    return json.loads(out.read_text())


def test_a_file_that_is_there_is_kept_and_a_bad_place_is_refused_first(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("jam.calibrate.read_parent", lambda *unused: pytest.fail("read"))
    (tmp_path / "jam.json").write_text("mine")
    for out, message in (("jam.json", "exists already"), ("none/c.json", "no folder there"), (".", "exists already")):
        assert main(["calibrate", "--out", str(tmp_path / out)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "jam.json").read_text() == "mine"


def widen(text: Path, image: Path, out: Path, **width) -> dict[str, np.ndarray]:
    run_merge(MergeRecipe(method="width", text=text, image=image, out=out, dtype="float32", width=width))
    return load_file(out / WEIGHTS)


def louder(parent: Path, out: Path, times: float) -> Path:
    """The same function in a stream of states ``times`` as loud: whatever enters it is scaled, and norms undo that."""
    shutil.copytree(parent, out)
    tensors = load_file(out / WEIGHTS)
    for name in tensors:
        if any(part in name for part in ("embed_", "out_proj", "o_proj", "fc2", "down_proj")):
            tensors[name] *= np.float32(times)
    save_file(tensors, out / WEIGHTS)
    return out


def without_means(parent: Path) -> None:
    """States whose features sum to zero, so that layer norms of two halves differ in their length alone."""
    tensors = load_file(parent / WEIGHTS)
    for name, tensor in tensors.items():
        if "embed_" in name:
            tensor -= tensor.mean(1, keepdims=True)
        elif "out_proj.weight" in name or "fc2.weight" in name:
            tensor -= tensor.mean(0, keepdims=True)
        elif "out_proj.bias" in name or "fc2.bias" in name:
            tensor -= tensor.mean()
    save_file(tensors, parent / WEIGHTS)


CASES = {
    "RMS norms": {"family": "llama"},
    "norms around one": {"family": "gemma"},
    "layer norms without weights": {"family": "opt"},
    "layer norms with weights": {"family": "opt", "layer_norm_elementwise_affine": True, "enable_bias": True},
}


@pytest.mark.parametrize("settings", CASES.values(), ids=CASES.keys())
def test_halves_that_differ_in_loudness_alone_are_their_parents(tmp_path: Path, data: list[str], settings: dict):
    """Where the lengths of both halves have one ratio for all tokens, a factor is all that a shared norm lacks: the
    logits are the sum of the parents', here twice the parent's. Without the factors they are not."""
    text = tiny_parent(tmp_path / "text", True, 0, tie_word_embeddings=False, **settings)
    if settings["family"] == "opt":
        without_means(text)
    image = louder(text, tmp_path / "image", 4.0)
    file = calibrate(text, image, tmp_path / "c.json", data)
    halves = file["norms"][next(iter(file["norms"]))]
    assert halves["text"]["factor"] / halves["image"]["factor"] == pytest.approx(4.0, rel=1e-3)
    assert halves["text"]["error_after"] < 1e-2 < 0.5 < halves["text"]["error_before"]
    wanted = 2 * load_bundle(text, torch.float64).model(IDS).logits
    errors = {}
    for calibration in (None, tmp_path / "c.json"):
        out = tmp_path / f"out-{calibration is not None}"
        widen(text, image, out, off_diagonal="zero", calibration=calibration)
        found = load_bundle(out, torch.float64).model(IDS).logits
        errors[calibration is not None] = float((found - wanted).abs().max() / wanted.abs().max())
    assert errors[True] < 2e-3 and errors[False] > 0.05


@pytest.mark.parametrize("family", ["llama", "gemma2", "opt", "olmo2"])
@pytest.mark.parametrize("mode", ["copy", "average", "zero"])
def test_where_the_factors_go(tmp_path: Path, data: list[str], family: str, mode: str):
    text, image = tiny_pair(tmp_path, family=family)
    width = {"off_diagonal": mode, "qk_norm": "average"}
    plain = widen(text, image, tmp_path / "plain", **width)
    norms = calibrate(text, image, tmp_path / "c.json", data)["norms"]
    merged = widen(text, image, tmp_path / "out", calibration=tmp_path / "c.json", **width)
    assert norms.keys() == FAMILIES[family].norms(json.loads((text / "config.json").read_text())).keys()
    expected = dict(plain)
    if family == "opt":  # its norms have no weights: what reads them, and the head, take the factors
        expected["lm_head.weight"] = plain["model.decoder.embed_tokens.weight"]
    for norm, halves in norms.items():
        factors = np.float32([halves["text"]["factor"], halves["image"]["factor"]])
        assert (np.abs(factors - 1) > 1e-3).any()
        if f"{norm}.weight" in plain:
            one = family == "gemma2"
            half = len(plain[f"{norm}.weight"]) // 2
            expected[f"{norm}.weight"] = np.repeat(factors, half) * (one + plain[f"{norm}.weight"]) - one
            continue
        for name in FAMILIES[family].norms(json.loads((text / "config.json").read_text()))[norm]:
            expected[name] = expected[name] * np.repeat(factors, 32)
    assert merged.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(merged[name], tensor, rtol=1e-6, atol=1e-7, err_msg=name)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "captioned images" in report["settings"]["calibration"]["data"] and "c.json" in report["notes"][0]
    bundle = load_bundle(tmp_path / "out", torch.float64)
    assert bundle.logits(IDS, next_heads(IDS, bundle.vocabulary))[0].isfinite().all()
    assert bundle.model.config.tie_word_embeddings == (family == "llama" or family == "olmo2")


def test_parents_with_other_tokenizers_and_widths(tmp_path: Path, data: list[str]):
    sizes = {"image_hidden_size": 48, "image_num_attention_heads": 6, "image_ffn_dim": 96, "image_merges": 12}
    text, image = tiny_pair(tmp_path, **sizes)
    file = calibrate(text, image, tmp_path / "c.json", data)
    assert all(half["error_after"] < half["error_before"] for both in file["norms"].values() for half in both.values())
    merged = widen(text, image, tmp_path / "out", off_diagonal="zero", calibration=tmp_path / "c.json")
    assert merged["lm_head.weight"].shape == (309, 80)


def test_measuring_again_gives_the_same_file(tmp_path: Path, data: list[str]):
    text, image = tiny_pair(tmp_path)
    calibrate(text, image, tmp_path / "a.json", data)
    calibrate(text, image, tmp_path / "b.json", data)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "no calibration of format 1"),
        ({"format": True}, "no calibration of format 1"),
        ({"norms": []}, "no calibration of format 1"),
        ({"parents": []}, "no calibration of format 1"),
        ({"parents.text": "x"}, "no calibration of format 1"),
        ({"data": []}, "no calibration of format 1"),
        ({"data": None}, "no calibration of format 1"),
        ({"parents.image.identity": "0"}, "measured with 'image' as the image parent, whose configuration or tensors"),
        ({"parents": {}}, "no calibration of format 1"),
        ({"norms": {}}, "norm model.decoder.final_layer_norm has no factors"),
    ],
)
def test_a_file_that_is_not_of_these_parents_is_refused(tmp_path: Path, data: list[str], change: dict, message: str):
    text, image = tiny_pair(tmp_path)
    calibrate(text, image, tmp_path / "c.json", data)
    edit_json(tmp_path / "c.json", change)
    with pytest.raises(MergeError, match=message):
        widen(text, image, tmp_path / "out", calibration=tmp_path / "c.json")
    assert not (tmp_path / "out").exists()


def test_the_file_is_an_input_of_the_merge(tmp_path: Path, data: list[str], monkeypatch: pytest.MonkeyPatch, capsys):
    text, image = tiny_pair(tmp_path / "parents")
    file = tmp_path / "c.json"
    calibrate(text, image, file, data)
    arguments = ["--text", str(text), "--image", str(image), f"width.calibration={file}", "--hash"]
    assert main(["merge", "--method", "width", *arguments, "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["files"]["calibration"] == {"c.json": file.stat().st_size}
    digest = report["settings"]["calibration"]["sha256"]
    assert report["sha256"]["calibration"] == {"c.json": digest} == {"c.json": sha256_of(file)}
    plain = merge.run.stream

    def touched(plan: Plan, writer: ShardWriter) -> None:
        plain(plan, writer)
        stat = file.stat()
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1000))

    monkeypatch.setattr(merge.run, "stream", touched)
    assert main(["merge", "--method", "width", *arguments, "--out", str(tmp_path / "again")]) == 2
    assert "an input file changed while it was read" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("factor", [0.0, -1.0, "x", None, True, 10**400, 1e30, 1e-30])
def test_a_factor_that_is_none_is_refused(tmp_path: Path, data: list[str], factor: object):
    text, image = tiny_pair(tmp_path)
    raw = calibrate(text, image, tmp_path / "c.json", data)
    raw["norms"]["model.decoder.final_layer_norm"]["text"]["factor"] = factor
    (tmp_path / "c.json").write_text(json.dumps(raw))
    with pytest.raises(MergeError, match=r"norm model\.decoder\.final_layer_norm has"):
        widen(text, image, tmp_path / "out", calibration=tmp_path / "c.json")


def test_parents_that_no_width_merge_takes_are_refused_before_anything_is_read(tmp_path: Path, data: list[str], capsys):
    text, image = tiny_pair(tmp_path, image_family="llama")
    assert (
        main(["calibrate", "--text", str(text), "--image", str(image), "--out", str(tmp_path / "c.json"), *data]) == 2
    )
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith("error: calibration of a width merge: the parents are opt and llama")
    assert not (tmp_path / "c.json").exists()


def test_the_report_of_a_missing_file_is_one_line(tmp_path: Path, capsys):
    text, image = tiny_pair(tmp_path)
    arguments = ["--text", str(text), "--image", str(image), "--out", str(tmp_path / "out")]
    assert main(["merge", "--method", "width", *arguments, f"width.calibration={tmp_path}/c.json"]) == 2
    assert "c.json: no such file; a file of jam calibrate" in capsys.readouterr().err
