"""Rules for related parents: laws, each rule against whole tensors in numpy, refusals."""

import hashlib
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load_file, save_file

import jam.checkpoint
import merge.stream
from jam.checkpoint import WEIGHTS
from jam.errors import MergeError
from merge.recipe import MergeRecipe, UniformSection
from merge.rules import drawn, kth_greatest
from merge.run import run_merge
from tests.tiny import edit_json, tiny_pair, tiny_parent

RULES = {
    "slerp": {},
    "task_arithmetic": {"scale": 1.5},
    "ties": {"density": 0.4, "scale": 0.75},
    "dare": {"density": 0.3},
}
SHARED = [0, 1, 2, *range(8, 288)]  # ids that text parent, image parent and base own
WEIGHT, SEED = 0.3, 7

Tensors = dict[str, np.ndarray]


@pytest.fixture
def family(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Text parent, image parent, base; heads of their own."""
    pair = tiny_pair(tmp_path, family="llama", tie_word_embeddings=False)
    return *pair, tiny_parent(tmp_path / "base", False, 9, "llama", tie_word_embeddings=False)


def fuse(folders: tuple[Path, Path, Path], out: Path, rule: str, **settings) -> Tensors:
    text, image, base = folders
    uniform = {"rule": rule, "weight": WEIGHT, **({} if rule == "slerp" else {"base": base}), **settings}
    run_merge(
        MergeRecipe(method="uniform", text=text, image=image, out=out, dtype="float32", seed=SEED, uniform=uniform)
    )
    return load_file(out / WEIGHTS)


def slerp(a: np.ndarray, b: np.ndarray, base: np.ndarray, **_) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
    if abs(cosine) > 0.9995:
        return WEIGHT * a + (1 - WEIGHT) * b
    angle = np.arccos(cosine)
    return (np.sin(WEIGHT * angle) * a + np.sin((1 - WEIGHT) * angle) * b) / np.sin(angle)


def task_arithmetic(a: np.ndarray, b: np.ndarray, base: np.ndarray, scale: float = 1.0, **_) -> np.ndarray:
    base = base.astype(np.float64)
    return base + scale * (WEIGHT * (a - base) + (1 - WEIGHT) * (b - base))


def ties(a: np.ndarray, b: np.ndarray, base: np.ndarray, density: float, scale: float = 1.0, **_) -> np.ndarray:
    base = base.astype(np.float64)
    vectors = [a - base, b - base]
    for vector in vectors:
        keep = int(density * vector.size)
        vector[np.abs(vector) < np.sort(np.abs(vector).ravel())[-keep]] = 0.0
    result = np.zeros(base.shape)
    for at in np.ndindex(base.shape):
        pair = [(WEIGHT, vectors[0][at]), (1 - WEIGHT, vectors[1][at])]
        sign = 1.0 if sum(weight * value for weight, value in pair) >= 0 else -1.0
        same = [(weight, value) for weight, value in pair if value * sign > 0]
        if same:
            result[at] = sum(weight * value for weight, value in same) / sum(weight for weight, _ in same)
    return base + scale * result


def dare(
    a: np.ndarray,
    b: np.ndarray,
    base: np.ndarray,
    density: float,
    name: str,
    place: np.ndarray,
    scale: float = 1.0,
    **_,
) -> np.ndarray:
    """``place``: the place of each number in the result's tensor."""
    base = base.astype(np.float64)
    kept = []
    for side, vector in (("text", a - base), ("image", b - base)):
        key = np.frombuffer(hashlib.sha256(f"{SEED}:dare:{side}:{name}".encode()).digest()[:16], "<u8")
        halves = np.random.Philox(key=key).random_raw(int(place.max()) // 2 + 1).astype("<u8").view("<u4")
        kept.append(vector * (halves[place] < density * 2**32) / density)
    return base + scale * (WEIGHT * kept[0] + (1 - WEIGHT) * kept[1])


ORACLES = {"slerp": slerp, "task_arithmetic": task_arithmetic, "ties": ties, "dare": dare}


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_is_what_numpy_makes_of_whole_tensors(tmp_path: Path, family: tuple[Path, Path, Path], rule: str):
    merged = fuse(family, tmp_path / "out", rule, **RULES[rule])
    ours, theirs, base = (load_file(folder / WEIGHTS) for folder in family)
    assert merged.keys() == ours.keys()
    for name, found in merged.items():
        rows = SHARED if len(found) == 304 else slice(None)
        operands = [tensors[name][rows] for tensors in (ours, theirs, base)]
        place = np.arange(found.size).reshape(found.shape)[rows]
        wanted = ORACLES[rule](*operands, name=name, place=place, **RULES[rule])
        np.testing.assert_allclose(found[rows], wanted, rtol=1e-6, atol=1e-7, err_msg=name)
        assert np.abs(found[rows] - (WEIGHT * operands[0] + (1 - WEIGHT) * operands[1])).max() > 1e-3, name
        if len(found) == 304:  # rows that only the image parent owns
            assert np.array_equal(found[3:8], theirs[name][3:8])
            assert np.array_equal(found[288:], theirs[name][288:])


@pytest.mark.parametrize("rule", RULES)
def test_blocks_change_no_bit(
    tmp_path: Path, family: tuple[Path, Path, Path], rule: str, monkeypatch: pytest.MonkeyPatch
):
    whole = fuse(family, tmp_path / "whole", rule, **RULES[rule])
    monkeypatch.setattr(merge.stream, "BLOCK", 100)
    streamed = fuse(family, tmp_path / "streamed", rule, **RULES[rule])
    assert all(whole[name].tobytes() == streamed[name].tobytes() for name in whole)


@pytest.mark.parametrize("rule", RULES)
def test_equal_parents_give_themselves(tmp_path: Path, family: tuple[Path, Path, Path], rule: str):
    parent = family[1]
    settings = {"density": 1.0} if "density" in RULES[rule] else {}
    merged = fuse((parent, parent, family[2]), tmp_path / "out", rule, **settings)
    wanted = load_file(parent / WEIGHTS)
    assert all(merged[name].tobytes() == wanted[name].tobytes() for name in wanted)


@pytest.mark.parametrize("rule", ["slerp", "task_arithmetic"])
def test_the_ends_are_the_parents(tmp_path: Path, family: tuple[Path, Path, Path], rule: str):
    for weight, parent in ((1.0, family[0]), (0.0, family[1])):
        merged = fuse(family, tmp_path / str(weight), rule, weight=weight)
        for name, tensor in load_file(parent / WEIGHTS).items():
            rows = SHARED if tensor.shape[0] in (288, 304) else slice(None)
            assert merged[name][rows].tobytes() == tensor[rows].tobytes(), name


def test_nothing_dropped_is_task_arithmetic(tmp_path: Path, family: tuple[Path, Path, Path]):
    """ties too, where the parents went the same way from the base: there is no sign to elect."""
    base = load_file(family[2] / WEIGHTS)
    for folder, step in zip(family[:2], (0.25, 0.5), strict=True):
        tensors = load_file(folder / WEIGHTS)
        for name, tensor in tensors.items():
            rows = SHARED if tensor.shape[0] in (288, 304) else slice(None)
            tensor[rows] = base[name][rows] + step * np.sign(tensor[rows])
        save_file(tensors, folder / WEIGHTS)
    ours, theirs = (load_file(folder / WEIGHTS) for folder in family[:2])
    wanted = fuse(family, tmp_path / "sum", "task_arithmetic")
    dropped = fuse(family, tmp_path / "dare", "dare", density=1.0)
    elected = fuse(family, tmp_path / "ties", "ties", density=1.0)
    compared = 0
    for name, tensor in wanted.items():
        assert tensor.tobytes() == dropped[name].tobytes()
        same = np.zeros(tensor.shape, bool)
        rows = SHARED if len(tensor) == 304 else slice(None)
        same[rows] = (ours[name][rows] > base[name][rows]) == (theirs[name][rows] > base[name][rows])
        compared += int(same.sum())
        np.testing.assert_allclose(elected[name][same], tensor[same], rtol=1e-6, atol=1e-7)
        opposed = ~same[rows]
        wanted_there = theirs[name][rows][opposed]  # the image parent's share is the greater one
        np.testing.assert_allclose(elected[name][rows][opposed], wanted_there, rtol=1e-6, atol=1e-7)
    assert compared > 10_000


def test_parallel_and_empty_tensors_take_the_mean(tmp_path: Path, family: tuple[Path, Path, Path]):
    tensors = {folder: load_file(folder / WEIGHTS) for folder in family[:2]}
    ours, theirs = tensors.values()
    scaled, empty = "model.norm.weight", "model.layers.0.input_layernorm.weight"
    theirs[scaled], ours[empty] = 2 * ours[scaled], np.zeros_like(ours[empty])
    for folder, changed in tensors.items():
        save_file(changed, folder / WEIGHTS)
    merged = fuse(family, tmp_path / "out", "slerp")
    np.testing.assert_allclose(merged[scaled], (2 - WEIGHT) * ours[scaled], rtol=1e-6)
    np.testing.assert_allclose(merged[empty], (1 - WEIGHT) * theirs[empty], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_the_kth_greatest_is_exact_whatever_the_blocks(seed: int):
    random = np.random.default_rng(seed)
    for values in (
        np.abs(random.standard_normal(5_001)).astype(np.float32),
        random.integers(0, 4, 1_000).astype(np.float32),  # many equal
        np.float32(2.0) ** random.integers(-149, 127, 500).astype(np.float32),  # subnormal to huge
        np.float32([0.0, 0.0, 1.0]),
    ):
        ordered = np.sort(values)[::-1]
        for k, size in itertools.product((1, 2, len(values) // 2, len(values)), (7, 10_000)):
            if k:
                blocks = [values[at : at + size] for at in range(0, len(values), size)]
                assert kth_greatest(lambda blocks=blocks: iter(blocks), k) == ordered[k - 1]
    assert kth_greatest(lambda: iter([values]), 0) == np.inf


def test_what_is_drawn_depends_on_place_seed_and_name_alone():
    whole = drawn(3, "a", 0, 10_001, 0.3)
    for size in (1, 7, 1000):
        parts = [drawn(3, "a", at, min(size, 10_001 - at), 0.3) for at in range(0, 10_001, size)]
        assert np.array_equal(np.concatenate(parts), whole)
    assert abs(whole.mean() - 0.3) < 0.015 and drawn(3, "a", 5, 999, 1.0).all()
    for other in (drawn(4, "a", 0, 10_001, 0.3), drawn(3, "b", 0, 10_001, 0.3)):
        assert abs(np.corrcoef(whole, other)[0, 1]) < 0.04


@pytest.mark.parametrize(
    ("uniform", "message"),
    [
        ({"rule": "ties", "density": 0.2}, "rule ties without base; required: folder of the ancestor"),
        ({"rule": "dare", "base": "b"}, "rule dare without density; required: share of what"),
        ({"rule": "slerp", "base": "b"}, "base is given but rule is slerp, which would ignore it"),
        ({"base": "b"}, "base is given but rule is linear"),
        ({"rule": "task_arithmetic", "base": "b", "density": 0.5}, "density is given but rule is task_arithmetic"),
        ({"rule": "slerp", "scale": 2.0}, "scale is given but rule is slerp"),
        ({"rule": "ties", "base": "b", "density": 0.0}, "greater than 0"),
        ({"rule": "median"}, "Input should be 'linear'"),
    ],
)
def test_settings_that_a_rule_lacks_or_ignores_are_refused(uniform: dict, message: str):
    with pytest.raises(ValidationError, match=message):
        UniformSection.model_validate(uniform)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "mistral"}, "a mistral model, the parents are llama"),
        ({"num_hidden_layers": 3}, r"tensor model\.layers\.3\..* is missing, in the parents \["),
        ({"num_hidden_layers": 5}, r"tensor model\.layers\.4\..* is \[.*\], in the parents missing"),
        ({"intermediate_size": 48}, r"tensor .*mlp\..* is \[.*48.*\], in the parents \["),
        ({"merges": 12}, "its width, ids or tokenizer are not those of the image parent"),
    ],
)
def test_a_base_that_is_no_ancestor_is_refused(
    tmp_path: Path, family: tuple[Path, Path, Path], changes: dict, message: str
):
    settings = {"family": "llama", "tie_word_embeddings": False} | changes
    base = tiny_parent(tmp_path / "other", False, 9, **settings)
    with pytest.raises(MergeError, match=f"^uniform.base {re.escape(str(base))}: .*{message}"):
        fuse((*family[:2], base), tmp_path / "out", "task_arithmetic")
    assert not (tmp_path / "out").exists()


def test_a_base_with_other_controls_is_refused(tmp_path: Path, family: tuple[Path, Path, Path]):
    edit_json(family[2] / "jam.json", {"vocabulary.controls.eos": 7})
    with pytest.raises(MergeError, match="its width, ids or tokenizer"):
        fuse(family, tmp_path / "out", "task_arithmetic")


def test_the_report_names_the_rule_and_the_base(tmp_path: Path, family: tuple[Path, Path, Path]):
    fuse(family, tmp_path / "out", "ties", density=0.4)
    report = jam.checkpoint.read_json(tmp_path / "out" / "report.json")
    assert report["settings"]["rule"] == "ties" and report["settings"]["base"]["folder"] == "base"
    assert report["rows"]["input and head"]["counts"] == {"ties": 283, "image row": 21}
    fate = report["tensors"]["model.norm.weight"]["from"]
    assert (
        fate
        == "ties: base + 1 x (0.3 x text and 0.7 x image difference from it), 0.4 of each difference, model.norm.weight"
    )
    assert all(where.startswith("to ") for side in report["inputs"].values() for where in side.values())
