"""New weights: normal, by place alone, and never other numbers than before."""

import numpy as np
import pytest

from merge.noise import NOISE

PINNED = {
    "sums": [
        [-1.554534912109375, 0.13092041015625, -1.9044342041015625],
        [0.850830078125, -0.166015625, -1.7044677734375],
    ],
    "quantiles": [
        [-0.6821680068969727, -1.0289297103881836, 1.2399024963378906],
        [-1.481614112854004, -0.8819713592529297, -0.4004049301147461],
    ],
}


@pytest.mark.parametrize(("init", "tail"), [("sums", 0.044), ("quantiles", 0.0455)])
def test_new_weights_are_normal_and_independent_of_blocks_and_of_each_other(init: str, tail: float):
    rule = NOISE[init]((300, 70), 0.02, 0, "a")
    whole = rule.rows(slice(0, 300))
    for size in (1, 7, 128):
        streamed = np.concatenate([rule.rows(slice(at, min(at + size, 300))) for at in range(0, 300, size)])
        assert streamed.tobytes() == whole.tobytes()
    assert whole.dtype == np.float32 and whole.shape == (300, 70)
    assert abs(whole.mean()) < 3 * 0.02 / 145 and abs(whole.std() / 0.02 - 1) < 0.02
    share = np.mean(np.abs(whole) > 2 * 0.02)  # 4.55 % of a normal distribution, 4.4 % of a sum of twelve
    assert abs(share - tail) < 0.005
    for other in (NOISE[init]((300, 70), 0.02, 1, "a"), NOISE[init]((300, 70), 0.02, 0, "b")):
        assert abs(np.corrcoef(whole.ravel(), other.rows(slice(0, 300)).ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("init", ["sums", "quantiles"])
def test_new_weights_never_change(init: str):
    """Differences shipped for a merged base need the very same base on every machine and numpy."""
    assert NOISE[init]((2, 3), 1.0, 0, "cross.0.text.fc1.weight").rows(slice(0, 2)).tolist() == PINNED[init]
