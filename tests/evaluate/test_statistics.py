"""Moments of what enters norms against states taken by hand, and the fitted factors against least squares."""

from pathlib import Path

import numpy as np
import pytest
import torch

from jam.evaluate.statistics import Moments, fit, norm_inputs, side_by_side
from jam.models.families import FAMILIES
from jam.models.load import load_bundle
from tests.tiny import tiny_parent

DOCUMENTS = [np.array(ids) for ids in ([0, 20, 33, 40, 2], [0, 9], [0, 50, 60, 70, 80, 90, 2], [0, 11, 12])]


@pytest.mark.parametrize("family", ["opt", "llama", "gemma3_text", "olmo2"])
def test_moments_are_those_of_the_states(tmp_path: Path, family: str):
    bundle = load_bundle(tiny_parent(tmp_path, False, 0, family), torch.float64)
    config = bundle.model.config.to_dict()
    names = list(FAMILIES[family].norms(config))
    assert len(names) == {"opt": 9, "llama": 9, "gemma3_text": 17, "olmo2": 17}[family]
    found = {size: norm_inputs(bundle.model, names, DOCUMENTS, size) for size in (7, 1000)}
    assert not any(bundle.model.get_submodule(name)._forward_pre_hooks for name in names)
    taken: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for name in names:
        bundle.model.get_submodule(name).register_forward_pre_hook(
            lambda module, inputs, name=name: taken[name].append(inputs[0].numpy().reshape(-1, inputs[0].shape[-1]))
        )
    with torch.no_grad():
        for ids in sorted(DOCUMENTS, key=len, reverse=True):
            bundle.model(torch.from_numpy(ids)[None])
    for name in names:
        states = np.concatenate(taken[name])
        for moments in (found[7][name], found[1000][name]):
            assert moments.width == states.shape[1] and moments.centred == (family == "opt")
            np.testing.assert_allclose(moments.mean, states.mean(1), atol=1e-12)
            np.testing.assert_allclose(moments.square, (states**2).mean(1), rtol=1e-9)


def moments(x_ND: np.ndarray, centred: bool, bias: bool) -> Moments:
    return Moments(x_ND.mean(1), (x_ND**2).mean(1), x_ND.shape[1], centred, 1e-5, bias)


def normed(x_ND: np.ndarray, of: Moments) -> np.ndarray:
    return (x_ND - (of.mean[:, None] if of.centred else 0.0)) / of.length()[:, None]


@pytest.mark.parametrize(("centred", "bias"), [(False, False), (True, False), (True, True)])
def test_the_factor_is_the_least_squares_one(centred: bool, bias: bool):
    random = np.random.default_rng(0)
    lengths = np.exp(random.standard_normal((2, 300, 1)))
    halves = [
        random.standard_normal((300, width)) * length + 0.7 * number
        for number, (width, length) in enumerate(zip((24, 40), lengths, strict=True))
    ]
    halves[0][:20] = 0.0  # ids that the half does not know
    own = [moments(half, centred, bias) for half in halves]
    both = side_by_side(*own)
    whole = moments(np.concatenate(halves, axis=1), centred, bias)
    np.testing.assert_allclose(both.mean, whole.mean)
    np.testing.assert_allclose(both.square, whole.square)
    for half, mine in zip(halves, own, strict=True):
        wanted, joint = normed(half, mine).ravel(), normed(half, both).ravel()
        columns = np.stack([joint, np.ones_like(joint)][: 1 + bias], axis=1)
        solved = np.linalg.lstsq(columns, wanted, rcond=None)[0]
        found = fit(mine, both)
        np.testing.assert_allclose([found.factor, found.offset][: 1 + bias], solved, rtol=1e-9)
        assert bias or found.offset == 0.0
        np.testing.assert_allclose(found.before, np.linalg.norm(wanted - joint) / np.linalg.norm(wanted))
        left = np.linalg.norm(wanted - columns @ solved) / np.linalg.norm(wanted)
        np.testing.assert_allclose(found.after, left)
        assert found.after < found.before
