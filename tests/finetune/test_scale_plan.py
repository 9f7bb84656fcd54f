"""The plan's counts are those of real networks."""

from dataclasses import replace

import pytest
import torch

from benchmarks.scale_plan import CROSS, WIDTH, Setting, memory, speed, traffic
from jam.models.load import load_bundle
from tests.tiny import tiny_pair
from tests.tiny_cross import tiny_cross


def test_parameters_are_those_of_the_networks(tmp_path):
    text, image = tiny_pair(tmp_path, ffn_dim=128)  # 4 D, as at 7B
    fused = tiny_cross(tmp_path / "fused", text, image)
    small = {"width": 32, "layers": 4, "positions": 256}
    for plan, folder in ((replace(WIDTH, **small), image), (replace(CROSS, **small, exchanges=2), fused)):
        model = load_bundle(folder, torch.bfloat16).model
        size = model.config.vocab_size
        assert replace(plan, vocabulary=size).parameters == sum(p.numel() for p in model.parameters())


def test_figures_follow_what_they_depend_on():
    at = Setting(256)
    assert traffic(CROSS, Setting(8))["between machines"] == 0 < traffic(CROSS, at)["between machines"]
    assert speed(CROSS, at, 0.4) == pytest.approx(32 * speed(CROSS, Setting(8), 0.4))
    assert sum(memory(WIDTH, replace(at, shards=256)).values()) < sum(memory(WIDTH, at).values())
