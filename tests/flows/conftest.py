"""A tiny pair, its fusion and a picture, for flows that talk to a model."""

from pathlib import Path

import pytest
from PIL import Image

from merge.recipe import MergeRecipe
from merge.run import run_merge
from tests.tiny import tiny_pair


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_pair(tmp_path_factory.mktemp("parents"))


@pytest.fixture(scope="module")
def fused(parents: tuple[Path, Path]) -> Path:
    out = parents[0].parent / "fused"
    run_merge(MergeRecipe(method="cross", text=parents[0], image=parents[1], out=out, dtype="float32"))
    return out


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red dot.png"
    Image.new("RGB", (20, 12), (200, 30, 30)).save(path)
    return path
