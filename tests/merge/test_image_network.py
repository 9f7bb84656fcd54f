"""An image parent's own image tokenizer: a folder whose parts do not agree is refused before anything is merged."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jam.checkpoint import WEIGHTS
from jam.errors import CheckpointError, MergeError
from jam.tokens.vq import VQConfig, VQModel
from jam.tokens.vq_config import CODEBOOK
from merge.plan import read_parent
from tests.tiny import VQ, edit_json, tiny_parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_parent(tmp_path_factory.mktemp("built") / "image", True, 1)


@pytest.fixture
def parent(tmp_path: Path, built: Path) -> Path:
    return shutil.copytree(built, tmp_path / "image")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 16}, "16 codes an image, the image parent has 4; they must agree"),
        ({"resolution": 10**9}, "codes an image, the image parent has 4"),
        ({"resolution": "8"}, "resolution '8'; a positive whole number is required"),
        ({"patch": 0}, "patch 0; a positive whole number is required"),
        ({"ch_mult": 5}, "ch_mult 5; a list of positive whole numbers is required"),
        ({"ch_mult": []}, "a list of positive whole numbers is required"),
        ({"embed_dim": 8}, r"is \[16, 4\], its config.json and the image ids ask for \[16, 8\]"),
    ],
)
def test_a_configuration_of_other_images_is_refused(parent: Path, tmp_path: Path, change: dict, message: str):
    edit_json(parent / "image_tokenizer/config.json", change)
    with pytest.raises(CheckpointError, match=f"image_tokenizer: .*{message}.*, restore the image tokenizer$"):
        read_parent(parent, "image")
    given = shutil.move(parent / "image_tokenizer", tmp_path / "given")
    with pytest.raises(MergeError, match=f"given: .*{message}.*, name the model's own image tokenizer$"):
        read_parent(parent, "image", given)


def test_a_vocabulary_of_other_images_is_refused(parent: Path):
    edit_json(parent / "jam.json", {"vocabulary.codes_per_image": 10**9})
    with pytest.raises(CheckpointError, match="4 codes an image, the image parent has 1000000000"):
        read_parent(parent, "image")


def test_weights_of_another_network_are_refused(parent: Path, tmp_path: Path):
    with torch.random.fork_rng(devices=[]):
        VQModel(VQConfig(**{**vars(VQ), "n_embed": 32})).save(tmp_path / "other")
    file = parent / "image_tokenizer" / WEIGHTS
    shutil.copyfile(tmp_path / "other" / WEIGHTS, file)
    with pytest.raises(CheckpointError, match=r"is \[32, 4\], its config.json and the image ids ask for \[16, 4\]"):
        read_parent(parent, "image")
    save_file({name: tensor for name, tensor in load_file(file).items() if name != CODEBOOK}, file)
    with pytest.raises(CheckpointError, match=f"no tensor {CODEBOOK}"):
        read_parent(parent, "image")
