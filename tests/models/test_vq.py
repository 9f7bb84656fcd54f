"""The image tokenizer's network: what a code of the local encoder may know, and that a saved one comes back whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jam.tokens.vq import VQConfig, VQModel

LOCAL = VQConfig(ch=32, z_channels=16, embed_dim=4, n_embed=16, attn_resolutions=(), local=True)
SIDE = LOCAL.resolution // LOCAL.grid  # pixels a code's side
RIM = 3 * LOCAL.patch


def latents_after_a_change(config: VQConfig, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents [embed_dim, G, G] of an image, and of the same with other pixels in ``rows``."""
    torch.manual_seed(0)
    model, image = VQModel(config).eval(), torch.rand(1, 3, 64, 64) * 2 - 1
    other = image.clone()
    other[:, :, rows] = -other[:, :, rows]
    with torch.inference_mode():
        return model.latents(image)[0], model.latents(other)[0]


@pytest.mark.parametrize("row", range(LOCAL.grid))
def test_a_local_code_knows_its_patch_and_rim_alone(row: int):
    before, after = latents_after_a_change(LOCAL, slice(row * SIDE, (row + 1) * SIDE))
    changed = (before != after).flatten(2).any(0).any(1)
    reached = torch.tensor([abs(other - row) * SIDE < SIDE + RIM for other in range(LOCAL.grid)])
    assert torch.equal(changed, reached)


def test_a_code_of_the_lineage_knows_the_whole_image():
    before, after = latents_after_a_change(replace(LOCAL, local=False), slice(0, SIDE))
    assert (before != after).any(0).all()


@pytest.mark.parametrize("local", [True, False])
def test_saved_and_loaded_codes_and_pixels_are_the_same(tmp_path: Path, local: bool):
    torch.manual_seed(0)
    model = VQModel(replace(LOCAL, local=local)).eval()
    model.load_state_dict({name: t.bfloat16().float() for name, t in model.state_dict().items()})
    model.save(tmp_path)
    again, image = VQModel.load(tmp_path), torch.rand(2, 3, 64, 64) * 2 - 1
    codes = model.encode(image)
    assert torch.equal(again.encode(image), codes)
    assert torch.equal(again.decode(codes), model.decode(codes))
