"""What ``jam convert`` refuses: one line, exit code 2, nothing run and nothing left."""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from jam.cli import main
from jam.convert.metaseq import make_tokenizer, read_metaseq
from jam.convert.pickles import Pickles
from jam.convert.vqgan import read_settings, read_vqgan
from jam.errors import CheckpointError
from jam.layouts import open_model
from tests.convert.owners import (
    DDCONFIG,
    metaseq_args,
    metaseq_parts,
    refused,
    write_chameleon,
    write_vqgan,
    write_yaml,
)
from tests.tiny import edit_json, network_class, randomize, tiny_config


def test_settings_and_weights_must_be_of_one_tokenizer(tmp_path: Path):
    network = write_vqgan(tmp_path)
    state = network.state_dict()
    variants = {
        "whole": state,
        "missing": {name: tensor for name, tensor in state.items() if name != "quant_conv.bias"},
        "foreign": state | {"encoder.more.weight": torch.ones(2)},
        "gumbel": state | {"quantize.embed.weight": torch.ones(2)},
        "nan": state | {"quant_conv.bias": torch.full((4,), torch.nan)},
        "whole numbers": state | {"quant_conv.bias": torch.ones(4, dtype=torch.int8)},
        "no decoder": {name: tensor for name, tensor in state.items() if not name.startswith("decoder.")},
    }
    for name, content in variants.items():
        torch.save({"state_dict": content}, tmp_path / f"{name}.ckpt")
    torch.save([1, 2], tmp_path / "list.ckpt")
    settings = tmp_path / "vqgan.yaml"

    def said(action: Callable) -> str:
        with pytest.raises(CheckpointError) as error:
            action()
        assert "\n" not in str(error.value)
        return str(error.value)

    with Pickles([tmp_path / f"{name}.ckpt" for name in (*variants, "list")]) as pickles:
        numbers = {name: number for number, name in enumerate(variants)}
        assert "tensor quant_conv.bias is missing, and [4]" in said(
            lambda: read_vqgan(pickles, numbers["missing"], settings)
        )
        assert "encoder.more.weight is [2], and not there" in said(
            lambda: read_vqgan(pickles, numbers["foreign"], settings)
        )
        assert "Gumbel quantizer" in said(lambda: read_vqgan(pickles, numbers["gumbel"], settings))
        assert "no table of named tensors" in said(lambda: pickles.state(len(numbers)))
        for name, message in (("nan", "NaN or infinite"), ("whole numbers", "quant_conv.bias is torch.int8")):
            tensor = pickles.state(numbers[name])["quant_conv.bias"]
            assert message in said(lambda tensor=tensor: pickles.raw(tensor))
        assert not read_vqgan(pickles, numbers["no decoder"], settings).config.decoder
        assert "encoder only" in read_vqgan(pickles, numbers["no decoder"], settings).note
        assert "names 8 image tokens" in said(lambda: read_vqgan(pickles, 0, settings, np.arange(8)))
        for params, message in (
            ({"embed_dim": 4, "n_embed": 16}, "ddconfig is missing"),
            ({"embed_dim": 4, "n_embed": 8, "ddconfig": DDCONFIG}, "quantize.embedding.weight is [16, 4], and [8, 4]"),
            ({"embed_dim": 4, "n_embed": 16, "ddconfig": DDCONFIG | {"ch": 33}}, "sizes of no network"),
        ):
            write_yaml(tmp_path / "other.yaml", params)
            assert message in said(lambda: read_vqgan(pickles, 0, tmp_path / "other.yaml"))
        for text, message in (("a: [", "cannot be read as YAML"), ("- 1", "a list; required: a mapping")):
            (tmp_path / "other.yaml").write_text(text)
            assert message in said(lambda: read_vqgan(pickles, 0, tmp_path / "other.yaml"))


def test_sources_and_outputs_that_do_not_do(tmp_path: Path, capsys):
    write_vqgan(tmp_path / "in")
    source = tmp_path / "in" / "vqgan.ckpt"
    assert "no such file or folder" in refused(capsys, tmp_path / "in" / "absent.ckpt")
    (tmp_path / "empty").mkdir()
    assert "0 pickles" in refused(capsys, tmp_path / "empty")
    assert "models and tokenizer are required" in refused(capsys, tmp_path / "empty", "--kind", "chameleon")
    assert "no pytorch_model.bin" in refused(capsys, tmp_path / "empty", "--kind", "transformers")
    (tmp_path / "in" / "second.yaml").write_text("{}")
    (tmp_path / "in" / "vqgan.yaml").rename(tmp_path / "in" / "first.yaml")
    assert "2 yaml files beside it" in refused(capsys, source)
    (tmp_path / "in" / "out").mkdir()
    (tmp_path / "in" / "out" / "file").write_text("mine")
    assert "not empty" in refused(capsys, source)
    assert (tmp_path / "in" / "out" / "file").read_text() == "mine"
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "in" / "new")]) == 2
    assert "lies inside the source" in capsys.readouterr().err


def rewrite(file: Path, change: Callable[[dict], object]) -> None:
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "tokenizer" / "vqgan.ckpt").unlink(), "vqgan.ckpt: no such file"),
        (lambda f: (f / "models/7b/consolidated.00.pth").unlink(), "shards [1]; all from 0 on"),
        (lambda f: (f / "models/7b/consolidated.01.pth").unlink(), "wq is [16, 32] over 1 shards"),
        (lambda f: (f / "models/7b/params.json").write_text('{"dim": 32}'), "n_heads is None"),
        (lambda f: edit_json(f / "models/7b/params.json", {"model.n_layers": 3}), "layers.3.attention.k_normal"),
        (lambda f: edit_json(f / "models/7b/params.json", {"model.n_layers": 5}), "no tensor layers.4.attention.wq"),
        (lambda f: edit_json(f / "models/7b/params.json", {"model.n_heads": 2}), "a head is 16 wide"),
        (lambda f: edit_json(f / "tokenizer/text_tokenizer.json", {"model.vocab.IMGIMGAZ": 20}), ""),
    ],
)
def test_a_chameleon_whose_parts_do_not_fit_is_refused(tmp_path: Path, capsys, change: Callable, message: str):
    write_chameleon(tmp_path / "in", 2)
    change(tmp_path / "in")
    assert message in refused(capsys, tmp_path / "in")


def test_norms_that_differ_between_shards_are_averaged_and_counted(tmp_path: Path, capsys):
    write_chameleon(tmp_path / "in", 2)
    file = tmp_path / "in/models/7b/consolidated.01.pth"
    first = torch.load(tmp_path / "in/models/7b/consolidated.00.pth", weights_only=True)["norm.weight"]
    rewrite(file, lambda state: state["norm.weight"].add_(1.0))
    assert main(["convert", str(tmp_path / "in/models/7b"), "--out", str(tmp_path / "out")]) == 0
    assert "1 norms that differed between shards averaged" in capsys.readouterr().err
    from jam.checkpoint import open_checkpoint

    assert np.allclose(open_checkpoint(tmp_path / "out").read("model.norm.weight"), first.numpy() + 0.5)


def test_metaseq_networks_that_opt_is_not_are_refused(tmp_path: Path):
    model = network_class("opt")(tiny_config("opt", vocab_size=60))
    randomize(model, 1)
    state = metaseq_parts(model, 1, True)[0]
    cases = {
        "no_scale_embedding is False": {"model": state, "args": metaseq_args(no_scale_embedding=False)},
        "no_scale_embedding is None": {"model": state},
        "alibi is True": {"model": state, "args": metaseq_args(alibi=True)},
        "decoder_attention_heads is None": {"model": state, "args": metaseq_args(decoder_attention_heads=None)},
        "activation_fn is 'swish'": {"model": state, "args": metaseq_args(activation_fn="swish")},
        "tensor decoder.alibi is no part": {"model": state | {"decoder.alibi": torch.ones(2)}, "args": metaseq_args()},
        "many weights in one vector": {"model": {"decoder.flat_param_0": torch.ones(9)}, "args": metaseq_args()},
        "share no table": {"model": state, "args": metaseq_args(share_decoder_input_output_embed=False)},
    }
    for number, content in enumerate(cases.values()):
        torch.save(content, tmp_path / f"{number}.pt")
    with Pickles([tmp_path / f"{number}.pt" for number in range(len(cases))]) as pickles:
        for number, message in enumerate(cases):
            with pytest.raises(CheckpointError) as error:
                read_metaseq(pickles, None, [number])
            assert message in str(error.value) and "\n" not in str(error.value)
        given = {"decoder_attention_heads": 4, "no_scale_embedding": True}
        assert read_metaseq(pickles, given, [1]).config["num_attention_heads"] == 4


def test_parts_and_tokenizers_of_metaseq_must_fit(tmp_path: Path, capsys):
    model = network_class("opt")(tiny_config("opt", vocab_size=60))
    randomize(model, 1)
    parts = metaseq_parts(model, 2, True)
    parts[1]["decoder.embed_positions.weight"] += 1
    (tmp_path / "in").mkdir()
    for number, state in enumerate(parts):
        torch.save({"model": state, "args": metaseq_args()}, tmp_path / "in" / f"reshard-model_part-{number}.pt")
    assert "embed_positions.weight differs between parts" in refused(capsys, tmp_path / "in")
    parts[1]["decoder.embed_positions.weight"] = parts[0]["decoder.embed_positions.weight"].clone()
    parts[1]["decoder.more.weight"] = torch.ones(2)
    torch.save({"model": parts[1], "args": metaseq_args()}, tmp_path / "in" / "reshard-model_part-1.pt")
    assert "decoder.more.weight is no part of an OPT" in refused(capsys, tmp_path / "in")
    (tmp_path / "in/reshard-model_part-0.pt").unlink()
    assert "parts [1]; all from 0 on" in refused(capsys, tmp_path / "in")
    (tmp_path / "in/reshard-model_part-0-shard0.pt").write_bytes(b"")
    assert "a piece of a tensor-parallel part" in refused(capsys, tmp_path / "in")
    words, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    merges.write_text("")
    words.write_text(json.dumps({"a": 0, "b": 1}))
    with pytest.raises(CheckpointError, match="0 to 3 are required"):
        make_tokenizer((words, merges), 60)
    words.write_text(json.dumps({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4}))
    with pytest.raises(CheckpointError, match="5 tokens, the model has 4 rows"):
        make_tokenizer((words, merges), 4)
    merges.write_text("a b c d\n")
    with pytest.raises(CheckpointError, match="damaged"):
        make_tokenizer((words, merges), 60)


def test_bins_with_whole_numbers_or_twice_the_same_name_are_refused(tmp_path: Path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"w": torch.ones(2, dtype=torch.int64)}, folder / "pytorch_model.bin")
    assert "tensor w is torch.int64" in refused(capsys, folder)
    (folder / "pytorch_model.bin").unlink()
    for name in ("a.bin", "b.bin"):
        torch.save({"w": torch.ones(2)}, folder / name)
    index = folder / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"w": "a.bin", "v": "b.bin"}}')
    assert "is in a.bin too" in refused(capsys, folder)
    index.write_text('{"weight_map": {"w": "../a.bin"}}')
    assert "names ../a.bin, which is not there" in refused(capsys, folder)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("layers.1.feed_forward.w2.weight", torch.ones(7, 5)),
        ("norm.weight", torch.ones(5)),
        ("layers.0.attention.wv.weight", torch.ones(5)),
        ("layers.0.attention.wk.weight", torch.ones(0, 32)),
        ("layers.0.attention.wo.weight", torch.ones(32, 32).long()),
        ("tok_embeddings.weight", torch.tensor(1.0)),
    ],
)
def test_a_chameleon_with_misshapen_tensors_is_refused(tmp_path: Path, capsys, name: str, tensor: torch.Tensor):
    write_chameleon(tmp_path / "in", 1)
    file = next((tmp_path / "in" / "models" / "7b").glob("*.pth"))
    rewrite(file, lambda state: state.update({name: tensor}))
    said = refused(capsys, tmp_path / "in")
    assert f"tensor {name} is" in said or "a model of family chameleon and these sizes" in said or "wo" in name
    assert "wo" not in name or "self_attn.o_proj.weight is torch.int64" in said


def test_a_chameleon_may_lack_a_padding_token(tmp_path: Path):
    write_chameleon(tmp_path / "in", 1)
    file = tmp_path / "in/tokenizer/text_tokenizer.json"
    file.write_text(file.read_text().replace("<pad>", "<padding>"))
    assert main(["convert", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert "pad_token_id" not in json.loads((tmp_path / "out/config.json").read_text())
    assert "pad" not in open_model(tmp_path / "out").jam.vocabulary.controls


def test_a_chameleons_base_of_rotary_positions_must_be_a_number(tmp_path: Path, capsys):
    write_chameleon(tmp_path / "in", 1)
    edit_json(tmp_path / "in/models/7b/params.json", {"model.rope_theta": "x"})
    assert "rope_theta is 'x'" in refused(capsys, tmp_path / "in")


def test_misshapen_metaseq_tensors_and_settings_are_refused(tmp_path: Path, capsys):
    model = network_class("opt")(tiny_config("opt", vocab_size=60))
    state = metaseq_parts(model, 1, True)[0]
    table, fused = "decoder.embed_tokens.weight", "decoder.layers.0.self_attn.qkv_proj.weight"
    for number, (content, message) in enumerate(
        (
            (
                {"model": state | {table: torch.tensor(1.0)}, "args": metaseq_args()},
                "embed_tokens.weight is []; 2 axes",
            ),
            ({"model": state | {table: torch.ones(0, 32)}, "args": metaseq_args()}, "is [0, 32], without a number"),
            ({"model": state | {fused: torch.ones(97, 32)}, "args": metaseq_args()}, "has 97 rows; 3 equal groups"),
            ({"model": state, "args": metaseq_args(dropout="x")}, "setting dropout is 'x'"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.save(content, folder / "restored.pt")
        assert message in refused(capsys, folder)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "model_part-a.pt").write_bytes(b"")
    assert "a part without a number" in refused(capsys, tmp_path / "a")


def test_bins_with_empty_tensors_or_a_model_type_that_is_no_word_are_refused(tmp_path: Path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": ["x"]}')
    torch.save({"w": torch.ones(0, 8)}, folder / "pytorch_model.bin")
    assert "tensor w is [0, 8], without a number" in refused(capsys, folder)


def test_links_out_of_a_folder_of_bins_are_refused(tmp_path: Path, capsys):
    (tmp_path / "secret").write_text("secret")
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    (folder / "chat_template.jinja").symlink_to(tmp_path / "secret")
    assert f"chat_template.jinja: a link to {tmp_path / 'secret'}" in refused(capsys, folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "pytorch_model.bin").rename(tmp_path / "other.bin")
    (folder / "pytorch_model.bin").symlink_to(tmp_path / "other.bin")
    assert "pytorch_model.bin: a link to" in refused(capsys, folder)
    for name in ("restored.pt", "other.ckpt"):
        (folder / "pytorch_model.bin").unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "other.bin")
        assert f"{name}: a link to" in refused(capsys, folder, "--kind", "vqgan" if "ckpt" in name else "metaseq")
        (folder / name).unlink()


def test_yaml_that_is_no_plain_tree_is_refused(tmp_path: Path):
    file = tmp_path / "a.yaml"
    bomb = "a: &a [1, 1]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}]\n" for a, b in itertools.pairwise("abcdefghijklmnopqrst")
    )
    for text in (
        bomb,
        "a: &a [*a]",
        "[" * 3000,
        "a: " + "[" * 900 + "]" * 900,
        "? [1]\n: 2",
        "a: !!int x",
        "#" * (2 << 20),
    ):
        file.write_text(text)
        with pytest.raises(CheckpointError) as error:
            read_settings(file)
        assert "\n" not in str(error.value) and "--config" in str(error.value)
    file.write_text("2020-01-01: 2021-01-01\n1: 2\n")
    assert read_settings(file) == {"2020-01-01": "2021-01-01", "1": 2}


def test_one_says_what_to_give(tmp_path: Path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    torch.save({"w": torch.ones(2)}, folder / "pytorch_model.bin")
    out = ["--out", str(tmp_path / "out")]
    for more in ([], ["--kind", "transformers"]):
        assert main(["convert", str(folder / "pytorch_model.bin"), *out, *more]) == 2
        assert f"give the folder {folder}" in capsys.readouterr().err
    (folder / "pytorch_model.bin").rename(folder / "training_args.bin")
    (folder / "model.safetensors").write_bytes(b"")
    assert "already safetensors, nothing to convert" in refused(capsys, folder)
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(capsys, tmp_path / "pipe")
