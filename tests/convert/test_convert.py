"""``jam convert`` on what every owner ships: the same logits, codes and pixels afterwards."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForCausalLM

from jam.checkpoint import INDEX, open_checkpoint
from jam.cli import main
from jam.convert.run import run_convert
from jam.models.load import load_bundle, load_model
from jam.tokens.image import ImageTokenizer
from jam.tokens.text import TextTokenizer
from jam.tokens.vq import VQModel
from tests.convert.owners import (
    VQ,
    byte_tokenizer,
    chameleon_words,
    image_codes,
    metaseq_args,
    metaseq_parts,
    write_chameleon,
    write_vqgan,
)
from tests.tiny import randomize, tiny_parent

IDS = torch.randint(0, 200, (2, 12), generator=torch.Generator().manual_seed(0))


def noise(side: int, count: int) -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return [Image.fromarray(item) for item in values]


def test_a_vqgan_keeps_its_codes_and_pixels(tmp_path: Path, capsys: pytest.CaptureFixture):
    network = write_vqgan(tmp_path / "in")
    assert main(["convert", str(tmp_path / "in" / "vqgan.ckpt"), "--out", str(tmp_path / "out")]) == 0
    assert "64 codes of 16, 16 px, 2 tensors of training losses left out" in capsys.readouterr().err
    tokenizer = ImageTokenizer.load(tmp_path / "out")
    pixels = tokenizer.pixels(noise(16, 3))
    codes = network.encode(pixels)
    assert torch.equal(tokenizer.network.encode(pixels), codes) and len(codes.unique()) > 4
    assert torch.equal(tokenizer.network.decode(codes), network.decode(codes))
    assert open_checkpoint(tmp_path / "out").dtypes == ("F32",)


def test_a_lightning_callbacks_name_in_a_vqgan_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """taming's published files name the class of a callback; the library is not there, and not needed."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    module = types.ModuleType(name)
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": name})
    for parent in ("pytorch_lightning", "pytorch_lightning.callbacks"):
        monkeypatch.setitem(sys.modules, parent, types.ModuleType(parent))
    monkeypatch.setitem(sys.modules, name, module)
    network = write_vqgan(tmp_path / "in")
    content = {"callbacks": {module.ModelCheckpoint: {"best": 1.0}}, "state_dict": network.state_dict()}
    torch.save(content, tmp_path / "in" / "vqgan.ckpt")
    run_convert(tmp_path / "in", tmp_path / "out")
    assert ImageTokenizer.load(tmp_path / "out").network.config == network.config


def test_open_muses_folder_is_a_vqgan_with_its_own_settings(tmp_path: Path):
    raw = {"_class_name": "VQGANModel", "resolution": 16, "num_channels": 3, "hidden_channels": 32}
    raw |= {"channel_mult": [1, 2], "num_res_blocks": 2, "attn_resolutions": [], "no_attn_mid_block": True}
    raw |= {"z_channels": 8, "num_embeddings": 16, "quantized_embed_dim": 4, "resample_with_conv": True}
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(raw))
    sizes = {"num_res_blocks": 2, "attn_resolutions": (), "mid_attention": False, "unit_pixels": True}
    network = VQModel(type(VQ)(**(VQ.__dict__ | sizes))).eval()
    randomize(network, 1)
    torch.save(network.state_dict(), tmp_path / "in" / "pytorch_model.bin")
    run_convert(tmp_path / "in", tmp_path / "out")
    tokenizer = ImageTokenizer.load(tmp_path / "out")
    assert tokenizer.network.config == network.config
    pixels = tokenizer.pixels(noise(16, 2))
    assert torch.equal(tokenizer.network.encode(pixels), network.encode(pixels))


@pytest.mark.parametrize(("shards", "swin"), [(1, False), (2, False), (1, True)])
def test_chameleon_has_the_same_logits_and_its_own_codes(tmp_path: Path, shards: int, swin: bool):
    model, network = write_chameleon(tmp_path / "in", shards, swin)
    run_convert(tmp_path / "in", tmp_path / "out")
    bundle = load_bundle(tmp_path / "out")
    with torch.no_grad():
        logits = bundle.model(input_ids=IDS).logits
        assert torch.equal(logits, model(input_ids=IDS).logits)
        peer = meta_logits(tmp_path / "in" / "models" / "7b", shards, swin)
    assert (logits - peer).abs().max() < 1e-5 * peer.abs().max()
    words, span = chameleon_words(), bundle.vocabulary.image_span
    assert (span.start, span.stop) == (words["IMGIMGAZ"], words["IMGIMGAZ"] + 16)
    assert bundle.vocabulary.controls["begin_image"] == words["<racm3:break>"]
    assert bundle.vocabulary.controls["end_image"] == words["<eoss>"]
    assert bundle.vocabulary.codes_per_image == 64 and bundle.unconditional == ("bos", "begin_image")
    images = noise(16, 2)
    ids = bundle.vocabulary.image_ids(bundle.image.encode(images))
    spelled = np.array(image_codes())[ids - span.start]  # the code in the name of each id
    assert np.array_equal(spelled, network.encode(bundle.image.pixels(images)).numpy())
    assert not np.array_equal(spelled, ids - span.start)
    drawn = bundle.image.network.decode(torch.from_numpy(ids - span.start))
    assert torch.equal(drawn, network.decode(torch.from_numpy(spelled)))
    assert bundle.text.decode(bundle.text.encode("a red cat")) == "a red cat"


def meta_logits(folder: Path, shards: int, swin: bool) -> torch.Tensor:
    """Meta's network on its own files: every shard computes with its heads and columns, partial outputs are summed."""
    names = ["consolidated.pth"] if shards == 1 else [f"consolidated.{shard:02d}.pth" for shard in range(shards)]
    parts = [torch.load(folder / name, weights_only=True) for name in names]
    (batch, length), width = IDS.shape, 8

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.rms_norm(x, (32,), parts[0][name], 1e-5)

    def turn(x: torch.Tensor) -> torch.Tensor:
        """Neighbouring pairs as complex numbers: [B, T, heads, width]."""
        angles = torch.outer(torch.arange(length), 10000.0 ** (-torch.arange(0, width, 2) / width))
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[None, :, None]).flatten(3)

    def attention(x: torch.Tensor, layer: str) -> torch.Tensor:
        total = torch.zeros_like(x)
        for part in parts:
            weights = {name: part[f"{layer}.attention.{name}.weight"] for name in ("wq", "wk", "wv", "wo")}
            q, k, v = (F.linear(x, weights[name]).view(batch, length, -1, width) for name in ("wq", "wk", "wv"))
            q, k = (
                turn(
                    F.layer_norm(
                        y,
                        (width,),
                        part[f"{layer}.attention.{name}_normalization.weight"],
                        part[f"{layer}.attention.{name}_normalization.bias"],
                    )
                )
                for y, name in ((q, "q"), (k, "k"))
            )
            heads = (y.transpose(1, 2) for y in (q, k, v))
            mixed = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
            total = total + F.linear(mixed.transpose(1, 2).flatten(2), weights["wo"])
        return total

    def feed_forward(x: torch.Tensor, layer: str) -> torch.Tensor:
        inner = [[part[f"{layer}.feed_forward.w{number}.weight"] for number in (1, 2, 3)] for part in parts]
        return sum(F.linear(F.silu(F.linear(x, one)) * F.linear(x, three), two) for one, two, three in inner)

    x = torch.cat([F.embedding(IDS, part["tok_embeddings.weight"]) for part in parts], -1)
    for number in range(4):
        layer = f"layers.{number}"
        first, second = f"{layer}.attention_norm.weight", f"{layer}.ffn_norm.weight"
        x = x + (norm(attention(x, layer), first) if swin else attention(norm(x, first), layer))
        x = x + (norm(feed_forward(x, layer), second) if swin else feed_forward(norm(x, second), layer))
    return torch.cat([F.linear(norm(x, "norm.weight"), part["output.weight"]) for part in parts], -1)


@pytest.mark.parametrize(
    ("parts", "fused", "plain"), [(1, True, True), (1, False, False), (2, True, False), (2, False, True)]
)
def test_metaseqs_opt_has_the_same_logits(tmp_path: Path, parts: int, fused: bool, plain: bool):
    """``plain`` is CM3Leon's network, without biases and learnt norms."""
    changes = {"enable_bias": not plain, "layer_norm_elementwise_affine": not plain, "vocab_size": 260}
    model = tiny_opt(tmp_path / "hf", **changes)
    (tmp_path / "in").mkdir()
    for number, state in enumerate(metaseq_parts(model, parts, fused)):
        name = "restored.pt" if parts == 1 else f"reshard-model_part-{number}.pt"
        places = {"args": metaseq_args(), "cfg": None} if fused else {"args": None, "cfg": {"model": metaseq_args()}}
        torch.save({"model": state, **places}, tmp_path / "in" / name)
    words = {word: index for index, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *byte_words()])}
    (tmp_path / "in" / "gpt2-vocab.json").write_text(json.dumps(words))
    (tmp_path / "in" / "gpt2-merges.txt").write_text("#version: 0.2\n")
    run_convert(tmp_path / "in", tmp_path / "out")
    config = open_checkpoint(tmp_path / "out").config
    assert (config["enable_bias"], config["layer_norm_elementwise_affine"]) == (not plain, not plain)
    again = load_model(tmp_path / "out", config)
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert TextTokenizer.load(tmp_path / "out").encode("a") == [words["a"]]


def byte_words() -> list[str]:
    return [word for word in chameleon_words() if len(word) == 1]


def tiny_opt(folder: Path, **changes: object) -> torch.nn.Module:
    from tests.tiny import network_class, tiny_config

    model = network_class("opt")(tiny_config("opt", **changes)).eval()
    randomize(model, 4)
    return model


@pytest.mark.parametrize("tied", [True, False])
def test_a_transformers_folder_of_bins_is_the_same_folder_with_safetensors(tmp_path: Path, tied: bool):
    source = tiny_parent(tmp_path / "in", False, 3, "llama", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(source)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    names = sorted(state)
    halves = [names[::2], names[1::2]] if not tied else [names]
    for number, half in enumerate(halves, 1):
        file = "pytorch_model.bin" if tied else f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: state[name] for name in half}, source / file)
    if not tied:
        mapping = {name: f"pytorch_model-{1 + (name in halves[1]):05d}-of-00002.bin" for name in names}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": mapping}))
    (source / "model.safetensors").unlink()
    (source / "more").mkdir()
    (source / "more" / "notes.txt").write_text("x")
    (source / "more" / "model.safetensors").write_text("mine")
    run_convert(source, tmp_path / "out")
    found = open_checkpoint(tmp_path / "out")
    assert ("lm_head.weight" in found.tensors) == (not tied)
    assert not (tmp_path / "out" / INDEX).exists() and not list((tmp_path / "out").glob("*.bin*"))
    assert (tmp_path / "out" / "more" / "notes.txt").read_text() == "x"
    assert (tmp_path / "out" / "more" / "model.safetensors").read_text() == "mine"
    with torch.no_grad():
        again = load_model(tmp_path / "out", found.config)
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_half_precision_goes_over_bit_by_bit(tmp_path: Path):
    source = tiny_parent(tmp_path / "in", False, 3)
    model = AutoModelForCausalLM.from_pretrained(source)
    state = {
        name: tensor.to(torch.bfloat16 if "fc1" in name else torch.float16)
        for name, tensor in model.state_dict().items()
    }
    torch.save(state, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)  # torch's old format
    run_convert(source, tmp_path / "out", kind="transformers")
    found = open_checkpoint(tmp_path / "out")
    assert found.dtypes == ("BF16", "F16")
    for name, info in found.tensors.items():
        bits = state[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert found.raw(name).tobytes() == bits, info


def test_the_tokenizer_of_a_metaseq_folder_may_be_a_tokenizer_json(tmp_path: Path):
    model = tiny_opt(tmp_path / "hf", vocab_size=260, enable_bias=False, layer_norm_elementwise_affine=False)
    (tmp_path / "in").mkdir()
    torch.save({"model": metaseq_parts(model, 1, True)[0], "args": metaseq_args()}, tmp_path / "in" / "x.pt")
    byte_tokenizer({word: index for index, word in enumerate(byte_words())}, []).save(
        str(tmp_path / "in/tokenizer.json")
    )
    run_convert(tmp_path / "in" / "x.pt", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
