"""Tiny checkpoints as their owners write them, the inverse of what ``jam convert`` does, and the proof of a refusal."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from jam.cli import main
from jam.models.chameleon import ChameleonForCausalLM
from jam.tokens.vq import VQConfig, VQModel
from tests.tiny import randomize, tiny_config

VQ = VQConfig(16, 1, 32, (1, 2), 1, (8,), 8, 4, 16)
DDCONFIG = {
    "double_z": False,
    "z_channels": 8,
    "resolution": 16,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [8],
    "dropout": 0.0,
}
LOSSES = {
    "loss.discriminator.main.0.weight": torch.ones(2, 3),
    "loss.perceptual_loss.lin0.model.1.weight": torch.ones(4),
}
LETTERS = "ABCDEFGHIJ"


def write_yaml(file: Path, params: dict) -> None:
    YAML().dump({"model": {"target": "vqgan.VQModel", "params": params}}, file)


def write_vqgan(folder: Path, seed: int = 7) -> VQModel:
    """``vqgan.ckpt`` with training losses and ``vqgan.yaml``."""
    folder.mkdir(parents=True, exist_ok=True)
    network = VQModel(VQ).eval()
    randomize(network, seed)
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.save({"state_dict": state | LOSSES, "epoch": 3, "hyper": [1.0, "x"]}, folder / "vqgan.ckpt")
    write_yaml(folder / "vqgan.yaml", {"embed_dim": 4, "n_embed": 16, "ddconfig": DDCONFIG, "ckpt_path": None})
    return network


def chameleon_words() -> dict[str, int]:
    """Controls, 16 image tokens whose ids are not in the order of their codes, controls, bytes."""
    words = ["<s>", "<pad>", "</s>", "<unk>"]
    words += ["IMGIMG" + "".join(LETTERS[int(digit)] for digit in str(code)) + "Z" for code in image_codes()]
    words += ["<eoss>", "<racm3:break>", "<reserved08706>", "<reserved08707>"]
    words += sorted(pre_tokenizers.ByteLevel.alphabet())
    return {word: index for index, word in enumerate(words)}


def image_codes() -> list[int]:
    """The code of each image token in the order of the ids."""
    return [5 * index % 16 for index in range(16)]


def byte_tokenizer(words: dict[str, int], special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    return tokenizer


def write_chameleon(root: Path, shards: int, swin: bool = False) -> tuple[ChameleonForCausalLM, VQModel]:
    """Meta's folder of a random Chameleon, and the networks that it holds."""
    words = chameleon_words()
    vocab = len(words) + len(words) % 2
    config = tiny_config("chameleon", vocab_size=vocab, tie_word_embeddings=False, swin_norm=swin, rms_norm_eps=1e-5)
    model = ChameleonForCausalLM(config).eval()
    randomize(model, 11)
    with torch.no_grad():
        for layer in model.model.layers:
            for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
                for vector in (norm.weight, norm.bias):  # one for all heads of a shard, as Meta has them
                    heads = len(vector) // shards
                    for shard in range(shards):
                        vector[shard * heads : (shard + 1) * heads] = vector[shard * heads]
    folder = root / "models" / "7b"
    folder.mkdir(parents=True)
    for shard in range(shards):
        name = "consolidated.pth" if shards == 1 else f"consolidated.{shard:02d}.pth"
        torch.save(meta_shard(model, shard, shards), folder / name)
    params = {"dim": 32, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-5, "rope_theta": 10000.0}
    params |= {"swin_norm": swin, "qk_normalization": True, "multiple_of": 256, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps({"model": params, "model_parallel_size": shards}))
    (folder / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": shards}))
    network = write_vqgan(root / "tokenizer")
    special = [word for word in words if word.startswith("<") and len(word) > 1]
    byte_tokenizer(words, special).save(str(root / "tokenizer" / "text_tokenizer.json"))
    return model, network


def meta_shard(model: ChameleonForCausalLM, shard: int, shards: int) -> dict[str, Tensor]:
    """One model-parallel shard: rotary pairs as neighbours, one norm of queries and keys."""

    def rows(tensor: Tensor) -> Tensor:
        return tensor.chunk(shards, 0)[shard].clone()

    def columns(tensor: Tensor) -> Tensor:
        return tensor.chunk(shards, 1)[shard].clone()

    def pairs(tensor: Tensor, width: int) -> Tensor:
        halves = tensor.view(-1, 2, width // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape).clone()

    found = {
        "tok_embeddings.weight": columns(model.model.embed_tokens.weight.data),
        "norm.weight": model.model.norm.weight.data.clone(),
        "output.weight": rows(model.lm_head.weight.data),
        "rope.freqs": torch.ones(4),
    }
    for number, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        part = {
            "attention.wq.weight": rows(pairs(attention.q_proj.weight.data, 8)),
            "attention.wk.weight": rows(pairs(attention.k_proj.weight.data, 8)),
            "attention.wv.weight": rows(attention.v_proj.weight.data),
            "attention.wo.weight": columns(attention.o_proj.weight.data),
            "feed_forward.w1.weight": rows(mlp.gate_proj.weight.data),
            "feed_forward.w2.weight": columns(mlp.down_proj.weight.data),
            "feed_forward.w3.weight": rows(mlp.up_proj.weight.data),
            "attention_norm.weight": layer.input_layernorm.weight.data.clone(),
            "ffn_norm.weight": layer.post_attention_layernorm.weight.data.clone(),
        }
        for name, norm in (("q", attention.q_norm), ("k", attention.k_norm)):
            for kind in ("weight", "bias"):
                vector = getattr(norm, kind).data.chunk(shards, 0)[shard][0]
                part[f"attention.{name}_normalization.{kind}"] = pairs(vector, 8)
        found |= {f"layers.{number}.{name}": tensor for name, tensor in part.items()}
    return found


def metaseq_parts(model: torch.nn.Module, parts: int, fused: bool) -> list[dict[str, Tensor]]:
    """The weights of an OPT as metaseq's tensor-parallel parts; a fused projection holds keys, values, queries."""
    found: list[dict[str, Tensor]] = [{"decoder.version": torch.tensor([3.0])} for _ in range(parts)]
    for name, tensor in model.model.decoder.state_dict().items():
        target = "decoder." + name
        if name == "final_layer_norm.weight" or name == "final_layer_norm.bias":
            target = "decoder.layer_norm." + name.rpartition(".")[2]
        module, _, kind = name.rpartition(".")
        module = module.rpartition(".")[2]
        for part in range(parts):
            value = tensor
            if module in ("q_proj", "k_proj", "v_proj", "fc1", "embed_tokens"):
                value = tensor.chunk(parts, 0)[part]
            elif module in ("out_proj", "fc2") and kind == "weight":
                value = tensor.chunk(parts, 1)[part]
            found[part][target] = value.clone()
    for state in found:
        for name in [name for name in state if "q_proj" in name] if fused else []:
            queries, keys, values = (state.pop(name.replace("q_proj", part)) for part in ("q_proj", "k_proj", "v_proj"))
            state[name.replace("q_proj", "qkv_proj")] = torch.cat([keys, values, queries])
    return found


def metaseq_args(**changes: object) -> argparse.Namespace:
    settings = {
        "decoder_attention_heads": 4,
        "no_scale_embedding": True,
        "share_decoder_input_output_embed": True,
        "activation_fn": "relu",
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return argparse.Namespace(**(settings | changes))


def refused(capsys: pytest.CaptureFixture, source: Path, *more: str) -> str:
    """The one line that `jam convert` says, after proving that nothing is left beside the source."""
    out = source.parent / "out"
    before = sorted(source.parent.iterdir())
    assert main(["convert", str(source), "--out", str(out), *more]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert sorted(source.parent.iterdir()) == before
    return said
