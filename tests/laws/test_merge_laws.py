"""Laws of merging: what each method promises about weights, rows and bytes, through ``run_merge`` on tiny parents."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import jam.checkpoint
import merge.stream
from jam.checkpoint import WEIGHTS
from jam.errors import MergeError
from jam.models.families import FAMILIES
from jam.models.heads import next_heads
from jam.models.load import load_bundle
from jam.models.tower import network_class
from jam.tokens.render import IMAGE_HEAD
from jam.tokens.vocabulary import CONTROL, IMAGE, TEXT, JamFile
from merge.recipe import MergeRecipe
from merge.run import METHODS, run_merge
from tests import step_zero
from tests.tiny import CODES_PER_IMAGE, tiny_pair, tiny_parent

ROOT = Path(__file__).parents[2]
TEXT_IDS, CODE = slice(8, 288), 288
MERGED = list(FAMILIES)


def fuse(text: Path, image: Path, out: Path, method: str, dtype: str = "float32", **sections: dict) -> Path:
    run_merge(MergeRecipe(method=method, text=text, image=image, out=out, dtype=dtype, **sections))
    return out


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / WEIGHTS)


def same_bits(first: np.ndarray, second: np.ndarray) -> bool:
    return first.shape == second.shape and first.tobytes() == second.tobytes()


@pytest.mark.parametrize("family", MERGED)
def test_uniform_of_a_model_with_itself_is_that_model(tmp_path: Path, family: str):
    parent = tiny_parent(tmp_path / "a", True, 3, family)
    before = weights(parent)
    for weight in (0.5, 0.3, 0.0, 1.0):
        out = fuse(parent, parent, tmp_path / f"out{weight}", "uniform", uniform={"weight": weight})
        after = weights(out)
        assert before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
        assert JamFile.read(out).vocabulary == JamFile.read(parent).vocabulary


@pytest.mark.parametrize("family", MERGED)
def test_uniform_at_one_is_the_text_parent_wherever_it_owns(tmp_path: Path, family: str):
    text, image = tiny_pair(tmp_path, family=family)
    ours, theirs = weights(text), weights(image)
    for share, parent, owned in ((1.0, ours, [0, 1, 2, *range(8, 288)]), (0.0, theirs, list(range(304)))):
        merged = weights(fuse(text, image, tmp_path / f"out{share}", "uniform", uniform={"weight": share}))
        for name, tensor in parent.items():
            rows = owned if tensor.shape[0] in (288, 304) else slice(None)
            assert same_bits(merged[name][rows], tensor[rows]), name


def test_uniform_rows_are_averaged_when_both_own_them_and_copied_when_one_does(tmp_path: Path):
    text, image = tiny_pair(tmp_path)
    name = FAMILIES["opt"].embed
    ours, theirs = weights(text)[name], weights(image)[name]
    merged = weights(fuse(text, image, tmp_path / "out", "uniform"))[name]
    shared = [0, 1, 2, *range(8, 288)]
    assert same_bits(merged[shared], np.float32(0.5) * ours[shared] + np.float32(0.5) * theirs[shared])
    image_only = [*range(3, 8), *range(288, 304)]
    assert same_bits(merged[image_only], theirs[image_only]) and not same_bits(ours[3:8], theirs[3:8])


def blocks(merged: np.ndarray, text: np.ndarray, image: np.ndarray) -> list[np.ndarray]:
    """The four blocks of a widened matrix: text, upper right, lower left, image."""
    row, column = text.shape
    return [merged[:row, :column], merged[:row, column:], merged[row:, :column], merged[row:, column:]]


FUSED = {"qkv_proj": [32, 16, 16], "gate_up_proj": [64, 64]}  # rows of one tiny parent, part by part


def text_first(merged: np.ndarray, name: str) -> np.ndarray:
    """A fused projection's rows from text, image, text, image, ... to all of text, then all of image."""
    for fused, lengths in FUSED.items():
        if fused in name:
            parts = np.split(merged, np.cumsum([length for length in lengths for _ in (0, 1)])[:-1])
            return np.concatenate([*parts[::2], *parts[1::2]])
    return merged


@pytest.mark.parametrize("family", MERGED)
@pytest.mark.parametrize("mode", ["copy", "average", "zero"])
def test_width_blocks(tmp_path: Path, family: str, mode: str):
    text, image = tiny_pair(tmp_path, family=family)
    shared = family in ("qwen3", "gemma3_text", "olmo2")  # norms that all heads share
    settings = {"off_diagonal": mode} | ({"qk_norm": "average"} if shared else {})
    out = fuse(text, image, tmp_path / "out", "width", width=settings)
    ours, theirs, merged = weights(text), weights(image), weights(out)
    mean = {name: np.float32(0.5) * ours[name] + np.float32(0.5) * theirs[name] for name in ours if "embed" not in name}
    checked = 0
    for name, tensor in ours.items():
        if tensor.shape == (16,) and family in ("qwen3", "gemma3_text"):
            assert same_bits(merged[name], mean[name]), name
        elif tensor.ndim == 1 or "_norm." in name:
            assert same_bits(merged[name], np.concatenate([tensor, theirs[name]])), name
        elif "embed" not in name and "lm_head" not in name:
            found = blocks(text_first(merged[name], name), tensor, theirs[name])
            zero = np.zeros_like(tensor)
            beside = {"copy": (tensor, theirs[name]), "average": (mean[name],) * 2, "zero": (zero, zero)}[mode]
            expected = [tensor, beside[0], beside[1], theirs[name]]
            assert all(same_bits(*pair) for pair in zip(found, expected, strict=True)), name
            checked += 1
    assert checked >= 16
    name = FAMILIES[family].embed
    table = merged["lm_head.weight"] if FAMILIES[family].scaled_embeddings else merged[name]
    shared_ids, image_only = [0, 1, 2, *range(8, 288)], [*range(3, 8), *range(288, 304)]
    assert same_bits(table[shared_ids, :32], ours[name][shared_ids])
    assert same_bits(table[:, 32:], theirs[name]) and not table[image_only, :32].any()


@pytest.mark.parametrize(
    ("family", "image_tied"),
    [*((family, True) for family in MERGED), ("opt", False), ("llama", False), ("gemma", False)],
)
@pytest.mark.parametrize("method", ["uniform", "width"])
def test_single_table_results_load_strictly_without_jam(tmp_path: Path, family: str, method: str, image_tied: bool):
    text, image = tiny_pair(
        tmp_path, family=family, text_tie_word_embeddings=True, image_tie_word_embeddings=image_tied
    )
    sections = {"width": {"qk_norm": "average"}} if method == "width" else {}
    out = fuse(text, image, tmp_path / "out", method, dtype="bfloat16", **sections)
    loader = network_class(family)
    model, loading = loader.from_pretrained(out, output_loading_info=True)
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert model.dtype == torch.bfloat16 and model.config.vocab_size == 304
    rescaled = method == "width" and FAMILIES[family].scaled_embeddings
    tied = image_tied and not rescaled
    assert model.config.tie_word_embeddings == tied == ("lm_head.weight" not in weights_names(out))
    assert model(torch.tensor([[0, 20, 300]])).logits.isfinite().all()


def weights_names(folder: Path) -> set[str]:
    return set(jam.checkpoint.open_checkpoint(folder).tensors)


@pytest.mark.parametrize("family", ["opt", "llama", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_own_head_scores_text_by_one_half_and_codes_by_the_other(tmp_path: Path, family: str, tied: bool):
    text, image = tiny_pair(tmp_path, family=family, text_tie_word_embeddings=tied, image_tie_word_embeddings=tied)
    out = fuse(text, image, tmp_path / "out", "width", width={"head": "own"})
    plain = fuse(text, image, tmp_path / "plain", "width")
    kinds = JamFile.read(out).vocabulary.kinds()
    head, table = weights(out)["lm_head.weight"], weights(out)[FAMILIES[family].embed]
    own = [weights(side).get("lm_head.weight", weights(side)[FAMILIES[family].embed]) for side in (text, image)]
    shared = np.flatnonzero(kinds == TEXT)  # both parents know these ids, under the same numbers
    assert same_bits(head[shared, :32], own[0][shared]) and not head[shared, 32:].any()
    codes = np.flatnonzero(kinds == IMAGE)
    assert same_bits(head[codes, 32:], own[1][codes]) and not head[codes, :32].any()
    controls = np.flatnonzero(kinds == CONTROL)
    assert same_bits(head[controls, 32:], own[1][controls]) and head[controls[:2], :32].any()
    assert same_bits(table, weights(plain)[FAMILIES[family].embed])
    rows = json.loads((out / "report.json").read_text())["rows"]
    assert rows["head"]["counts"]["half: text"] == len(shared) and "half: text" not in rows["input"]["counts"]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_width_of_heads_that_only_one_parent_states(tmp_path: Path, family: str):
    """transformers derives a head's width from the model's where the configuration is silent."""
    given = {"text_hidden_size": 24, "text_num_attention_heads": 4, "text_head_dim": 8, "image_hidden_size": 32}
    given |= {"image_num_attention_heads": 4, "image_head_dim": 8, "num_key_value_heads": 2}
    text, image = tiny_pair(tmp_path, family=family, **given)
    config = json.loads((image / "config.json").read_text())
    if family == "llama":  # Qwen3's own default is another
        del config["head_dim"]
    (image / "config.json").write_text(json.dumps(config))
    out = fuse(text, image, tmp_path / "out", "width", width={"off_diagonal": "zero", "qk_norm": "average"})
    model, loading = network_class(family).from_pretrained(out, output_loading_info=True)
    assert not loading["mismatched_keys"] and not loading["missing_keys"]
    assert model.config.head_dim == 8 and model(torch.tensor([[0, 20, 300]])).logits.isfinite().all()


@pytest.mark.parametrize("family", [family for family in MERGED if family != "gemma2"])  # it caps its logits
def test_width_with_zero_blocks_of_a_model_with_itself_doubles_its_logits(tmp_path: Path, family: str):
    """Equal halves have equal statistics, so that even the norm over both leaves each half its parent."""
    parent = tiny_parent(tmp_path / "a", True, 1, family)
    out = fuse(parent, parent, tmp_path / "out", "width", width={"off_diagonal": "zero"})
    ids = torch.tensor([[0, 20, 33, 5, 290, 291, 292, 293, 5, 40, 2]])
    loader = network_class(family)
    single, double = (loader.from_pretrained(f, dtype=torch.float64)(ids).logits for f in (parent, out))
    assert single.std() > 0.1
    # Olmo's norms work in float32, and Gemma's new scale is rounded to it
    bound = 1e-4 if family in ("gemma", "gemma3_text", "olmo2") else 1e-9
    torch.testing.assert_close(double, 2 * single, rtol=bound, atol=bound)
    own = fuse(parent, parent, tmp_path / "own", "width", width={"off_diagonal": "zero", "head": "own"})
    apart = loader.from_pretrained(own, dtype=torch.float64)(ids).logits
    controls = JamFile.read(parent).vocabulary.kinds() == CONTROL
    assert 0 < controls.sum() < len(controls)
    times = torch.from_numpy(np.where(controls, 2.0, 1.0))  # both halves score a control
    torch.testing.assert_close(apart, times * single, rtol=bound, atol=bound)


def test_norms_that_all_heads_share_must_agree(tmp_path: Path):
    text, image = tiny_pair(tmp_path, family="qwen3")
    with pytest.raises(MergeError, match=r"q_norm\.weight serves all heads at once and differs.*qk_norm=average"):
        fuse(text, image, tmp_path / "out", "width")


PAIRS = [{}, {"image_hidden_size": 48, "image_num_hidden_layers": 6}, {"text_family": "llama"}]


@pytest.mark.parametrize("changes", PAIRS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
def test_cross_as_merged_is_its_parents(tmp_path: Path, changes: dict, tied: bool):
    """Parts (a), (b) and (c) of the theorem of two towers with zero gates, on folders that the merge wrote."""
    text, image = tiny_pair(tmp_path, tie_word_embeddings=tied, **changes)
    out = fuse(text, image, tmp_path / "out", "cross")
    merged, ours, theirs = weights(out), weights(text), weights(image)
    table = {side: FAMILIES[json.loads((f / "config.json").read_text())["model_type"]].embed for side, f in
             (("text", text), ("image", image))}  # fmt: skip
    for side, parent in (("text", ours), ("image", theirs)):
        for name, tensor in parent.items():
            if name not in (table[side], "lm_head.weight"):
                assert same_bits(merged[f"{side}.{name}"], tensor), name
    fused, llm, painter = (load_bundle(folder, torch.float64) for folder in (out, text, image))
    ids = torch.tensor([[0, 20, 33, 40, 2, 11]])
    owned = [0, 1, 2, *range(8, 288)]
    found = fused.logits(ids, next_heads(ids, fused.vocabulary))[0][..., owned].log_softmax(-1)
    expected = llm.logits(ids, next_heads(ids, llm.vocabulary))[0][..., owned].log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    ids = torch.tensor([[0, 20, 33, 5, 290, 291, 292, 293, 5, 5, 303, 288, 289, 290, 5, 2]])
    heads = next_heads(ids, fused.vocabulary)
    found, expected = (bundle.logits(ids, heads)[0][heads == IMAGE_HEAD].log_softmax(-1) for bundle in (fused, painter))
    assert len(found) == 10
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("text", "image"), list(zip(step_zero.TEXT, 2 * step_zero.IMAGE, strict=False)))
def test_cross_of_any_two_families_is_its_parents(tmp_path: Path, text: str, image: str):
    """Unequal widths, depths, heads and tokenizers; all pairs of families by ``python -m tests.step_zero``."""
    fused, llm, painter = step_zero.fuse(tmp_path, **step_zero.unequal(text, image))
    assert (tmp_path / "fused/tokenizer.json").read_bytes() == (tmp_path / "text/tokenizer.json").read_bytes()
    found = step_zero.distances(fused, llm, painter)
    assert max(found.text, found.codes, found.caption) < 1e-9 and found.spread > 0.1
    assert step_zero.draws(fused) == CODES_PER_IMAGE
    assert step_zero.answers(fused)[1] == CODES_PER_IMAGE


@pytest.mark.parametrize("family", ["mistral", "qwen2", "gemma2", "gemma3_text"])
def test_models_with_sliding_windows_answer_as_without_a_cache(tmp_path: Path, family: str):
    """Windows shorter than the prompt, and guidance rows, whose slots have a gap."""
    text, image = tiny_pair(tmp_path, family=family)
    fused = load_bundle(fuse(text, image, tmp_path / "out", "uniform"), torch.float64)
    assert step_zero.answers(fused)[1] == CODES_PER_IMAGE


@pytest.mark.parametrize("method", METHODS)
def test_every_row_has_one_recorded_source(tmp_path: Path, method: str):
    text, image = tiny_pair(tmp_path, tie_word_embeddings=False)
    out = fuse(text, image, tmp_path / "out", method)
    report = json.loads((out / "report.json").read_text())
    assert report["rows"] and report["tensors"].keys() == weights(out).keys()
    for side, folder in (("text", text), ("image", image)):
        fates, word = report["inputs"][side], "left out: " if (method, side) == ("extend", "image") else "to "
        assert fates.keys() == weights(folder).keys() and all(fate.startswith(word) for fate in fates.values())
    for table in report["rows"].values():
        ids = [index for start, stop, _ in table["ranges"] for index in range(start, stop)]
        assert ids == list(range(304)) and sum(table["counts"].values()) == 304


@pytest.mark.parametrize("method", METHODS)
def test_the_union_of_a_vocabulary_with_itself_is_itself(tmp_path: Path, method: str):
    parent = tiny_parent(tmp_path / "a", True, 3)
    out = fuse(parent, parent, tmp_path / "out", method)
    assert JamFile.read(out).vocabulary == JamFile.read(parent).vocabulary
    for table in json.loads((out / "report.json").read_text())["rows"].values():
        assert len(table["counts"]) == 1 and not any(word in str(table) for word in ("foreign", "half:"))


def digests(folder: Path) -> dict[str, str]:
    """Every file but the recipe, which names the output folder."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != "merge.yaml"]
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


CHOICES = [("uniform", []), ("width", []), ("cross", []), ("cross", ["cross.tables=shared"])]


@pytest.mark.parametrize(("method", "more"), CHOICES, ids=lambda value: str(value))
def test_same_inputs_give_the_same_bytes_streamed_or_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, more: list[str]
):
    """Whatever the hash seed of the process and the size of the blocks that a tensor is streamed in."""
    text, image = tiny_pair(tmp_path)
    sections = {"cross": {"tables": "shared"}} if more else {}
    found = [digests(fuse(text, image, tmp_path / "whole", method, dtype="bfloat16", **sections))]
    monkeypatch.setattr(merge.stream, "BLOCK", 100)
    found.append(digests(fuse(text, image, tmp_path / "streamed", method, dtype="bfloat16", **sections)))
    out = tmp_path / "process"
    parents = ["--text", str(text), "--image", str(image), "--out", str(out)]
    command = [sys.executable, "-m", "jam.cli", "merge", "--method", method, *parents, *more]
    subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONHASHSEED": "1"})
    found.append(digests(out))
    assert len(found[0]) > 8 and all(other == found[0] for other in found)


def test_seed_changes_new_weights_only(tmp_path: Path):
    text, image = tiny_pair(tmp_path)
    run_merge(MergeRecipe(method="cross", text=text, image=image, out=tmp_path / "a", dtype="float32"))
    run_merge(MergeRecipe(method="cross", text=text, image=image, out=tmp_path / "b", dtype="float32", seed=1))
    first, second = weights(tmp_path / "a"), weights(tmp_path / "b")
    moved = {name for name in first if not same_bits(first[name], second[name])}
    assert moved == {name for name in first if name.startswith("cross.") and "norm" not in name and "gate" not in name}
    gates = [tensor for name, tensor in first.items() if name.endswith("gate")]
    assert len(gates) == 4 and not np.concatenate(gates).any()


def test_hashes_are_those_of_the_files(tmp_path: Path):
    text, image = tiny_pair(tmp_path)
    out = tmp_path / "out"
    run_merge(MergeRecipe(method="cross", text=text, image=image, out=out, hash=True, shard_bytes=50_000))
    report = json.loads((out / "report.json").read_text())
    assert len(list(out.glob("model-*.safetensors"))) > 3
    for side, folder in (("text", text), ("image", image), ("output", out)):
        hashes = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in report["sha256"][side]}
        assert report["sha256"][side] == hashes and hashes.keys() == report["files"][side].keys()
        names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        # the report cannot hold its own hash; the recipe names the output folder
        assert names - hashes.keys() <= {"report.json", "merge.yaml", "generation_config.json"}
        assert side != "output" or names - hashes.keys() == {"report.json", "merge.yaml"}
    run_merge(MergeRecipe(method="cross", text=text, image=image, out=tmp_path / "plain"))
    assert "sha256" not in json.loads((tmp_path / "plain/report.json").read_text())


@pytest.mark.parametrize("method", METHODS)
def test_the_hash_seed_of_the_process_changes_no_byte(tmp_path: Path, method: str):
    text, image = tiny_pair(tmp_path, image_merges=12)
    found = []
    for seed in ("0", "4242"):
        out = tmp_path / seed / "out"
        command = [sys.executable, "-m", "jam.cli", "merge", "--method", method, "--hash", "--text", str(text)]
        command += ["--image", str(image), "--out", str(out)]
        subprocess.run(command, check=True, cwd=ROOT, env={"PYTHONHASHSEED": seed})
        found.append(digests(out))
    assert len(found[0]) > 8 and found[0] == found[1]
