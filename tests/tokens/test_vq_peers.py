"""Foreign image tokenizers against their owners' code: the same codes, latents and pixels."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import ChameleonVQVAEConfig, Emu3VQVAE, Emu3VQVAEConfig, JanusVQVAEConfig
from transformers.models.chameleon.modeling_chameleon import ChameleonVQVAE
from transformers.models.janus.modeling_janus import JanusVQVAEDecoder

from jam.errors import CheckpointError, DataError
from jam.tokens.image import ImageTokenizer
from jam.tokens.vq import VQModel
from jam.tokens.vq_config import VQConfig, chameleon_config, muse_config, own_name, taming_config
from tests.tiny import randomize

HF = {
    "resolution": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 2, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "latent_channels": 12,
    "embed_dim": 6,
    "num_embeddings": 24,
}
TAMING = {
    "model": {
        "params": {
            "embed_dim": 6,
            "n_embed": 24,
            "ddconfig": {
                "double_z": False,
                "z_channels": 12,
                "resolution": 32,
                "in_channels": 3,
                "out_ch": 3,
                "ch": 32,
                "ch_mult": [1, 2, 2],
                "num_res_blocks": 2,
                "attn_resolutions": [16],
                "dropout": 0.0,
            },
        }
    }
}
MUSE = {
    "_class_name": "VQGANModel",
    "resolution": 32,
    "num_channels": 3,
    "hidden_channels": 32,
    "channel_mult": [1, 2, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "no_attn_mid_block": True,
    "z_channels": 12,
    "num_embeddings": 24,
    "quantized_embed_dim": 6,
}
EMU3 = {
    "codebook_size": 20,
    "embed_dim": 4,
    "latent_channels": 4,
    "base_channels": 32,
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [1],
    "hidden_size": 64,
    "temporal_downsample_factor": 2,
}


def pixels(side: int = 32, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("attn_type", ["vanilla", "None"])
def test_our_encoder_gives_the_codes_of_transformers_chameleon(attn_type: str):
    raw = HF | {"attn_type": attn_type}
    peer = ChameleonVQVAE(ChameleonVQVAEConfig(**raw)).eval()
    randomize(peer, 3)
    ours = VQModel.build(chameleon_config(raw, "here"), peer.state_dict(), "here")
    with torch.no_grad():
        theirs = peer.encode(pixels())
        assert (peer.quant_conv(theirs.last_hidden_state) - ours.latents(pixels())).abs().max() < 1e-5
    codes = ours.encode(pixels())
    assert torch.equal(codes.flatten(), theirs.image_tokens) and codes.shape == (3, 64)
    assert len(codes.unique()) > 8  # a tokenizer that always says the same would agree too


def test_a_tokenizer_without_decoder_reads_images_and_says_what_it_lacks(tmp_path: Path):
    peer = ChameleonVQVAE(ChameleonVQVAEConfig(**HF))
    VQModel.build(chameleon_config(HF, "here"), peer.state_dict(), "here").save(tmp_path)
    tokenizer = ImageTokenizer.load(tmp_path)
    codes = tokenizer.encode([Image.new("RGB", (40, 30), "red")])
    with pytest.raises(CheckpointError, match=r"encoder only .*jam convert vqgan\.ckpt") as error:
        tokenizer.decode(codes)
    assert "\n" not in str(error.value)


def test_our_decoder_gives_the_pixels_of_transformers_janus():
    """Janus' decoder is the lineage's with attention on the coarsest level, levels numbered from there."""
    config = {"base_channels": 32, "channel_multiplier": [1, 2, 4], "num_res_blocks": 1, "latent_channels": 12}
    peer = JanusVQVAEDecoder(JanusVQVAEConfig(**config, embed_dim=6, num_embeddings=24)).eval()
    randomize(peer, 3)
    sizes = VQConfig(32, 1, 32, (1, 2, 4), 1, (8,), 12, 6, 24)
    ours = VQModel(sizes).eval()
    mapped = {}
    for name, tensor in peer.state_dict().items():
        parts = name.split(".")
        if parts[0] == "up":
            parts[1] = str(2 - int(parts[1]))
        mapped[".".join(parts)] = tensor
    ours.decoder.load_state_dict(mapped)
    z = torch.randn(2, 12, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, mine = peer(z), ours.decoder(z)
    assert mine.shape == (2, 3, 32, 32)
    assert (theirs - mine).abs().max() < 1e-5 * theirs.abs().max()


def test_taming_and_chameleon_spell_one_network():
    assert replace(taming_config(TAMING, "x"), decoder=False) == chameleon_config(HF, "x")
    assert taming_config(TAMING, "x").codes_per_image == 64


def test_open_muse_is_the_lineage_without_middle_attention_on_pixels_from_zero():
    torch.manual_seed(0)
    muse = VQModel(muse_config(MUSE, "x")).eval()
    assert not any(name.startswith("encoder.mid.attn_1") for name in muse.state_dict())
    plain = VQModel(replace(muse.config, unit_pixels=False)).eval()
    plain.load_state_dict(muse.state_dict())
    assert torch.equal(muse.encode(pixels()), plain.encode((pixels() + 1) / 2))
    z = torch.randn(1, 6, 8, 8)
    assert torch.equal(muse.decode_latents(z), 2 * plain.decode_latents(z) - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ddconfig": None}, "ddconfig is missing; .*--config"),
        ({"embed_dim": "6"}, "embed_dim is '6'; a whole number from 1"),
        ({"remap": "used.npy"}, "remap is 'used.npy'; None is required"),
        ({"ddconfig": {"double_z": True}}, "double_z is True; False is required"),
        ({"ddconfig": {"out_ch": 4}}, "out_ch is 4; 3 is required"),
        ({"ddconfig": {"ch_mult": [1, 2.5]}}, "ch_mult is .*a list of whole numbers"),
        ({"ddconfig": {"attn_type": "linear"}}, "attn_type is 'linear'; 'vanilla' is required"),
    ],
)
def test_another_network_is_refused(change: dict, message: str):
    params = dict(TAMING["model"]["params"])
    for key, value in change.items():
        params[key] = params[key] | value if isinstance(value, dict) else value
    with pytest.raises(CheckpointError, match=f"^x: {message}") as error:
        taming_config({"model": {"params": params}}, "x")
    assert "\n" not in str(error.value)


def test_tensors_of_other_networks_are_refused():
    with pytest.raises(CheckpointError, match="Gumbel quantizer"):
        own_name("quantize.embed.weight", "x")
    with pytest.raises(CheckpointError, match="no part of a VQGAN"):
        own_name("first_stage_model.encoder.conv_in.weight", "x")
    with pytest.raises(CheckpointError, match="one block a level"):
        muse_config(MUSE | {"num_res_blocks": 1, "attn_resolutions": [16]}, "x")


@pytest.fixture
def emu3(tmp_path: Path) -> tuple[Path, Emu3VQVAE]:
    peer = Emu3VQVAE(Emu3VQVAEConfig(**EMU3)).eval()
    randomize(peer, 2)
    peer.save_pretrained(tmp_path / "emu3")
    raw = json.loads((tmp_path / "emu3" / "config.json").read_text())
    (tmp_path / "emu3" / "config.json").write_text(json.dumps(raw | {"resolution": 16}))
    return tmp_path / "emu3", peer


def test_emu3s_tokenizer_at_a_fixed_size(emu3: tuple[Path, Emu3VQVAE]):
    folder, peer = emu3
    tokenizer = ImageTokenizer.load(folder)
    assert (tokenizer.resolution, tokenizer.codes_per_image, tokenizer.codebook_size) == (16, 64, 20)
    noise = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    images = [Image.fromarray(item) for item in noise]
    codes = tokenizer.encode(images)
    with torch.no_grad():
        theirs = peer.encode(tokenizer.pixels(images), torch.tensor([[16, 16]] * 2)).image_tokens
        drawn = peer.decode(torch.stack(theirs)).clamp(-1, 1)
    assert np.array_equal(codes, torch.stack(theirs).flatten(1).numpy())
    pictures = np.stack([np.asarray(image) for image in tokenizer.decode(codes)])
    assert np.abs(pictures.transpose(0, 3, 1, 2) / 127.5 - 1 - drawn.numpy()).max() < 1 / 127


def test_emu3s_tokenizer_at_other_sizes(emu3: tuple[Path, Emu3VQVAE]):
    """Fields of view reach over the border of a row: an image of several rows is not one row after another."""
    folder, peer = emu3
    tokenizer = ImageTokenizer.load(folder)
    codes = np.random.default_rng(1).integers(0, 20, (1, 5 * 3))
    with torch.no_grad():
        wanted = peer.decode(torch.from_numpy(codes).view(1, 5, 3)).clamp(-1, 1)[0]
    (image,) = tokenizer.decode(codes, (5, 3))
    assert image.size == (6, 10)
    assert np.abs(np.asarray(image).transpose(2, 0, 1) / 127.5 - 1 - wanted.numpy()).max() < 1 / 127
    assert tokenizer.preview(codes[0], (5, 3)).tobytes() == image.tobytes()
    half = np.asarray(tokenizer.preview(codes[0, :7], (5, 3)))
    assert half.shape == (10, 6, 3) and (half[4:] == 128).all() and not (half[:4] == 128).all()
    with pytest.raises(DataError, match=r"codes of shape \(1, 15\); \[batch, 12\]"):
        tokenizer.decode(codes, (4, 3))
    with pytest.raises(DataError, match=r"an image of 500 x 2 px: absolute aspect ratio .*; crop it"):
        tokenizer.network.grid_of(500, 2)


def test_emu3s_tokenizer_refuses_what_does_not_fit(emu3: tuple[Path, Emu3VQVAE]):
    folder, peer = emu3
    raw = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"resolution": 15}, "resolution is 15; a multiple of 2"),
        ({"min_pixels": 3}, "min_pixels and max_pixels are 3 and 1048576; whole numbers in order, from 4 on"),
        ({"max_pixels": "4"}, "min_pixels and max_pixels are 262144 and '4'"),
        ({"codebook_size": 21}, "not one image tokenizer .*size mismatch"),
        ({"codebook_size": "x"}, "not one image tokenizer"),
        ({"model_type": "vae"}, "model_type is 'vae', not 'vqgan' or 'emu3_vqgan'"),
    ):
        (folder / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(CheckpointError, match=message) as error:
            ImageTokenizer.load(folder)
        assert "\n" not in str(error.value)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {name: tensor.contiguous() for name, tensor in peer.state_dict().items()}
    tensors.pop("quantize.embedding.weight")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"1 tensors missing, 0 unexpected \(first: quantize"):
        ImageTokenizer.load(folder)


def test_a_config_of_an_older_jam_still_loads(tmp_path: Path):
    config = VQConfig(ch=32, z_channels=16, embed_dim=4, n_embed=16, attn_resolutions=())
    VQModel(config).save(tmp_path)
    older = {name: value for name, value in asdict(config).items() if name not in ("decoder", "mid_attention")}
    older.pop("unit_pixels")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vqgan"} | older))
    assert VQModel.load(tmp_path).config == config


@pytest.mark.parametrize(
    "change",
    [
        {"num_res_blocks": 1_000_000_000},
        {"num_res_blocks": True},
        {"ch_mult": [1, "2"]},
        {"ch_mult": 3},
        {"local": "yes"},
        {"n_embed": None},
        {"other": 1},
    ],
)
def test_sizes_of_no_tokenizer_are_refused_before_anything_is_built(tmp_path: Path, change: dict):
    VQModel(VQConfig(ch=32, z_channels=16, embed_dim=4, n_embed=16, attn_resolutions=())).save(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(CheckpointError, match=f"config.json: {next(iter(change))} is"):
        VQModel.load(tmp_path)
